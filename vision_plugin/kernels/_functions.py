"""The sparse kernel's public functions: checks and defaults around the operators."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _backends, _operators
from ._calling import call
from ._csr import SparseLatents


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    *,
    b_in: Tensor | None = None,
    scale: Tensor | None = None,
    relu: bool = True,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Encode with a TopK activation, without keeping dense latents (Gao et al. 2024, eq. 4).

    With ``pre = (x - b_in) @ W_enc + b_enc``, each row keeps the k latents with the largest
    ``pre * scale``, ties to the lowest index, and returns ``relu(pre)`` there. A row with fewer
    than k positive pre-activations returns zeros for the rest. Under autocast the matrix product
    runs in autocast's dtype; everything else runs in the dtype of the inputs.

    Args:
        x: Activations, ``[..., d_in]``.
        W_enc: Encoder weights, ``[d_in, d_sae]``. Fastest when ``W_enc.t()`` is contiguous.
        b_enc: Encoder bias, ``[d_sae]``.
        k: Latents per row, from 1 to d_sae.
        b_in: Bias to subtract from x, ``[d_in]``; its gradient costs a matrix-vector product.
        scale: Positive weights on the selection alone, ``[d_sae]`` (the decoder's norms where an
            SAE rescales by them). It takes no gradient: ``relu(pre * n) / n = relu(pre)``.
        relu: Whether to rectify; False returns the selected pre-activations as they are.
        backend: A name from `available`; by default that of `use_backend`, or by device.

    Returns:
        Values ``[..., k]`` and indices ``[..., k]`` (int32), in each row by ascending index.
        Differentiable in x, W_enc, b_enc and b_in.

    Raises:
        ValueError: the shapes do not fit, or k is out of range.
        BackendUnavailableError: the backend that was asked for cannot be used.

    Examples:
        >>> x = torch.tensor([[1.0, 3.0, 2.0]])
        >>> values, indices = vp.kernels.topk_encode(x, torch.eye(3), torch.zeros(3), k=2)
        >>> values, indices
        (tensor([[3., 2.]]), tensor([[1, 2]], dtype=torch.int32))
    """
    _check_encoder(x, W_enc, b_enc, b_in, scale)
    if not 1 <= k <= W_enc.shape[1]:
        raise ValueError(f"k={k} is out of range: W_enc has {W_enc.shape[1]} latents (d_sae)")
    flat = x.reshape(-1, x.shape[-1])
    values, indices = call(
        _operators.encode_topk,
        flat,
        W_enc,
        b_enc,
        b_in,
        _constant(scale),
        k,
        relu,
        _product_dtype(x),
        _name(backend),
    )
    return values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)


