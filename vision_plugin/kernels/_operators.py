"""The sparse kernel as ``torch.library`` operators, with their fake and autograd registrations.

Every operator takes the name of a backend last and works on 2-D tensors; `_functions` is the
public face. The backward pass uses the same primitives as the forward pass, on compressed rows (by
batch row) or, after one stable sort, on compressed columns (by latent). Each latent's gradient
therefore has one owner that adds in a fixed order: no atomics, and no dense ``[batch, d_sae]``
gradient.
"""

# torch.library reads the schemas below and not the annotations.
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _backends
from ._calling import call, operator
from ._entries import check_entries

_ENCODER = "Tensor x, Tensor W_enc, Tensor b_enc, Tensor? b_in, Tensor? scale"
_TAIL = "ScalarType? dtype, str backend"


@operator(
    "vision_plugin::encode_topk",
    schema=f"({_ENCODER}, SymInt k, bool relu, {_TAIL}) -> (Tensor, Tensor)",
)
def encode_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_in: Tensor | None,
    scale: Tensor | None,
    k: int,
    relu: bool,
    dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return values and int32 indices ``[batch, k]`` of each row's top k."""
    centred = x if b_in is None else x - b_in
    values, indices = _backends.run(
        "encode_topk", x, backend, centred, W_enc, b_enc, scale, k, relu, dtype
    )
    return values.to(_result_dtype(x, W_enc)), indices


@operator(
    "vision_plugin::encode_batch_topk",
    schema=f"({_ENCODER}, SymInt total, bool padded, {_TAIL}) -> (Tensor, Tensor, Tensor)",
)
def encode_batch_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_in: Tensor | None,
    scale: Tensor | None,
    total: int,
    padded: bool,
    dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, int32 indices and offsets of the batch's largest positive entries."""
    centred = x if b_in is None else x - b_in
    arguments = (centred, W_enc, b_enc, scale, total, padded, dtype)
    values, indices, offsets = _backends.run("encode_batch_topk", x, backend, *arguments)
    return values.to(_result_dtype(x, W_enc)), indices, offsets


@operator(
    "vision_plugin::encode_threshold",
    schema="(Tensor x, Tensor W_enc, Tensor b_enc, Tensor? b_in, Tensor threshold, "
    f"{_TAIL}) -> (Tensor, Tensor, Tensor)",
)
def encode_threshold(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_in: Tensor | None,
    threshold: Tensor,
    dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, int32 indices and offsets of the positive entries above their threshold."""
    centred = x if b_in is None else x - b_in
    values, indices, offsets = _backends.run(
        "encode_threshold", x, backend, centred, W_enc, b_enc, threshold, dtype
    )
    return values.to(_result_dtype(x, W_enc)), indices, offsets


@operator(
    "vision_plugin::gather_sum",
    schema="(Tensor source, Tensor indices, Tensor? offsets, Tensor weights, Tensor? bias, "
    "str backend, bool trusted=False) -> Tensor",
)
def gather_sum(
    source: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    weights: Tensor,
    bias: Tensor | None,
    backend: str,
    trusted: bool = False,
) -> Tensor:
    """Return ``out[s]``, the sum of ``weights[p] * source[indices[p]]`` over segment s, plus bias.

    Args:
        source, indices, offsets, weights, bias: See `Backend`.
        backend: Name of a backend.
        trusted: Whether indices and offsets are known to be in range. A kernel would read past
            the end of a tensor where they are not.
    """
    if not trusted:
        check_entries(indices, offsets, weights, source.shape[0])
    arguments = (source, indices, offsets, weights, bias, not trusted)
    result: Tensor = _backends.run("gather_sum", source, backend, *arguments)
    return result


@operator(
    "vision_plugin::level_sums",
    schema="(Tensor source, Tensor indices, Tensor offsets, Tensor weights, Tensor? bias, "
    "SymInt n_levels, str backend, bool trusted=False) -> Tensor",
)
def level_sums(
    source: Tensor,
    indices: Tensor,
    offsets: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    n_levels: int,
    backend: str,
    trusted: bool = False,
) -> Tensor:
    """Return ``out[l, r]``: the sums over the first ``l + 1`` segments of row r, plus bias."""
    if not trusted:
        check_entries(indices, offsets, weights, source.shape[0])
    arguments = (source, indices, offsets, weights, bias, n_levels)
    result: Tensor = _backends.run("level_sums", source, backend, *arguments)
    return result


@operator(
    "vision_plugin::pair_dot",
    schema="(Tensor segments, Tensor source, Tensor indices, Tensor? offsets, str backend) "
    "-> Tensor",
)
def pair_dot(
    segments: Tensor, source: Tensor, indices: Tensor, offsets: Tensor | None, backend: str
) -> Tensor:
    """Return ``out[p] = dot(segments[s], source[indices[p]])`` for p in segment s."""
    result: Tensor = _backends.run("pair_dot", source, backend, segments, source, indices, offsets)
    return result


@operator(
    "vision_plugin::segment_sum",
    schema="(Tensor values, Tensor offsets, str backend) -> Tensor",
)
def segment_sum(values: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """Return ``out[s] = sum of values[p]`` over segment s, ``[segments]``."""
    result: Tensor = _backends.run("segment_sum", values, backend, values, offsets)
    return result


@operator(
    "vision_plugin::transpose",
    schema="(Tensor indices, Tensor? offsets, SymInt n_columns, str backend) "
    "-> (Tensor, Tensor, Tensor)",
)
def transpose(
    indices: Tensor, offsets: Tensor | None, n_columns: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return row of each entry, its place among the rows' entries, and offsets, by column."""
    rows, order, starts = _backends.run("transpose", indices, backend, indices, offsets, n_columns)
    return rows, order, starts


def _result_dtype(x: Tensor, W_enc: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, W_enc.dtype)


# ---- shapes and dtypes without data -------------------------------------------------------------


@encode_topk.register_fake
def _(x, W_enc, b_enc, b_in, scale, k, relu, dtype, backend):  # type: ignore[no-untyped-def]
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=_result_dtype(x, W_enc)), x.new_empty(shape, dtype=torch.int32)


