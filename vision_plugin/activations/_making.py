"""Make a plan from a configuration, a model and images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vision_plugin.activations._config import ExtractionConfig
from vision_plugin.activations._decoding import probe_pixels
from vision_plugin.activations._plan import (
    DTYPES,
    MAX_IMAGES_WRITTEN,
    MAX_SHARDS,
    HookSpec,
    ModelSpec,
    StorePlan,
    TokenSpec,
)
from vision_plugin.images import ImageSource
from vision_plugin.models import Harvester, TokenLayout, TokenSelection
from vision_plugin.models.site import signature

SHARD_BYTES = 128 * 1024 * 1024
MIN_SHARD_BYTES = 8 * 1024 * 1024
SHARDS_OF_A_SMALL_STORE = 8
"""Shards of a store below a gigabyte: one is hashed and written while the next is made."""
CHUNK_BYTES = 256 * 1024
"""Bytes of the images that are read together: enough for a disk to be quick."""
_SAMPLE = 4096


def make_plan(config: ExtractionConfig, model: Any, source: ImageSource) -> StorePlan:
    """Run the model once on an empty image and lay out the store.

    Raises:
        ValueError: the model lacks the tokens, a hook or its preprocessing.
    """
    if model.image_processor is None:
        raise ValueError(
            f"{model.cfg.model_name} was wrapped without its preprocessing: use "
            "wrap(module, image_processor=...)"
        )
    pixels = probe_pixels(model.image_processor)
    size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
    layout: TokenLayout = model.token_layout(size)
    selection = TokenSelection.parse(config.tokens)
    n_selected = selection.rows(layout, 1).shape[1]
    harvested = Harvester(model, list(config.hook_names))(pixels.to(model.device, model.dtype))
    hooks = [_hook(name, tensor, layout, n_selected) for name, tensor in harvested.items()]
    value_bytes = DTYPES[config.dtype].itemsize
    per_image = [spec.rows_per_image * spec.d_in * value_bytes for spec in hooks]
    plan = StorePlan(
        model=ModelSpec(
            name=str(model.cfg.model_name),
            revision=model.revision,
            architecture=str(model.cfg.architecture),
            weights=weights_fingerprint(model.native),
            signature=tuple(signature(model)),
            device=model.device.type,
        ),
        preprocessing=model.image_processor.fingerprint(),
        image_size=size,
        hooks=tuple(hooks),
        tokens=TokenSpec(config.tokens, layout.n_cls, layout.n_registers, layout.grid),
        dtype=config.dtype,
        images=source.description,
        seed=config.seed,
        batch_size=config.batch_size,
        images_per_shard=config.images_per_shard
        or _images_per_shard(sum(per_image), config.batch_size, len(source)),
        images_per_chunk=max(1, -(-CHUNK_BYTES // max(per_image))),
    )
    if plan.n_shards > MAX_SHARDS:
        raise ValueError(
            f"images_per_shard={plan.images_per_shard} makes {plan.n_shards:,} shards, above the "
            f"limit of {MAX_SHARDS:,}: use at least {-(-len(source) // MAX_SHARDS):,}"
        )
    # What no reader would take is refused before the first image.
    return StorePlan.from_json(plan.to_json(), Path(config.output_path) / "plan.json")


def _hook(name: str, tensor: Tensor, layout: TokenLayout, n_selected: int) -> HookSpec:
    rows = by_rows(tensor)
    if tensor.ndim == 2:
        return HookSpec(name, rows.shape[-1], 1, per_token=False)
    if rows.shape[1] != layout.n_tokens:
        raise ValueError(
            f"{name} gives {list(tensor.shape)}, which has no dimension for the model's "
            f"{layout.n_tokens} tokens: it cannot be stored by token"
        )
    return HookSpec(name, rows.shape[-1], n_selected, per_token=True)


def by_rows(activation: Tensor) -> Tensor:
    """Return a pooled, a token or a per-head activation as [batch, rows, d_in]."""
    if activation.ndim == 2:
        return activation.unsqueeze(1)
    return activation.flatten(2)


def _images_per_shard(image_bytes: int, batch_size: int, n_images: int) -> int:
    """Return as many full batches as make a shard of the usual size, at least one."""
    share = image_bytes * n_images // SHARDS_OF_A_SMALL_STORE
    size = min(SHARD_BYTES, max(MIN_SHARD_BYTES, share))
    batches = min(size // (image_bytes * batch_size), MAX_IMAGES_WRITTEN // batch_size)
    return max(1, batches) * batch_size


@torch.no_grad()
def weights_fingerprint(module: nn.Module) -> str:
    """Return sixteen hexadecimal digits of the SHA-256 of samples of all parameters and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, len(flat) // _SAMPLE)].cpu().contiguous()
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes() if sample.ndim else b"")
    return digest.hexdigest()[:16]


def selected_rows(plan: StorePlan, layout: TokenLayout, indices: Sequence[int]) -> Tensor:
    """Return the tokens of each image, [images, rows]; its number determines random ones."""
    selection = TokenSelection.parse(plan.tokens.selection)
    if not plan.tokens.random:
        return selection.rows(layout, len(indices))
    drawn = [
        selection.rows(layout, 1, torch.Generator().manual_seed(_mixed(plan.seed, index)))
        for index in indices
    ]
    return torch.cat(drawn)


def _mixed(seed: int, index: int) -> int:
    digest = hashlib.sha256(f"{seed}:{index}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
