"""Training batches, from images that go through the model on the fly or from a store."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from vision_plugin.activations import (
    ActivationStore,
    ActivationStream,
    ShuffledBatches,
    holds_store,
)
from vision_plugin.models import VisionBridge, load_model
from vision_plugin.models.site import has_signature, hook_width, signature
from vision_plugin.sae._auto import D_IN_OF_MODEL
from vision_plugin.sae._config import VisionSAERunnerConfig

_METADATA_OF_STORE = (
    *("model_name", "model_revision", "model_signature", "tokens"),
    *("preprocessing", "dataset_path", "n_images", "context_size"),
)


@runtime_checkable
class Batches(Protocol):
    """An endless stream of batches of equal size; its position can be saved."""

    def __iter__(self) -> Iterator[Any]: ...

    def __next__(self) -> Any: ...

    def sample(self) -> Any:
        """Return the next few batches as one; they come again."""

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that :meth:`state_dict` returned."""


class StoreBatches:
    """Batches of a store: each is one tensor, or tensors by hook name."""

    def __init__(self, batches: ShuffledBatches, *, n_sampled: int, by_hook: bool) -> None:
        self.batches, self.n_sampled, self.by_hook = batches, n_sampled, by_hook

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """Return the next batch.

        Raises:
            ValueError: the batch has values that are not finite.
        """
        batch = self.batches.next_batch()
        for name, rows in batch.activations.items():
            finite = torch.isfinite(rows).all(dim=-1)
            if not bool(finite.all()):
                broken = batch.images[(~finite).cpu()].unique()[:3].tolist()
                ids = ", ".join(self.batches.store.ids[image] for image in broken)
                raise ValueError(
                    f"{int((~finite).sum())} activation vectors of {self.batches.store!r} at "
                    f"{name} are not finite (images {ids}, ...). Extract them again"
                )
        return self._as_served(batch.activations)

    def _as_served(self, activations: dict[str, Tensor]) -> Any:
        if self.by_hook:
            return activations
        parts = list(activations.values())
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def sample(self) -> Any:
        """Return the next few batches as one; they come again."""
        place = self.batches.state_dict()
        taken = [next(self) for _ in range(self.n_sampled)]
        self.batches.load_state_dict(place)
        if not self.by_hook:
            return torch.cat(taken)
        return {name: torch.cat([batch[name] for batch in taken]) for name in taken[0]}

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch, as JSON values."""
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that :meth:`state_dict` returned."""
        self.batches.load_state_dict(state)


def is_store(images: Any) -> bool:
    """Return whether ``images`` is a store of activations or its folder."""
    if isinstance(images, ActivationStore):
        return True
    if not isinstance(images, str | Path):
        return False
    return holds_store(images)


