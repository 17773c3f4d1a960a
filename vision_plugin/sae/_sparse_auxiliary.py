"""The AuxK loss as SAELens defines it, computed on the dead latents only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vision_plugin import kernels
from vision_plugin.kernels import SparseLatents

# With fewer dead latents per kept latent than this, dense products are faster than gathering.
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
    alive: Bool[Tensor, " dead"] | None = None,
) -> Float[Tensor, ""]:
    """Return the error of the dead latents on the residual (Gao et al. 2024, appendix A.2).

    For each row, the ``wanted`` dead latents with the largest ``pre * scale`` (all of them if there
    are fewer) reconstruct the residual, without a ReLU. The gradient reaches the encoder, the
    decoder and ``b_in``.

    Args:
        x: Input of the SAE, before ``b_in`` is subtracted.
        residual: Error of the other latents, a row for each row of ``x``; it gets no gradient.
        wanted: Number of dead latents to use for a row, as a rule ``d_in // 2``.
        W_enc: Encoder columns of the dead latents.
        b_enc: Encoder biases of the dead latents.
        W_dec: Decoder rows of the dead latents.
        b_in: Bias to subtract from ``x``; None subtracts nothing.
        scale: Decoder norms of the dead latents if the SAE rescales by them, otherwise None.
        alive: Latents that only fill up a fixed number of places and take no part; None if all are
            dead.

    Returns:
        The squared error, summed over the residual's last axis and averaged over the others, times
        ``min(dead / wanted, 1)``; the caller multiplies it by the coefficient.
    """
    n_dead = W_enc.shape[1]
    k = min(wanted, n_dead)
    if alive is not None:  # minus infinity is chosen last
        b_enc = b_enc.masked_fill(alive, -torch.inf)
    if n_dead <= _DENSE_RATIO * k:
        centred = x if b_in is None else x - b_in
        pre = centred @ W_enc + b_enc
        if k < n_dead:
            keys = pre if scale is None else pre * scale
            kept = torch.zeros_like(pre, dtype=torch.bool)
            kept.scatter_(1, keys.detach().topk(k, dim=1, sorted=False).indices, True)
            pre = pre.where(kept, 0)
        if alive is not None:
            pre = pre.masked_fill(alive, 0)
        reconstruction = pre @ W_dec
    else:
        values, indices = kernels.topk_encode(
            x, W_enc, b_enc, k, b_in=b_in, scale=scale, relu=False
        )
        if alive is not None:
            values = values.masked_fill(alive[indices.long()], 0)
        latents = SparseLatents.from_topk(values, indices, d_sae=n_dead, trusted=True)
        reconstruction = kernels.csr_decode(latents, W_dec)
    error = (reconstruction.view_as(residual) - residual).pow(2).sum(dim=-1).mean()
    if alive is None:
        return min(n_dead / wanted, 1.0) * error
    return ((n_dead - alive.sum()) / wanted).clamp(max=1.0) * error


def padded_places(
    dead: Bool[Tensor, " width"], room: int
) -> tuple[Int[Tensor, " room"], Bool[Tensor, " room"]]:
    """Return places of dead latents in a fixed number of rows, and which rows only fill up.

    Args:
        dead: Latents that are dead.
        room: Number of rows; at least as many as are dead.
    """
    rank = dead.cumsum(0)
    row = torch.arange(1, room + 1, device=dead.device)
    places = torch.searchsorted(rank, row).clamp(max=len(dead) - 1)
    return places, row > rank[-1]


@dataclass(frozen=True)
class DeadLatents:
    """Dead latents that learn the error of one reconstruction.

    Attributes:
        width: Number of latents that the reconstruction is made of.
        places: The dead latents.
        alive: Those that only fill up a fixed number of places; None if all are dead.
    """

    width: int
    places: Int[Tensor, " dead"]
    alive: Bool[Tensor, " dead"] | None


def share_gradients(
    W_enc: Float[Tensor, "d_in d_sae"],
    W_dec: Float[Tensor, "d_sae d_out"],
    dead: Sequence[DeadLatents],
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Let the rows of dead latents add to the gradients that the whole weights get anyway.

    The gradient of rows that are gathered from a matrix is zeros of the matrix's size, with some
    rows filled in. Here no such matrix is made: the rows' gradient is added in place to that of the
    matrix which this function returns.

    Args:
        W_enc: Encoder weights.
        W_dec: Decoder weights.
        dead: Dead latents whose rows will be gathered, by `rows_of`.

    Returns:
        Both weights, to be used in place of those given; and for the rows of each of ``dead``, in
        the encoder and in the decoder, the zeros that `rows_of` asks for.
    """
    if not dead:
        return W_enc, W_dec, []
    by_latent, zeros = W_enc.t(), []
    for latents in dead:
        by_latent, of_encoder = _SharedGradient.apply(by_latent, latents.places)
        W_dec, of_decoder = _SharedGradient.apply(W_dec, latents.places)
        zeros.append((of_encoder, of_decoder))
    return by_latent.t(), W_dec, zeros


def rows_of(
    weights: Float[Tensor, "d_sae width"],
    places: Int[Tensor, " dead"],
    zeros: Float[Tensor, "dead width"],
) -> Float[Tensor, "dead width"]:
    """Return some rows of a matrix, whose gradient goes where that of ``zeros`` does."""
    return weights.detach().index_select(0, places).add_(zeros)


class _SharedGradient(torch.autograd.Function):
    """A matrix as it is, and zeros whose gradient is added to some rows of the matrix's own."""

    @staticmethod
    def forward(weights: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        # One number in memory. The rows are gathered later, when the encoder's product is gone.
        zeros = weights.new_zeros(()).expand(len(places), weights.shape[1])
        return weights.view_as(weights), zeros

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_rows: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return grad.index_add(0, places, grad_rows), None
        # The kernels' operators have just made this gradient, and nothing else reads it.
        return grad.index_add_(0, places, grad_rows), None
