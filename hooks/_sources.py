"""Harvest sources for parts that are fused in the native module and split in the bridge's copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vision_plugin.hooks._components import VisionNormBridge
from vision_plugin.hooks._restructure import SplitLinear
from vision_plugin.models import Source


def split_sources(root: nn.Module, native_path: Callable[[str], str]) -> dict[str, Source]:
    """Return sources for the parts of every split projection, by canonical hook name.

    Args:
        root: The bridge's copy of the module.
        native_path: Turns a path in the copy into the path in the native module.
    """
    sources: dict[str, Source] = {}
    for path, split in split_linears(root):
        place = native_path(path)
        for name, (start, stop) in split.spans.items():
            part: Any = split._modules[name]
            if not hasattr(part, "hook_out"):
                continue
            reshape = part.hook_out.hook_conversion
            if split.called:
                convert = _piece(start, stop, reshape, None)
                sources[part.hook_out.name] = Source(place, "out", convert)
                sources[part.hook_in.name] = Source(place, "in")
            else:
                parent = place.rpartition(".")[0]
                convert = _piece(start, stop, reshape, split.fused)
                sources[part.hook_out.name] = Source(parent, "in", convert)
                sources[part.hook_in.name] = Source(parent, "in")
    return sources


def norm_sources(root: nn.Module, native_path: Callable[[str], str]) -> dict[str, Source]:
    """Return sources for the scale of every normalisation, in TransformerLens's arithmetic."""
    sources: dict[str, Source] = {}
    for path, module in root.named_modules():
        if isinstance(module, VisionNormBridge):
            name = module.hook_normalized.name
            sources[str(name)] = Source(native_path(_native(path)), "in", _normaliser(module))
    return sources


def split_linears(root: nn.Module) -> Iterator[tuple[str, SplitLinear]]:
    """Yield the split projections with their paths, without the steps into bridge components."""
    for path, module in root.named_modules():
        if isinstance(module, SplitLinear):
            yield _native(path), module


def _native(path: str) -> str:
    """Return a path without the steps into bridge components."""
    return ".".join(step for step in path.split(".") if step != "_original_component")


def _normaliser(norm: VisionNormBridge) -> Callable[[Tensor], Tensor]:
    def normalise(x: Tensor) -> Tensor:
        x = x if x.dtype in (torch.float32, torch.float64) else x.float()
        if not norm.uses_rms_norm:
            x = x - x.mean(-1, keepdim=True)
        eps = float(getattr(norm.original_component, "eps", 1e-5))
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    return normalise


def _piece(
    start: int, stop: int, reshape: Any, project: nn.Module | None
) -> Callable[[Tensor], Tensor]:
    def convert(x: Tensor) -> Tensor:
        piece = (x if project is None else project(x))[..., start:stop]
        if reshape is None:
            return piece
        shaped: Tensor = reshape.convert(piece)
        return shaped

    return convert