def sparse_decode(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Decode ``[..., k]`` latents: ``sum_j values[..., j] * W_dec[indices[..., j]] + b_dec``.

    Args:
        values: Activations, ``[..., k]``.
        indices: Latents, ``[..., k]``, integers from 0 to d_sae - 1 in any order, with repeats.
        W_dec: Decoder weights, ``[d_sae, d_in]``.
        b_dec: Decoder bias, ``[d_in]``, or None.
        backend: Name of a backend, see `topk_encode`.

    Returns:
        ``[..., d_in]``. Differentiable in values, W_dec and b_dec.

    Raises:
        IndexError: an index is no latent.
        ValueError: the shapes do not fit.
        BackendUnavailableError: the backend that was asked for cannot be used.

    Examples:
        >>> values, indices = torch.tensor([[3.0, 2.0]]), torch.tensor([[1, 2]])
        >>> vp.kernels.sparse_decode(values, indices, torch.eye(3), torch.ones(3))
        tensor([[1., 4., 3.]])
    """
    if values.shape != indices.shape or values.ndim == 0:
        raise ValueError(
            f"values and indices need one shape [..., k], got {list(values.shape)} "
            f"and {list(indices.shape)}"
        )
    if W_dec.ndim != 2:
        raise ValueError(f"W_dec must be [d_sae, d_in], got {list(W_dec.shape)}")
    d_in = W_dec.shape[1]
    _check_bias("b_dec", b_dec, d_in)
    _check_mode(values, W_dec)
    shape = values.shape[:-1]
    if len(shape) != 1:
        n_rows = math.prod(shape)  # numel() of the shape would fix a traced batch
        flat = n_rows, values.shape[-1]
        values, indices = values.reshape(flat), indices.reshape(flat)
    if indices.dtype != torch.int32:
        indices = indices.int()
    decoded: Tensor = call(
        _operators.gather_sum, W_dec, indices, None, values, b_dec, _name(backend)
    )
    return decoded if len(shape) == 1 else decoded.view(*shape, d_in)


def batch_topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: float | int,
    *,
    b_in: Tensor | None = None,
    scale: Tensor | None = None,
    padded: bool = False,
    backend: str | None = None,
) -> SparseLatents:
    """Encode with BatchTopK: k latents per row on average (Bussmann et al. 2024).

    The ``int(k * batch)`` largest positive ``pre * scale`` of the whole batch are kept (fewer
    if fewer are positive), ties to the lowest row, then the lowest latent.

    Args:
        x: Activations, ``[batch, d_in]``.
        W_enc, b_enc, b_in, scale, backend: See `topk_encode`.
        k: Average number of latents per row, positive.
        padded: Whether to return exactly ``int(k * batch)`` entries, so that the shapes do not
            depend on the data, as a CUDA graph needs it. Where fewer pre-activations are positive,
            zeros of the last latent of the last row fill up.

    Returns:
        The latents, ``relu(pre)`` for each kept one; differentiable in x, W_enc, b_enc and b_in.

    Raises:
        ValueError: the shapes do not fit, or k is not positive.
        BackendUnavailableError: the backend that was asked for cannot be used.

    Examples:
        >>> x = torch.tensor([[1.0, 3.0], [0.5, 0.2]])
        >>> rows = vp.kernels.batch_topk_encode(x, torch.eye(2), torch.zeros(2), k=1)
        >>> rows.to_dense()
        tensor([[1., 3.],
                [0., 0.]])
    """
    _check_rows(x)
    _check_encoder(x, W_enc, b_enc, b_in, scale)
    if not k > 0:
        raise ValueError(f"k={k} must be positive: the average number of latents per row")
    values, indices, offsets = call(
        _operators.encode_batch_topk,
        x,
        W_enc,
        b_enc,
        b_in,
        _constant(scale),
        torch.sym_int(k * x.shape[0]),
        padded,
        _product_dtype(x),
        _name(backend),
    )
    return SparseLatents(values, indices, offsets, W_enc.shape[1], trusted=True, padded=padded)


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    *,
    b_in: Tensor | None = None,
    backend: str | None = None,
) -> SparseLatents:
    """Encode with JumpReLU's rule: keep ``relu(pre)`` where ``pre > threshold``.

    A threshold of zeros is a plain ReLU. The threshold takes no gradient: this is for inference.

    Args:
        x: Activations, ``[batch, d_in]``.
        W_enc, b_enc, b_in, backend: See `topk_encode`.
        threshold: Threshold of each latent, ``[d_sae]``.

    Returns:
        The latents; differentiable in x, W_enc, b_enc and b_in.

    Raises:
        ValueError: the shapes do not fit.
        BackendUnavailableError: the backend that was asked for cannot be used.

    Examples:
        >>> x = torch.tensor([[1.0, 3.0]])
        >>> rows = vp.kernels.threshold_encode(
        ...     x, torch.eye(2), torch.zeros(2), torch.tensor([2.0, 2.0])
        ... )
        >>> rows.to_dense()
        tensor([[0., 3.]])
    """
    _check_rows(x)
    _check_encoder(x, W_enc, b_enc, b_in, None)
    if threshold.shape != b_enc.shape:
        raise ValueError(
            f"threshold must have shape {list(b_enc.shape)}, one per latent, "
            f"got {list(threshold.shape)}"
        )
    values, indices, offsets = call(
        _operators.encode_threshold,
        x,
        W_enc,
        b_enc,
        b_in,
        threshold.detach(),
        _product_dtype(x),
        _name(backend),
    )
    return SparseLatents(values, indices, offsets, W_enc.shape[1], trusted=True)


def csr_decode(
    latents: SparseLatents,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Decode latents in compressed-row form: ``latents @ W_dec + b_dec``.

    Args:
        latents: Latents in compressed rows, ``[batch, d_sae]``.
        W_dec: Decoder weights, ``[d_sae, d_in]``.
        b_dec: Decoder bias, ``[d_in]``, or None.
        backend: Name of a backend, see `topk_encode`.

    Returns:
        ``[batch, d_in]``. Differentiable in the latents' values, W_dec and b_dec.

    Raises:
        IndexError: an index is no latent.
        ValueError: the shapes do not fit.
        BackendUnavailableError: the backend that was asked for cannot be used.

    Examples:
        >>> x = torch.tensor([[1.0, 3.0], [0.5, 0.2]])
        >>> rows = vp.kernels.batch_topk_encode(x, torch.eye(2), torch.zeros(2), k=1)
        >>> vp.kernels.csr_decode(rows, torch.eye(2))
        tensor([[1., 3.],
                [0., 0.]])
    """
    if W_dec.ndim != 2 or W_dec.shape[0] != latents.d_sae:
        raise ValueError(
            f"W_dec must be [d_sae, d_in] with d_sae={latents.d_sae}, got {list(W_dec.shape)}"
        )
    _check_bias("b_dec", b_dec, W_dec.shape[1])
    _check_mode(latents.values, W_dec)
    values, indices, offsets = latents.segments()
    decoded: Tensor = call(
        _operators.gather_sum,
        W_dec,
        indices,
        offsets,
        values,
        b_dec,
        _name(backend),
        latents.trusted,
    )
    return decoded


def matryoshka_decode(
    latents: SparseLatents,
    W_dec: Tensor,
    b_dec: Tensor | None,
    widths: Sequence[int],
    *,
    backend: str | None = None,
) -> Tensor:
    """Decode with nested prefixes of the dictionary (Bussmann et al. 2025, eq. 4).

    Args:
        latents: Latents in compressed rows, ``[batch, d_sae]``, ascending within a row.
        W_dec: Decoder weights, ``[d_sae, d_in]``.
        b_dec: Decoder bias, ``[d_in]``, or None.
        widths: Numbers of latents, strictly increasing; the last one is d_sae.
        backend: Name of a backend, see `topk_encode`.

    Returns:
        ``[len(widths), batch, d_in]``: level l is the reconstruction from the first ``widths[l]``
        latents. Differentiable in the latents' values, W_dec and b_dec.

    Raises:
        ValueError: the shapes do not fit, or widths do not increase to d_sae.
        BackendUnavailableError: the backend that was asked for cannot be used.

    Examples:
        >>> rows = vp.kernels.batch_topk_encode(torch.ones(1, 2), torch.eye(2), torch.zeros(2), k=2)
        >>> vp.kernels.matryoshka_decode(rows, torch.eye(2), None, widths=[1, 2])
        tensor([[[1., 0.]],
        <BLANKLINE>
                [[1., 1.]]])
    """
    if not widths or list(widths) != sorted(set(widths)) or widths[-1] != latents.d_sae:
        raise ValueError(
            f"widths must increase strictly and end at d_sae={latents.d_sae}, got {list(widths)}"
        )
    if W_dec.ndim != 2 or W_dec.shape[0] != latents.d_sae:
        raise ValueError(
            f"W_dec must be [d_sae, d_in] with d_sae={latents.d_sae}, got {list(W_dec.shape)}"
        )
    _check_bias("b_dec", b_dec, W_dec.shape[1])
    _check_mode(latents.values, W_dec, b_dec)
    n_levels = len(widths)
    # Rows hold ascending latents, so the entries of one (row, level) are neighbours already:
    # only the offsets need to be finer. No tensor is made from the widths: a copy to the device
    # would wait for it.
    segment = latents.rows() * n_levels
    for width in widths[:-1]:
        segment += latents.indices >= width
    edges = torch.arange(latents.batch * n_levels + 1, device=segment.device)
    offsets = torch.searchsorted(segment, edges, out_int32=True)
    levels: Tensor = call(
        _operators.level_sums,
        W_dec,
        latents.indices,
        offsets,
        latents.values,
        b_dec,
        n_levels,
        _name(backend),
        latents.trusted,
    )
    return levels


def _name(backend: str | None) -> str:
    return backend if backend is not None else _backends.requested()


def _constant(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.detach()


def _product_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype of the encoder's matrix product under autocast, else None."""
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(x.device.type)


def _check_rows(x: Tensor) -> None:
    if x.ndim != 2:
        raise ValueError(f"x must be [batch, d_in], got {list(x.shape)}; flatten it first")


def _check_encoder(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_in: Tensor | None, scale: Tensor | None
) -> None:
    if x.ndim == 0 or W_enc.ndim != 2 or x.shape[-1] != W_enc.shape[0]:
        raise ValueError(
            f"x [..., d_in] and W_enc [d_in, d_sae] do not fit: {list(x.shape)} "
            f"and {list(W_enc.shape)}"
        )
    _check_bias("b_enc", b_enc, W_enc.shape[1])
    _check_bias("b_in", b_in, W_enc.shape[0])
    _check_bias("scale", scale, W_enc.shape[1])
    _check_mode(x, W_enc, b_enc, b_in, scale)


def _check_mode(*inputs: Tensor | None) -> None:
    """Raise in forward-mode differentiation, in which these operators would pass on zeros."""
    if forward_ad._current_level < 0:
        return
    for tensor in inputs:
        if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                "the sparse kernel has no forward-mode derivatives (jvp, jacfwd, dual numbers): "
                "use reverse mode (backward, vjp, jacrev), or a dense encoder and decoder"
            )


def _check_bias(name: str, bias: Tensor | None, size: int) -> None:
    if bias is not None and bias.shape != (size,):
        raise ValueError(f"{name} must have shape [{size}], got {list(bias.shape)}")
