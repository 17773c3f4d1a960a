"""Where a steered pass begins, and what every steered pass of an image shares."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vision_plugin.models._splicing import permanent_hook, remove_hook


@dataclass(frozen=True)
class Site:
    """The hooks an SAE reads and writes, and the first block that has to be run again.

    Attributes:
        source: hook whose activation the SAE encodes.
        target: hook whose activation is edited; another one for a transcoder.
        start: block at which a steered pass begins, the number of blocks for the head alone, None
            for the pixels.
        is_stream: the edited activation is the residual stream that enters block ``start``.
    """

    source: str
    target: str
    start: int | None
    is_stream: bool


@dataclass(frozen=True)
class Prepared:
    """Some images, run once.

    Attributes:
        entry: what a steered pass begins with: residual stream ``[n, tokens, d_model]`` or pixels.
        source: activation at the hook that the SAE encodes, ``[n, ..., d]``.
        target: activation at the hook that is edited.
        final: the residual stream behind the last block; None where nothing asks for it.
        embedding: image embeddings without steering, not normalised, ``[n, d_embed]``.
    """

    entry: Tensor
    source: Tensor
    target: Tensor
    final: Tensor | None
    embedding: Tensor

    def __len__(self) -> int:
        return self.entry.shape[0]


def locate(model: Any, sae: Any) -> Site:
    """Find the latest place from which steering at an SAE's hook can start.

    Raises:
        ValueError: the SAE names no hook, or one that the model does not have.
    """
    metadata = sae.cfg.metadata
    source = metadata.get("hook_name")
    if not source:
        raise ValueError(
            "this SAE does not say where it belongs: set sae.cfg.metadata.hook_name, for example "
            "'blocks.10.hook_resid_post'"
        )
    target = metadata.get("hook_name_out") or source
    model.check_hook_names([source, target])
    hooks = model.hook_dict
    if any(hook.fwd_hooks for hook in hooks.values()):
        # Someone's hooks, or spliced SAEs, are part of the model: run the whole of it every time.
        return Site(source, target, start=None, is_stream=False)
    if source == target:
        for block in range(int(model.cfg.n_layers)):
            if hooks[target] is hooks[f"blocks.{block}.hook_resid_pre"]:
                return Site(source, target, start=block, is_stream=True)
            if hooks[target] is hooks[f"blocks.{block}.hook_resid_post"]:
                return Site(source, target, start=block + 1, is_stream=True)
    starts = [_block_of(name, model) for name in (source, target)]
    known = [start for start in starts if start is not None]
    return Site(source, target, start=min(known) if len(known) == 2 else None, is_stream=False)


def final_stream(model: Any) -> str:
    """The hook behind the last block."""
    return f"blocks.{int(model.cfg.n_layers) - 1}.hook_resid_post"


def into_final_stream(model: Any, site: Site) -> Tensor | None:
    """What an edit at the site is multiplied by to be one of the stream behind the last block.

    Returns:
        Float64 ``[d_target, d_model]`` for the last MLP's neurons and its output, from which the
        stream is reached by a linear map; None for any other place.
    """
    last = int(model.cfg.n_layers) - 1
    hooks, place = model.hook_dict, model.hook_dict[site.target]
    if place is hooks.get(f"blocks.{last}.hook_mlp_out"):
        return torch.eye(int(model.cfg.d_model), dtype=torch.float64, device=model.device)
    if place is not hooks.get(f"blocks.{last}.mlp.hook_post"):
        return None
    out = getattr(getattr(model.blocks[last].mlp, "out", None), "original_component", None)
    return out.weight.detach().double().T if isinstance(out, nn.Linear) else None


def prepare(model: Any, site: Site, pixels: Tensor, *, keep_final: bool = False) -> Prepared:
    """Run images up to the site and, unsteered, from there to their embeddings."""
    entry = pixels if site.start is None else model(pixels, stop_at_layer=site.start)
    if site.is_stream:
        return Prepared(entry, entry, entry, entry, finish(model, site, entry))
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[Tensor, Any], None]:
        def hook_function(activation: Tensor, hook: Any) -> None:
            del hook
            seen[name] = activation.detach().clone()

        return hook_function

    names = {site.source, site.target} | ({final_stream(model)} if keep_final else set())
    with hooked(model, {name: keep(name) for name in names}):
        embedding = finish(model, site, entry)
    missing = [name for name in (site.source, site.target) if name not in seen]
    if missing:
        raise ValueError(
            f"{missing[0]} did not fire when the model ran, so nothing can be steered there; "
            "choose a hook that the forward pass goes through"
        )
    final = seen.get(final_stream(model))
    return Prepared(entry, seen[site.source], seen[site.target], final, embedding)


def finish(model: Any, site: Site, entry: Tensor) -> Tensor:
    """Run the model from the site on; embeddings ``[n, d_embed]``, not normalised."""
    kwargs = {} if site.start is None else {"start_at_layer": site.start}
    embedding: Tensor = model.encode_image(entry, normalize=False, **kwargs)
    return embedding


def finish_edited(model: Any, site: Site, entry: Tensor, edited: Tensor) -> Tensor:
    """Run the model from the site on, with ``edited`` in place of the target's activation."""
    if site.is_stream:
        return finish(model, site, edited)

    def replace(activation: Tensor, hook: Any) -> Tensor:
        del hook
        return edited.reshape(activation.shape).to(activation.dtype)

    with hooked(model, {site.target: replace}):
        return finish(model, site, entry)


@contextmanager
def hooked(model: Any, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Hook functions by hook name, for the length of a ``with`` block."""
    hooks = model.hook_dict
    handles = [(hooks[name], permanent_hook(hooks[name], run)) for name, run in functions.items()]
    try:
        yield
    finally:
        for hook_point, handle in handles:
            remove_hook(hook_point, handle)


def repeat(tensor: Tensor, times: int) -> Tensor:
    """``times`` copies of a batch, one after the other."""
    return tensor.expand(times, *tensor.shape).flatten(0, 1)


def flatten_heads(activation: Tensor, width: int) -> Tensor:
    """``[n, tokens, n_heads, d_head]`` to ``[n, tokens, width]`` for an SAE over all heads."""
    if activation.ndim == 4 and activation.shape[-1] != width:
        return activation.flatten(-2)
    return activation


def check_images(pixels: Tensor) -> None:
    """Raise unless ``pixels`` is a batch of pictures without NaN or infinity."""
    if pixels.ndim != 4 or pixels.shape[0] == 0:
        raise ValueError(
            f"pixels must be [images, channels, height, width] with at least one image, got "
            f"{list(pixels.shape)}; model.preprocess(pictures) makes them"
        )
    bad = torch.nonzero(~pixels.isfinite().flatten(1).all(dim=1)).flatten().tolist()
    if bad:
        raise ValueError(
            f"pixels of image {bad[0]} ({len(bad)} of {len(pixels)} images) hold NaN or infinity; "
            "leave them out"
        )


def _block_of(name: str, model: Any) -> int | None:
    """First block to run for a hook inside a block or in the head; None for one before both."""
    inside = re.match(r"blocks\.(\d+)\.", name)
    if inside:
        return int(inside.group(1))
    return int(model.cfg.n_layers) if re.match(r"(ln_final|unembed)\b", name) else None
