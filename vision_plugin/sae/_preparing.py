"""What a training run opens and checks before its first step."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from sae_lens import TrainingSAE

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
    """The model and the images of a run; a store of activations goes without a model.

    Args:
        cfg: The run.
        model: In hand, or None to load the configuration's.
        images: An image source or a store in hand, or None to open the configuration's.

    Raises:
        ValueError: there are none, or the model is unknown.
    """
    source = cfg.images if images is None else images
    if source == "":
        raise ValueError(
            "the configuration does not say what to train on: set images (--images) to images, "
            "or to a store of activations"
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
    if images is None or isinstance(images, ImageSource):
        images = open_images(source, column=cfg.image_column, split=cfg.split)
    return model, images


def fitted(
    cfg: VisionSAERunnerConfig, model: VisionBridge | None, images: Any
) -> VisionSAERunnerConfig:
    """The configuration, checked against the model or the store, with all that it left open.

    Raises:
        ValueError: a hook, width, model or kind of token does not fit, or a setting does not fit
            the length of the run.
    """
    if isinstance(images, ActivationStore):
        check_store(images, cfg, model)
        return resolve(with_widths(_with_batch(cfg, images), model, images))
    return resolve(with_widths(cfg, model, None))


def _with_batch(cfg: VisionSAERunnerConfig, store: ActivationStore) -> VisionSAERunnerConfig:
    """The configuration with a batch that the store can fill, where none is set."""
    n_rows = min(store.n_rows(name) for name in cfg.hook_names if name in store.hook_names)
    if cfg.train_batch_size_tokens != AUTO or cfg.batch_size <= n_rows:
        return cfg
    return dataclasses.replace(cfg, train_batch_size_tokens=1 << (n_rows.bit_length() - 1))


def make_sae(cfg: VisionSAERunnerConfig) -> TrainingSAE[Any]:
    """The SAE with its first weights, which follow from the seed alone."""
    torch.manual_seed(cfg.seed)
    sae_config = cfg.sae if cfg.dense else sparse_config(cfg.sae)
    return TrainingSAE.from_dict(sae_config.to_dict())


def make_validator(
    cfg: VisionSAERunnerConfig, model: VisionBridge | None, images: Any
) -> tuple[Validator | None, VisionBridge | None]:
    """What looks at held-out images, if any are given, and the model, which it may have to load."""
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
    """Write into the SAE's metadata what it is trained on."""
    for name, value in made_of.items():
        sae.cfg.metadata[name] = value


def run_identity(cfgs: dict[str, VisionSAERunnerConfig], made_of: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint has to have been made with: configurations, and the model's weights."""
    return {
        "configs": {name or "sae": cfg.identity() for name, cfg in cfgs.items()},
        "model_signature": made_of["model_signature"],
        "n_images": made_of["n_images"],
    }
