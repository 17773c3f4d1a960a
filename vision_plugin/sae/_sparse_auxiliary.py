"""The AuxK loss over the dead latents alone, as SAELens defines it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin import kernels

# Below this many candidates per kept latent the plain products are quicker than gathering.
_DENSE_RATIO = 16


def auxiliary_loss(
    x: Float[Tensor, "batch d_in"],
    residual: Float[Tensor, "... d_out"],
    *,
    wanted: int,
    W_enc: Float[Tensor, "d_in dead"],
    b_enc: Float[Tensor, " dead"],
    W_dec: Float[Tensor, "dead d_write"],
    b_in: Float[Tensor, " d_in"] | None,
    scale: Float[Tensor, " dead"] | None,
) -> Float[Tensor, ""]:
    """How badly the best dead latents reconstruct the residual (Gao et al. 2024, appendix A.2).

    Each row keeps its ``wanted`` largest ``pre * scale`` among the dead latents (all of them
    if there are fewer), without a ReLU. The gradient reaches the encoder, the decoder and b_in.

    Args:
        x: the SAE's input before b_in is subtracted.
        residual: what the living latents leave over, a constant: a row per row of x, in any shape.
        wanted: dead latents to keep, as a rule ``d_in // 2``.
        W_enc: the dead latents' columns.
        b_enc: their biases.
        W_dec: their rows.
        b_in: subtracted from x, if anything is.
        scale: their decoder norms, where the SAE rescales by them.

    Returns:
        The squared error summed over the residual's last axis, its mean over the others, times
        ``min(dead / wanted, 1)``; not yet multiplied by the coefficient.
    """
    n_dead = W_enc.shape[1]
    k = min(wanted, n_dead)
    if n_dead <= _DENSE_RATIO * k:
        centred = x if b_in is None else x - b_in
        pre = centred @ W_enc + b_enc
        if k < n_dead:
            keys = pre if scale is None else pre * scale
            kept = torch.zeros_like(pre, dtype=torch.bool)
            kept.scatter_(1, keys.detach().topk(k, dim=1, sorted=False).indices, True)
            pre = pre.where(kept, 0)
        reconstruction = pre @ W_dec
    else:
        values, indices = kernels.topk_encode(
            x, W_enc, b_enc, k, b_in=b_in, scale=scale, relu=False
        )
        reconstruction = kernels.sparse_decode(values, indices, W_dec)
    error = (reconstruction.view_as(residual) - residual).pow(2).sum(dim=-1).mean()
    return min(n_dead / wanted, 1.0) * error