def _fake_rows(
    x: Tensor, W_enc: Tensor, nnz: int | torch.SymInt | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    if nnz is None:
        nnz = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty(nnz, dtype=_result_dtype(x, W_enc)),
        x.new_empty(nnz, dtype=torch.int32),
        x.new_empty(x.shape[0] + 1, dtype=torch.int32),
    )


@encode_batch_topk.register_fake
def _(x, W_enc, b_enc, b_in, scale, total, padded, dtype, backend):  # type: ignore[no-untyped-def]
    return _fake_rows(x, W_enc, total if padded else None)


@encode_threshold.register_fake
def _(x, W_enc, b_enc, b_in, threshold, dtype, backend):  # type: ignore[no-untyped-def]
    return _fake_rows(x, W_enc)


@gather_sum.register_fake
def _(source, indices, offsets, weights, bias, backend, trusted=False):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(source.dtype, weights.dtype)
    n_rows = indices.shape[0] if offsets is None else offsets.shape[0] - 1
    return source.new_empty(n_rows, source.shape[1], dtype=dtype)


@level_sums.register_fake
def _(source, indices, offsets, weights, bias, n_levels, backend, trusted=False):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(source.dtype, weights.dtype)
    n_rows = (offsets.shape[0] - 1) // n_levels
    return source.new_empty(n_levels, n_rows, source.shape[1], dtype=dtype)


@pair_dot.register_fake
def _(segments, source, indices, offsets, backend):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(segments.dtype, source.dtype)
    return source.new_empty(indices.shape, dtype=dtype)


@segment_sum.register_fake
def _(values, offsets, backend):  # type: ignore[no-untyped-def]
    return values.new_empty(offsets.shape[0] - 1)


@transpose.register_fake
def _(indices, offsets, n_columns, backend):  # type: ignore[no-untyped-def]
    nnz = indices.numel()
    return (
        indices.new_empty(nnz),
        indices.new_empty(nnz),
        indices.new_empty(n_columns + 1),
    )


# ---- gradients ----------------------------------------------------------------------------------


