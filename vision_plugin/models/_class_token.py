"""The last block for the class token alone, where an embedding reads nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vision_plugin.models._modes import in_eval_mode
from vision_plugin.models._own_hooks import hooked

_TOLERANCE = 1e-4


@contextmanager
def class_token_alone(model: Any) -> Iterator[None]:
    """Run the last block for the class token alone within a ``with`` block.

    Keys and values are computed for every token; queries, output projection and MLP for the class
    token. The stream of the other tokens behind the block means nothing then.

    Args:
        model: A VisionBridge for which :func:`reads_class_token` is True.
    """
    last = int(model.cfg.n_layers) - 1
    attention = model.blocks[last].attn
    rows = model.token_layout().indices("cls")[:1].to(model.device)

    def shorten(residual: Tensor, hook: Any) -> Tensor:
        del hook
        return residual[:, rows]

    with model.alone(), hooked(model, {f"blocks.{last}.hook_resid_mid": shorten}):
        try:
            if getattr(attention, "can_ask", False):
                attention._asking = rows
            yield
        finally:
            if getattr(attention, "can_ask", False):
                attention._asking = None


@torch.no_grad()
def reads_class_token(model: Any, stream: Tensor) -> bool:
    """Return whether embeddings are the same if the last block runs for the class token alone.

    Args:
        model: A VisionBridge.
        stream: The residual stream of a few images that enters the last block,
            ``[n, tokens, d_model]``, on which this is tried.
    """
    last = int(model.cfg.n_layers) - 1
    if model.token_layout().n_cls == 0 or f"blocks.{last}.hook_resid_mid" not in model.hook_dict:
        return False
    with in_eval_mode(model):
        whole = model.image_features(stream, normalize=False, start_at_layer=last)
        with class_token_alone(model):
            short = model.image_features(stream, normalize=False, start_at_layer=last)
    allowed = _TOLERANCE * float(whole.abs().max())
    return bool(((whole - short).abs() <= allowed).all())
