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

_ENCODER = "Tensor x, Tensor W_enc, Tensor b_enc, Tensor? b_in, Tensor? scale"
_TAIL = "ScalarType? dtype, str backend"


@torch.library.custom_op(
    "vision_plugin::encode_topk",
    mutates_args=(),
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
        "encode_topk", x.device.type, backend, centred, W_enc, b_enc, scale, k, relu, dtype
    )
    return values.to(_result_dtype(x, W_enc)), indices


@torch.library.custom_op(
    "vision_plugin::encode_batch_topk",
    mutates_args=(),
    schema=f"({_ENCODER}, SymInt total, {_TAIL}) -> (Tensor, Tensor, Tensor)",
)
def encode_batch_topk(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    b_in: Tensor | None,
    scale: Tensor | None,
    total: int,
    dtype: torch.dtype | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, int32 indices and offsets of the batch's largest positive entries."""
    centred = x if b_in is None else x - b_in
    values, indices, offsets = _backends.run(
        "encode_batch_topk", x.device.type, backend, centred, W_enc, b_enc, scale, total, dtype
    )
    return values.to(_result_dtype(x, W_enc)), indices, offsets


@torch.library.custom_op(
    "vision_plugin::encode_threshold",
    mutates_args=(),
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
        "encode_threshold", x.device.type, backend, centred, W_enc, b_enc, threshold, dtype
    )
    return values.to(_result_dtype(x, W_enc)), indices, offsets


@torch.library.custom_op(
    "vision_plugin::gather_sum",
    mutates_args=(),
    schema="(Tensor source, Tensor indices, Tensor offsets, Tensor weights, str backend, "
    "bool trusted=False) -> Tensor",
)
def gather_sum(
    source: Tensor,
    indices: Tensor,
    offsets: Tensor,
    weights: Tensor,
    backend: str,
    trusted: bool = False,
) -> Tensor:
    """Return ``out[s]``, the sum of ``weights[p] * source[indices[p]]`` over segment s.

    Args:
        source, indices, offsets, weights: See `Backend`.
        backend: Name of a backend.
        trusted: Whether indices and offsets are known to be in range. A kernel would read past
            the end of a tensor where they are not.
    """
    if not trusted:
        _check_entries(indices, offsets, weights, source.shape[0])
    result: Tensor = _backends.run(
        "gather_sum", source.device.type, backend, source, indices, offsets, weights
    )
    return result


@torch.library.custom_op(
    "vision_plugin::pair_dot",
    mutates_args=(),
    schema="(Tensor segments, Tensor source, Tensor indices, Tensor offsets, str backend) "
    "-> Tensor",
)
def pair_dot(
    segments: Tensor, source: Tensor, indices: Tensor, offsets: Tensor, backend: str
) -> Tensor:
    """Return ``out[p] = dot(segments[s], source[indices[p]])`` for p in segment s, ``[nnz]``."""
    result: Tensor = _backends.run(
        "pair_dot", source.device.type, backend, segments, source, indices, offsets
    )
    return result


@torch.library.custom_op(
    "vision_plugin::segment_sum",
    mutates_args=(),
    schema="(Tensor values, Tensor offsets, str backend) -> Tensor",
)
def segment_sum(values: Tensor, offsets: Tensor, backend: str) -> Tensor:
    """Return ``out[s] = sum of values[p]`` over segment s, ``[segments]``."""
    result: Tensor = _backends.run("segment_sum", values.device.type, backend, values, offsets)
    return result


@torch.library.custom_op(
    "vision_plugin::transpose",
    mutates_args=(),
    schema="(Tensor indices, Tensor offsets, SymInt n_columns, str backend) "
    "-> (Tensor, Tensor, Tensor)",
)
def transpose(
    indices: Tensor, offsets: Tensor, n_columns: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return row of each entry, its place among the rows' entries, and offsets, by column."""
    rows, order, starts = _backends.run(
        "transpose", indices.device.type, backend, indices, offsets, n_columns
    )
    return rows, order, starts


def _check_entries(indices: Tensor, offsets: Tensor, weights: Tensor, n_rows: int) -> None:
    """Raise where indices are no rows of a matrix of ``n_rows``, or offsets no places of indices.

    On a GPU the check runs after this call and fails there, as torch's own indexing does: to wait
    for it would hold up every step.

    Raises:
        IndexError: a row is out of range.
        ValueError: the tensors do not belong together.
    """
    nnz = indices.numel()
    if weights.numel() != nnz:
        raise ValueError(f"{nnz} indices need as many values, got {weights.numel()}")
    if offsets.numel() == 0:
        raise ValueError("offsets are empty: a batch of no rows has one of them, 0")
    are_places = (offsets[0] == 0) & (offsets[-1] == nnz) & (offsets.diff() >= 0).all()
    lowest, highest = indices.aminmax() if nnz else (offsets[0], offsets[0] - 1)
    are_rows = (lowest >= 0) & (highest < n_rows)
    if indices.device.type == "cuda":
        torch._assert_async(are_places & are_rows, f"latents outside 0 to {n_rows - 1}")
        return
    if not bool(are_rows):
        wrong = int(lowest if int(lowest) < 0 else highest)
        raise IndexError(
            f"latent {wrong} is out of range: W_dec has {n_rows} rows, for latents 0 to "
            f"{n_rows - 1}"
        )
    if not bool(are_places):
        raise ValueError(f"offsets must rise from 0 to {nnz}, the number of values")


def _result_dtype(x: Tensor, W_enc: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, W_enc.dtype)


# ---- shapes and dtypes without data -------------------------------------------------------------


@encode_topk.register_fake
def _(x, W_enc, b_enc, b_in, scale, k, relu, dtype, backend):  # type: ignore[no-untyped-def]
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=_result_dtype(x, W_enc)), x.new_empty(shape, dtype=torch.int32)


def _fake_rows(x: Tensor, W_enc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    nnz = torch.library.get_ctx().new_dynamic_size()
    return (
        x.new_empty(nnz, dtype=_result_dtype(x, W_enc)),
        x.new_empty(nnz, dtype=torch.int32),
        x.new_empty(x.shape[0] + 1, dtype=torch.int32),
    )


@encode_batch_topk.register_fake
def _(x, W_enc, b_enc, b_in, scale, total, dtype, backend):  # type: ignore[no-untyped-def]
    return _fake_rows(x, W_enc)


@encode_threshold.register_fake
def _(x, W_enc, b_enc, b_in, threshold, dtype, backend):  # type: ignore[no-untyped-def]
    return _fake_rows(x, W_enc)


@gather_sum.register_fake
def _(source, indices, offsets, weights, backend, trusted=False):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(source.dtype, weights.dtype)
    return source.new_empty(offsets.shape[0] - 1, source.shape[1], dtype=dtype)


@pair_dot.register_fake
def _(segments, source, indices, offsets, backend):  # type: ignore[no-untyped-def]
    dtype = torch.promote_types(segments.dtype, source.dtype)
    return source.new_empty(indices.shape[0], dtype=dtype)


@segment_sum.register_fake
def _(values, offsets, backend):  # type: ignore[no-untyped-def]
    return values.new_empty(offsets.shape[0] - 1)


@transpose.register_fake
def _(indices, offsets, n_columns, backend):  # type: ignore[no-untyped-def]
    return (
        torch.empty_like(indices),
        torch.empty_like(indices),
        offsets.new_empty(n_columns + 1),
    )


# ---- gradients ----------------------------------------------------------------------------------


def _encoder_gradients(
    ctx: Any, grad: Tensor, indices: Tensor, offsets: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, W_enc, b_enc and b_in from that of the pre-activations.

    Args:
        ctx: Autograd context that `_keep_encoder` filled.
        grad: Gradient of the selected pre-activations with the ReLU's mask applied, ``[nnz]``.
        indices: Latents of the selected pre-activations, ``[nnz]``.
        offsets: Place where each row begins, ``[batch + 1]``.
    """
    x, W_enc, b_enc, b_in = ctx.saved_tensors[:4]
    need_x, need_W, need_b, need_b_in = ctx.needs_input_grad[:4]
    backend = ctx.backend
    grad_x = grad_W = grad_b = grad_b_in = None
    if need_x:
        grad_x = gather_sum(W_enc.t(), indices, offsets, grad, backend, True).to(x.dtype)
    if need_W or need_b or need_b_in:
        rows, order, starts = transpose(indices, offsets, W_enc.shape[1], backend)
        by_latent = grad.index_select(0, order)
        if need_W:
            centred = x if b_in is None else x - b_in
            grad_W = gather_sum(centred, rows, starts, by_latent, backend, True).to(W_enc.dtype).t()
        if need_b or need_b_in:
            total = segment_sum(by_latent, starts, backend)
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
    batch, k = values.shape
    if ctx.relu:
        grad = grad * ~(values <= 0)  # NaN passes, as through torch's own ReLU
    offsets = torch.arange(batch + 1, dtype=torch.int32, device=values.device) * k
    gradients = _encoder_gradients(ctx, grad.reshape(-1), indices.reshape(-1), offsets)
    return *gradients, None, None, None, None, None


def _rows_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _keep_encoder(ctx, inputs, *output[1:])
    ctx.n_inputs = len(inputs)
    ctx.mark_non_differentiable(*output[1:])


def _rows_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    # Only positive entries are ever kept, so the ReLU's mask is all ones here.
    indices, offsets = ctx.saved_tensors[4:]
    gradients = _encoder_gradients(ctx, grad, indices, offsets)
    return *gradients, *[None] * (ctx.n_inputs - 4)


def _gather_sum_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    source, indices, offsets, weights, ctx.backend, _ = inputs
    ctx.save_for_backward(source, indices, offsets, weights)


def _gather_sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    source, indices, offsets, weights = ctx.saved_tensors
    grad_source = grad_weights = None
    if ctx.needs_input_grad[0]:
        rows, order, starts = transpose(indices, offsets, source.shape[0], ctx.backend)
        by_column = weights.index_select(0, order)
        grad_source = gather_sum(grad, rows, starts, by_column, ctx.backend, True).to(source.dtype)
    if ctx.needs_input_grad[3]:
        dots = pair_dot(grad, source, indices, offsets, ctx.backend)
        grad_weights = dots.to(weights.dtype)
    return grad_source, None, None, grad_weights, None, None


encode_topk.register_autograd(_topk_backward, setup_context=_topk_context)
encode_batch_topk.register_autograd(_rows_backward, setup_context=_rows_context)
encode_threshold.register_autograd(_rows_backward, setup_context=_rows_context)
gather_sum.register_autograd(_gather_sum_backward, setup_context=_gather_sum_context)
