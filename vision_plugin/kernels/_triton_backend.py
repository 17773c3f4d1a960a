"""The Triton backend: CUDA, and the CPU inside Triton's interpreter (for tests).

Selection, decoding and both weight gradients are kernels. cuBLAS computes the encoder's product,
unless the tiled product of `_triton_encoder` is asked for. JumpReLU's selection, the sort and the
bias sums remain torch operators.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from ._select import topk_rows
from ._torch_backend import TorchBackend, finish, row_chunks, selection_keys
from ._triton_encoder import (
    choose_again,
    choose_in_batch,
    choose_in_rows,
    fits,
    interpreting,
    make_product,
    power_of_two,
)

# Longer segments are summed in parts, which are then added in a fixed order.
SPLIT = 256
_KINDS = (torch.float32, torch.float16, torch.bfloat16)


class TritonBackend(TorchBackend):
    """The primitives of `Backend` as Triton kernels; the reference does the rest."""

    name = "triton"

    def unusable(self, device_type: str) -> str | None:
        """Return why Triton cannot run on this device, or None when it can."""
        if find_spec("triton") is None:
            return "Triton is not installed; install it with: pip install triton"
        if interpreting():
            return None if device_type in ("cpu", "cuda") else f"Triton has no {device_type} target"
        if device_type != "cuda":
            return (
                f"Triton compiles for CUDA and not for {device_type}; set TRITON_INTERPRET=1 "
                "before the first import to run its kernels in the interpreter"
            )
        if not torch.cuda.is_available():
            return "torch finds no CUDA device"
        major, minor = torch.cuda.get_device_capability()
        if major < 7:
            return f"compute capability {major}.{minor} is below the 7.0 that Triton needs"
        return None

    def _select_rows(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        scale: Tensor | None,
        k: int,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        if not fits(x.shape[0], W_enc.shape[1], k) or x.dtype not in _KINDS:
            return topk_rows(selection_keys(x, W_enc, b_enc, scale, dtype), k)
        return choose_in_rows(make_product(x, W_enc, b_enc, scale, dtype), k)

    def encode_batch_topk(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        scale: Tensor | None,
        total: int,
        padded: bool,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the largest positive entries of the batch; see `Backend`."""
        batch, d_sae = x.shape[0], W_enc.shape[1]
        if x.dtype not in _KINDS or batch == 0 or total == 0:
            return super().encode_batch_topk(x, W_enc, b_enc, scale, total, padded, dtype)
        parts, start = [], 0
        for part in row_chunks(x, d_sae):
            product = make_product(part, W_enc, b_enc, scale, dtype)
            keys, rows, columns = choose_in_batch(product, total)
            parts.append((keys, rows + start, columns))
            start += part.shape[0]
        keys, rows, columns = parts[0]
        if len(parts) > 1:  # each chunk gave its own largest: choose among them
            keys, rows, columns = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
            last = (batch - 1, d_sae - 1)
            keys, rows, columns = choose_again(keys, rows, columns, total, last)
        if not padded:
            n_positive = int((keys != 0).sum())
            keys, rows, columns = (t[:n_positive] for t in (keys, rows, columns))
        edges = torch.arange(batch + 1, dtype=torch.int32, device=x.device)
        offsets = torch.searchsorted(rows.contiguous(), edges, out_int32=True)
        return finish(keys, columns, scale, relu=True), columns.contiguous(), offsets

    def gather_sum(
        self,
        source: Tensor,
        indices: Tensor,
        offsets: Tensor | None,
        weights: Tensor,
        bias: Tensor | None,
        check: bool,
    ) -> Tensor:
        """Return weighted sums of gathered rows; see `Backend`."""
        dtype = torch.promote_types(source.dtype, weights.dtype)
        if dtype not in _KINDS or indices.numel() == 0 or source.shape[1] == 0:
            return super().gather_sum(source, indices, offsets, weights, bias, check)
        source = _rows_contiguous(source)
        if offsets is None:
            return _row_sums(source, indices, weights, bias, dtype, check)
        sums = _gather_sum(source, indices, offsets, weights, dtype)
        return sums if bias is None else sums.add_(bias)

    def level_sums(
        self,
        source: Tensor,
        indices: Tensor,
        offsets: Tensor,
        weights: Tensor,
        bias: Tensor | None,
        n_levels: int,
    ) -> Tensor:
        """Return the running sums over the segments of each row; see `Backend`."""
        from . import _triton_kernels as triton_kernels

        dtype = torch.promote_types(source.dtype, weights.dtype)
        if dtype not in _KINDS or indices.numel() == 0:
            return super().level_sums(source, indices, offsets, weights, bias, n_levels)
        source = _rows_contiguous(source)
        n_rows, d = (offsets.numel() - 1) // n_levels, source.shape[1]
        out = torch.empty(n_levels, n_rows, d, dtype=dtype, device=source.device)
        block = _block_of(d)
        triton_kernels.level_sums[(n_rows, -(-d // block))](
            source, indices, offsets, weights, source if bias is None else bias, out, n_rows,
            n_levels, d, source.stride(0), BLOCK_D=block, HAS_BIAS=bias is not None, num_warps=2,
        )  # fmt: skip
        return out

    def pair_dot(
        self, segments: Tensor, source: Tensor, indices: Tensor, offsets: Tensor | None
    ) -> Tensor:
        """Return dot products of each segment's row with the rows it gathers; see `Backend`."""
        from ._triton_kernels import pair_dots

        dtype = torch.promote_types(segments.dtype, source.dtype)
        nnz = indices.numel()
        if dtype not in _KINDS or nnz == 0:
            return super().pair_dot(segments, source, indices, offsets)
        segments, source = _rows_contiguous(segments), _rows_contiguous(source)
        indices = indices.contiguous()
        row, k = indices, 1
        if offsets is None:
            k = indices.shape[1]
        else:
            row = torch.arange(offsets.numel() - 1, dtype=torch.int32, device=offsets.device)
            row = row.repeat_interleave(offsets.diff(), output_size=nnz)
        out = torch.empty(nnz, dtype=torch.float32, device=source.device)
        pairs = 16
        pair_dots[(-(-nnz // pairs),)](
            segments, source, indices, row, out, nnz, k, source.shape[1], segments.stride(0),
            source.stride(0), PAIRS=pairs, BLOCK_D=128, UNIFORM=offsets is None, num_warps=4,
        )  # fmt: skip
        return out.to(dtype).view(indices.shape)


def _row_sums(
    source: Tensor,
    indices: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    check: bool,
) -> Tensor:
    """Return sums of k gathered rows each, in one launch."""
    from . import _triton_kernels as triton_kernels

    (n_rows, k), d = indices.shape, source.shape[1]
    out = torch.empty(n_rows, d, dtype=dtype, device=source.device)
    block = _block_of(d)
    triton_kernels.row_sums[(n_rows, -(-d // block))](
        source, indices.contiguous(), weights.contiguous(), source if bias is None else bias, out,
        source.shape[0], k, d, source.stride(0), BLOCK_D=block, HAS_BIAS=bias is not None,
        CHECK=check, num_warps=2,
        # The check is an assertion of the device, which only a debug build has.
        debug=check, sanitize_overflow=False,
    )  # fmt: skip
    return out


def _gather_sum(
    source: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor, dtype: torch.dtype
) -> Tensor:
    from . import _triton_kernels as triton_kernels

    n_segments, d, nnz = offsets.numel() - 1, source.shape[1], indices.numel()
    out = torch.empty(n_segments, d, dtype=dtype, device=source.device)
    block = _block_of(d)
    blocks = -(-d // block)
    first_part, partial = offsets, out  # not read unless a segment can be long
    any_long = nnz > SPLIT
    if any_long:
        lengths = offsets.diff()
        parts = torch.where(lengths > SPLIT, (lengths + SPLIT - 1) // SPLIT, 0)
        first_part = torch.zeros_like(offsets)
        torch.cumsum(parts, 0, dtype=torch.int32, out=first_part[1:])
        # Each long segment wastes less than one part, so a bound needs no look at the data.
        most_parts = 2 * (nnz // SPLIT) + 1
        partial = torch.empty(most_parts, d, dtype=torch.float32, device=source.device)
        triton_kernels.long_segments[(most_parts, blocks)](
            source, indices, offsets, weights, first_part, partial, n_segments, d,
            source.stride(0), SPLIT=SPLIT, BLOCK_D=block,
            DEPTH=max(1, n_segments.bit_length() + 1), num_warps=4,
        )  # fmt: skip
    triton_kernels.short_segments[(n_segments, blocks)](
        source, indices, offsets, weights, first_part, partial, out, d, source.stride(0),
        SPLIT=SPLIT, BLOCK_D=block, ANY_LONG=any_long, num_warps=2,
    )  # fmt: skip
    return out


def _rows_contiguous(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _block_of(d: int) -> int:
    return min(256, power_of_two(d))


BACKEND = TritonBackend()

__all__ = ["BACKEND", "TritonBackend"]