def _encoder_gradients(
    ctx: Any, grad: Tensor, indices: Tensor, offsets: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, W_enc, b_enc and b_in from that of the pre-activations.

    Args:
        ctx: Autograd context that `_keep_encoder` filled.
        grad: Gradient of the selected pre-activations with the ReLU's mask applied.
        indices: Latents of the selected pre-activations, ``[nnz]`` or ``[batch, k]``.
        offsets: Place where each row begins, ``[batch + 1]``; None for ``[batch, k]``.
    """
    x, W_enc, b_enc, b_in = ctx.saved_tensors[:4]
    need_x, need_W, need_b, need_b_in = ctx.needs_input_grad[:4]
    backend = ctx.backend
    grad_x = grad_W = grad_b = grad_b_in = None
    if need_x:
        grad_x = call(gather_sum, W_enc.t(), indices, offsets, grad, None, backend, True)
        grad_x = grad_x.to(x.dtype)
    if need_W or need_b or need_b_in:
        rows, order, starts = call(transpose, indices, offsets, W_enc.shape[1], backend)
        by_latent = grad.reshape(-1).index_select(0, order)
        if need_W:
            centred = x if b_in is None else x - b_in
            grad_W = call(gather_sum, centred, rows, starts, by_latent, None, backend, True)
            grad_W = grad_W.to(W_enc.dtype).t()
        if need_b or need_b_in:
            total = call(segment_sum, by_latent, starts, backend)
            grad_b = total.to(b_enc.dtype) if need_b else None
            if need_b_in:
                # Summed over the batch, the gradient through x - b_in is one matrix-vector product.
                grad_b_in = -(W_enc @ total.to(W_enc.dtype)).to(b_in.dtype)
    return grad_x, grad_W, grad_b, grad_b_in


def _keep_encoder(ctx: Any, inputs: tuple[Any, ...], *outputs: Tensor) -> None:
    x, W_enc, b_enc, b_in = inputs[:4]
    ctx.save_for_backward(x, W_enc, b_enc, b_in, *outputs)
    ctx.backend = inputs[-1]


def _topk_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.relu = inputs[6]
    _keep_encoder(ctx, inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _topk_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    values, indices = ctx.saved_tensors[4:]
    if ctx.relu:
        grad = grad * ~(values <= 0)  # NaN passes, as through torch's own ReLU
    gradients = _encoder_gradients(ctx, grad, indices, None)
    return *gradients, None, None, None, None, None


def _rows_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _keep_encoder(ctx, inputs, *output)
    ctx.n_inputs, ctx.padded = len(inputs), len(inputs) == 9 and inputs[6]
    ctx.mark_non_differentiable(*output[1:])


def _rows_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    values, indices, offsets = ctx.saved_tensors[4:]
    if ctx.padded:  # only positive entries are kept, so the ReLU's mask is that of the padding
        grad = grad * (values != 0)
    gradients = _encoder_gradients(ctx, grad, indices, offsets)
    return *gradients, *[None] * (ctx.n_inputs - 4)


def _gather_sum_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    source, indices, offsets, weights, bias, ctx.backend, _ = inputs
    ctx.save_for_backward(source, indices, offsets, weights, bias)


def _gather_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    source, indices, offsets, weights, bias = ctx.saved_tensors
    need = ctx.needs_input_grad
    gradients = _sum_gradients(ctx.backend, grad, source, indices, offsets, weights, need)
    grad_bias = grad.sum(0).to(bias.dtype) if need[4] else None
    return gradients[0], None, None, gradients[1], grad_bias, None, None


def _level_sums_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    source, indices, offsets, weights, bias, ctx.n_levels, ctx.backend, _ = inputs
    ctx.save_for_backward(source, indices, offsets, weights, bias)


def _level_sums_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    source, indices, offsets, weights, bias = ctx.saved_tensors
    need = ctx.needs_input_grad
    # A segment is part of its own level and of all later ones.
    later = [grad[-1]]
    for level in range(ctx.n_levels - 2, -1, -1):
        later.append(later[-1] + grad[level])
    by_segment = torch.stack(later[::-1], dim=1).flatten(0, 1)
    gradients = _sum_gradients(ctx.backend, by_segment, source, indices, offsets, weights, need)
    grad_bias = grad.sum((0, 1)).to(bias.dtype) if need[4] else None
    return gradients[0], None, None, gradients[1], grad_bias, None, None, None


def _sum_gradients(
    backend: str,
    grad: Tensor,
    source: Tensor,
    indices: Tensor,
    offsets: Tensor | None,
    weights: Tensor,
    need: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of source and weights from those of the segments' sums."""
    grad_source = grad_weights = None
    if need[0]:
        rows, order, starts = call(transpose, indices, offsets, source.shape[0], backend)
        by_column = weights.reshape(-1).index_select(0, order)
        grad_source = call(gather_sum, grad, rows, starts, by_column, None, backend, True)
        grad_source = grad_source.to(source.dtype)
    if need[3]:
        grad_weights = call(pair_dot, grad, source, indices, offsets, backend).to(weights.dtype)
    return grad_source, grad_weights


encode_topk.register_autograd(_topk_backward, setup_context=_topk_context)
encode_batch_topk.register_autograd(_rows_backward, setup_context=_rows_context)
encode_threshold.register_autograd(_rows_backward, setup_context=_rows_context)
gather_sum.register_autograd(_gather_sum_backward, setup_context=_gather_sum_context)
level_sums.register_autograd(_level_sums_backward, setup_context=_level_sums_context)