def open_batches(
    cfg: VisionSAERunnerConfig,
    images: Any,
    model: VisionBridge | None,
    *,
    hook_names: list[str] | None = None,
) -> ActivationStream | StoreBatches:
    """Return the batches that a configuration trains on.

    Args:
        cfg: Configuration of the run.
        images: Store or image source.
        model: Model to run images through; a store needs none.
        hook_names: Hooks to return tensors by name for; by default a batch is one tensor, of
            ``cfg.hook_names`` side by side.

    Raises:
        ValueError: there are too few vectors for one batch, or a hook is missing.
    """
    names, by_hook = hook_names or cfg.hook_names, hook_names is not None
    if not isinstance(images, ActivationStore):
        assert model is not None
        return ActivationStream(
            model,
            images,
            hook_names=names,
            tokens=cfg.tokens,
            batch_size=cfg.batch_size,
            images_per_forward=cfg.store_batch_size_images,
            n_batches_in_buffer=cfg.n_batches_in_buffer,
            seed=cfg.seed,
            by_hook=by_hook,
        )
    n_rows = min(images.n_rows(name) for name in names)
    if n_rows < cfg.batch_size:
        raise ValueError(
            f"{images.paths[0]} holds {n_rows} vectors, which is less than one batch of "
            f"{cfg.batch_size}: extract more, or lower train_batch_size_tokens="
        )
    batches = images.batches(
        names,
        cfg.batch_size,
        seed=cfg.seed,
        n_batches_in_buffer=cfg.n_batches_in_buffer,
    )
    n_sampled = min(cfg.n_batches_in_buffer, -(-n_rows // cfg.batch_size))
    return StoreBatches(batches, n_sampled=n_sampled, by_hook=by_hook)


def open_store(images: Any) -> ActivationStore:
    """Return a complete store.

    Raises:
        ValueError: its extraction has not finished.
    """
    store = images if isinstance(images, ActivationStore) else ActivationStore(images)
    if not store.complete:
        raise ValueError(
            f"the store {store.paths[0]} is incomplete: run the same extraction again to finish "
            "it before training on it"
        )
    return store


def check_store(
    store: ActivationStore, cfg: VisionSAERunnerConfig, model: VisionBridge | None
) -> None:
    """Raise if a store holds other activations than a configuration asks for.

    If the models' names differ, the function loads ``cfg.model_name`` and compares the weights.

    Raises:
        StoreMismatchError: something differs; the message names both sides of every difference.
        ValueError: the store lacks a hook.
    """
    named = store.metadata(cfg.hook_name)
    if model is None and named["model_name"] != cfg.model_name:
        model = load_model(cfg.model_name, device=cfg.device)
    signed = named["model_signature"]
    if model is None:
        signed = None
    elif not has_signature(model, signed):
        signed = signature(model)
    widths = {cfg.hook_name: cfg.sae.d_in}
    if cfg.hook_name_out is not None:
        widths[cfg.hook_name_out] = getattr(cfg.sae, "d_out", D_IN_OF_MODEL)
    for hook_name, width in widths.items():
        store.check_fits(
            {
                "hook_name": hook_name,
                "d_in": width or None,
                "tokens": cfg.tokens,
                "model_name": cfg.model_name,
                "model_signature": signed,
            }
        )


def with_widths(
    cfg: VisionSAERunnerConfig, model: VisionBridge | None, store: ActivationStore | None
) -> VisionSAERunnerConfig:
    """Return the configuration with the SAE's widths, checked against the widths at the hooks.

    Args:
        cfg: Configuration of the run.
        model: Model to ask for the widths; None if a store is given.
        store: Store to ask for the widths; None asks the model.

    Raises:
        UnknownHookError: the model has no such hook.
        ValueError: a width differs or is unknown, or a transcoder lacks its second hook.
    """
    if store is None:
        assert model is not None
        model.check_hook_names(cfg.hook_names)
    changed = {}
    is_transcoder = hasattr(cfg.sae, "d_out")
    if is_transcoder != (cfg.hook_name_out is not None):
        has = "needs" if is_transcoder else "has no use for"
        raise ValueError(
            f"{cfg.sae.architecture()} {has} hook_name_out=, the hook that a transcoder predicts"
        )
    fields = ("d_in", "d_out") if is_transcoder else ("d_in",)
    for field, hook_name in zip(fields, cfg.hook_names, strict=True):
        said = getattr(cfg.sae, field)
        width = store.d_in(hook_name) if store is not None else hook_width(model, hook_name)
        if said == D_IN_OF_MODEL:
            if width is None:
                raise ValueError(f"the width at {hook_name} is unknown: set {field}=")
            changed[field] = width
        elif width is not None and said != width:
            raise ValueError(
                f"the SAE has {field}={said}, but {hook_name} of {cfg.model_name} has "
                f"{width} dimensions"
            )
    if not changed:
        return cfg
    return dataclasses.replace(cfg, sae=dataclasses.replace(cfg.sae, **changed))


def origin(cfg: VisionSAERunnerConfig, model: VisionBridge | None, images: Any) -> dict[str, Any]:
    """Return what an SAE's metadata says about its training data."""
    hooks = {"hook_name": cfg.hook_name}
    if cfg.hook_name_out:
        hooks["hook_name_out"] = cfg.hook_name_out
    if isinstance(images, ActivationStore):
        found = images.metadata(cfg.hook_name)
        return {**{name: found[name] for name in _METADATA_OF_STORE}, **hooks}
    assert model is not None
    image_processor = model.image_processor
    return {
        "model_name": cfg.model_name,
        "model_revision": model.revision,
        "model_signature": signature(model),
        "tokens": cfg.tokens,
        "dataset_path": cfg.images,
        "n_images": len(images),
        "preprocessing": None if image_processor is None else image_processor.fingerprint(),
        "context_size": model.token_layout().n_tokens,
        **hooks,
    }


class SplitBatches:
    """Batches by the SAE's name, made from batches by hook name."""

    def __init__(self, batches: Batches, hooks: dict[str, list[str]]) -> None:
        """Set the hooks of each SAE.

        Args:
            batches: Batches by hook name.
            hooks: Hook names by the SAE's name; a transcoder has two, whose activations stand side
                by side in its batch.
        """
        self.batches, self.hooks = batches, hooks

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self

    def __next__(self) -> dict[str, Tensor]:
        return self._split(next(self.batches))

    def sample(self) -> dict[str, Tensor]:
        """Return the next few batches as one; they come again."""
        return self._split(self.batches.sample())

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch."""
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position that :meth:`state_dict` returned."""
        self.batches.load_state_dict(state)

    def _split(self, by_hook: dict[str, Tensor]) -> dict[str, Tensor]:
        made: dict[tuple[str, ...], Tensor] = {}
        for names in map(tuple, self.hooks.values()):
            if names not in made:
                parts = [by_hook[name] for name in names]
                made[names] = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return {sae: made[tuple(names)] for sae, names in self.hooks.items()}


def all_hooks(cfgs: list[VisionSAERunnerConfig]) -> list[str]:
    """Return the hooks of several runs, each once, in the order of the runs."""
    return list(dict.fromkeys(itertools.chain.from_iterable(cfg.hook_names for cfg in cfgs)))
