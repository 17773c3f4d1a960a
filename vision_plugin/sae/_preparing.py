"""Open and check what a training run needs before its first step."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from sae_lens import TrainingSAE

from vision_plugin._device import usable_device
from vision_plugin.activations import ActivationStore
from vision_plugin.images import ImageSource, open_images
from vision_plugin.models import VisionBridge, load_model
from vision_plugin.sae._auto import AUTO
from vision_plugin.sae._config import VisionSAERunnerConfig
from vision_plugin.sae._defaults import resolve
from vision_plugin.sae._sources import check_store, is_store, open_store, with_widths
from vision_plugin.sae._sparse_register import sparse_config
from vision_plugin.sae._validation import Validator


def open_inputs(
    cfg: VisionSAERunnerConfig, model: VisionBridge | None, images: Any
) -> tuple[VisionBridge | None, Any]:
    """Return the model and the images of a run; a run over a store may have no model.

    Args:
        cfg: Configuration of the run.
        model: A loaded model; None loads ``cfg.model_name``.
        images: Anything that ``open_images`` takes, or a store; None opens ``cfg.images``.

    Raises:
        ValueError: there are no images, or the model is unknown.
    """
    usable_device(cfg.device)
    source = cfg.images if images is None else images
    if source == "":
        raise ValueError(
            "the configuration does not say what to train on: set images= to images or to a store "
            "of activations"
        )
    if is_store(source):
        for name in ("split", "image_column"):
            if getattr(cfg, name) is not None:
                raise ValueError(
                    f"images is a store of activations, which has no such part: leave out {name}="
                )
        return model, open_store(source)
    torch.manual_seed(cfg.seed)
    model = model or load_model(cfg.model_name, device=cfg.device, dtype=getattr(torch, cfg.dtype))
    if isinstance(source, ImageSource) or not hasattr(source, "ids"):
        images = open_images(source, column=cfg.image_column, split=cfg.split)
    return model, images


def fitted(
    cfg: VisionSAERunnerConfig, model: VisionBridge | None, images: Any
) -> VisionSAERunnerConfig:
    """Return the configuration with a value for every field, after checks against the inputs.

    Args:
        cfg: Configuration of the run.
        model: Model to train on; None if a store is given without one.
        images: Image source or store.

    Raises:
        ValueError: the hook, width, model or kind of token does not fit the inputs, or a setting
            does not fit the length of the run.
    """
    if isinstance(images, ActivationStore):
        check_store(images, cfg, model)
        return resolve(with_widths(_with_batch(cfg, images), model, images))
    return resolve(with_widths(cfg, model, None))


def _with_batch(cfg: VisionSAERunnerConfig, store: ActivationStore) -> VisionSAERunnerConfig:
    """Return the configuration with a batch that the store can fill, unless one is set."""
    n_rows = min(store.n_rows(name) for name in cfg.hook_names if name in store.hook_names)
    if cfg.train_batch_size_tokens != AUTO or cfg.batch_size <= n_rows:
        return cfg
    return dataclasses.replace(cfg, train_batch_size_tokens=1 << (n_rows.bit_length() - 1))


def make_sae(cfg: VisionSAERunnerConfig) -> TrainingSAE[Any]:
    """Return a new SAE; the seed alone decides its weights."""
    torch.manual_seed(cfg.seed)
    sae_config = cfg.sae if cfg.dense else sparse_config(cfg.sae)
    return TrainingSAE.from_dict(sae_config.to_dict())


def make_validator(
    cfg: VisionSAERunnerConfig, model: VisionBridge | None, images: Any
) -> tuple[Validator | None, VisionBridge | None]:
    """Return the scorer of held-out images, or None without such images, and the run's model.

    The model is loaded if the scorer needs one and ``model`` is None.
    """
    if images is None and cfg.validation_images is None:
        return None, model
    if images is None:
        images = open_images(
            cfg.validation_images, column=cfg.image_column, split=cfg.validation_split
        )
    model = model or load_model(cfg.model_name, device=cfg.device, dtype=getattr(torch, cfg.dtype))
    name = cfg.validation_embedder
    validator = Validator(
        model,
        images,
        cfg.hook_names,
        tokens=cfg.tokens,
        n_images=cfg.n_validation_images,
        batch_size=cfg.store_batch_size_images,
        names=cfg.validation_metrics,
        embedder=None if name is None else load_model(name, device=cfg.device),
        template=cfg.validation_template,
    )
    return validator, model


def record_origin(sae: TrainingSAE[Any], made_of: dict[str, Any]) -> None:
    """Write what an SAE is trained on into its metadata."""
    for name, value in made_of.items():
        sae.cfg.metadata[name] = value


def run_identity(cfgs: dict[str, VisionSAERunnerConfig], made_of: dict[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint must agree with to continue this run, as JSON values."""
    return {
        "configs": {name or "sae": cfg.identity() for name, cfg in cfgs.items()},
        "model_signature": made_of["model_signature"],
        "n_images": made_of["n_images"],
    }
