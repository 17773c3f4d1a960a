"""An independent dense reference in float64, and inputs that are hard for a sparse kernel."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_topk(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_in: Tensor | None, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Dense latents and index sets, by a full stable sort: larger first, then the lower index."""
    pre = (x if b_in is None else x - b_in) @ W_enc + b_enc
    keys = (pre if scale is None else pre * scale).detach()
    order = keys.sort(dim=1, descending=True, stable=True).indices[:, :k]
    kept = torch.zeros_like(keys, dtype=torch.bool).scatter(1, order, True)
    return pre.clamp(min=0) * kept, order.sort(dim=1).values


def dense_batch_topk(pre: Tensor, scale: Tensor | None, total: int) -> Tensor:
    """Dense latents of BatchTopK: the largest of the whole batch, ties to the lower position."""
    keys = (pre if scale is None else pre * scale).detach().clamp(min=0).flatten()
    order = keys.sort(descending=True, stable=True).indices[:total]
    kept = torch.zeros_like(keys, dtype=torch.bool).scatter(0, order, True)
    return pre.clamp(min=0) * kept.view_as(pre)


def inputs(
    batch: int, d_in: int, d_sae: int, *, kind: str = "random", seed: int = 0
) -> dict[str, Tensor]:
    """Float64 encoder and decoder inputs of a kind.

    Kinds: ``random``; ``ties`` (small integers, so many equal pre-activations); ``zeros`` (every
    pre-activation is zero); ``negative`` (every pre-activation is negative); ``skewed`` (a few
    latents are in every row's selection).
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")
        values = values.to(torch.get_default_device())
        return values.round() if kind == "ties" else values

    tensors = {
        "x": draw(batch, d_in),
        "W_enc": draw(d_in, d_sae),
        "b_enc": draw(d_sae),
        "b_in": draw(d_in),
        "W_dec": draw(d_sae, d_in),
        "b_dec": draw(d_in),
    }
    if kind == "zeros":
        tensors["x"] = tensors["b_in"].expand(batch, d_in).clone()
        tensors["b_enc"].zero_()
    if kind == "negative":
        tensors["b_enc"] = tensors["b_enc"].abs() - 1e3
    if kind == "skewed":
        tensors["b_enc"][: max(1, d_sae // 8)] += 1e3
    return tensors


KINDS = ("random", "ties", "zeros", "negative", "skewed")
