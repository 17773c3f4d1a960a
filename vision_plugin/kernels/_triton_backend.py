"""The Triton backend: CUDA, and the CPU inside Triton's interpreter (for tests).

cuBLAS computes the encoder's product; selection, decoding and both weight gradients are kernels.
BatchTopK's and JumpReLU's selections, the sort and the bias sums remain torch operators.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ._select import topk_rows
from ._torch_backend import TorchBackend, selection_keys

TILE = 32
# Longer segments are summed in parts, which are then added in a fixed order.
SPLIT = 256
# One program keeps at most this many keys in registers; torch does wider selections.
MAX_LANES = 8192
_KINDS = (torch.float32, torch.float16, torch.bfloat16)


class TritonBackend(TorchBackend):
    """The primitives of `Backend` as Triton kernels; the reference does the rest."""

    name = "triton"

    def unusable(self, device_type: str) -> str | None:
        """Return why Triton cannot run on this device, or None when it can."""
        if find_spec("triton") is None:
            return "Triton is not installed; install it with: pip install triton"
        if os.environ.get("TRITON_INTERPRET", "0") == "1":
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
        n = W_enc.shape[1]
        n_tiles = -(-n // TILE)
        use_tiles = n > MAX_LANES or k * TILE * 2 <= n
        lanes = _power_of_two(k * TILE if use_tiles else n)
        too_wide = lanes > MAX_LANES or (use_tiles and _power_of_two(n_tiles) > MAX_LANES)
        if too_wide or x.dtype not in _KINDS or x.shape[0] == 0:
            return topk_rows(selection_keys(x, W_enc, b_enc, scale, dtype), k)
        pre = _product(x, W_enc, dtype)
        return _select(pre, b_enc, scale, k, use_tiles)

    def gather_sum(
        self, source: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor
    ) -> Tensor:
        """Return weighted sums of gathered rows; see `Backend`."""
        dtype = torch.promote_types(source.dtype, weights.dtype)
        if dtype not in _KINDS or indices.numel() == 0 or source.shape[1] == 0:
            return super().gather_sum(source, indices, offsets, weights)
        return _gather_sum(_rows_contiguous(source), indices, offsets, weights, dtype)

    def pair_dot(
        self, segments: Tensor, source: Tensor, indices: Tensor, offsets: Tensor
    ) -> Tensor:
        """Return dot products of each segment's row with the rows it gathers; see `Backend`."""
        from ._triton_kernels import pair_dots

        dtype = torch.promote_types(segments.dtype, source.dtype)
        nnz = indices.numel()
        if dtype not in _KINDS or nnz == 0:
            return super().pair_dot(segments, source, indices, offsets)
        segments, source = _rows_contiguous(segments), _rows_contiguous(source)
        row = torch.arange(offsets.numel() - 1, dtype=torch.int32, device=offsets.device)
        row = row.repeat_interleave(offsets.diff(), output_size=nnz)
        out = torch.empty(nnz, dtype=torch.float32, device=source.device)
        pairs = 16
        pair_dots[(-(-nnz // pairs),)](
            segments, source, indices, row, out, nnz, source.shape[1],
            segments.stride(0), source.stride(0), PAIRS=pairs, BLOCK_D=128, num_warps=4,
        )  # fmt: skip
        return out.to(dtype)


def _product(x: Tensor, W_enc: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return ``x @ W_enc``, ``[batch, d_sae]``, accumulated and, if torch can, kept in float32."""
    if dtype is None or dtype == x.dtype:
        return (x @ W_enc.to(x.dtype)).contiguous()
    x, W_enc = x.to(dtype), W_enc.to(dtype)
    try:
        return torch.mm(x, W_enc, out_dtype=torch.float32)
    except (TypeError, RuntimeError, NotImplementedError):
        return (x @ W_enc).contiguous()  # an older torch, or a CPU: rounded to dtype


def _select(
    pre: Tensor, b_enc: Tensor, scale: Tensor | None, k: int, use_tiles: bool
) -> tuple[Tensor, Tensor]:
    from . import _triton_kernels as triton_kernels

    batch, n = pre.shape
    n_tiles = -(-n // TILE)
    n_chosen = min(k, n_tiles)
    values = torch.empty(batch, k, dtype=torch.float32, device=pre.device)
    indices = torch.empty(batch, k, dtype=torch.int32, device=pre.device)
    tiles = torch.empty(batch, n_chosen if use_tiles else 0, dtype=torch.int32, device=pre.device)
    factor = b_enc if scale is None else scale  # a kernel needs a pointer, used or not
    common: dict[str, Any] = {"HAS_SCALE": scale is not None, "TILE": TILE}
    if use_tiles:
        maxima = torch.empty(batch, n_tiles, dtype=torch.int32, device=pre.device)  # keys
        per_program = 32
        triton_kernels.tile_maxima[(batch, -(-n_tiles // per_program))](
            pre, b_enc, factor, maxima, n, n_tiles, TILES=per_program, num_warps=4, **common
        )
        width = _power_of_two(n_tiles)
        triton_kernels.choose_tiles[(batch,)](
            maxima, tiles, n_tiles, n_chosen, N_TILES=width, num_warps=_warps(width)
        )
    lanes = _power_of_two(n_chosen * TILE if use_tiles else n)
    triton_kernels.choose_entries[(batch,)](
        pre, b_enc, factor, tiles, values, indices, n, n_chosen, k,
        CANDIDATES=lanes, USE_TILES=use_tiles, num_warps=_warps(lanes), **common,
    )  # fmt: skip
    return values, indices


def _gather_sum(
    source: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor, dtype: torch.dtype
) -> Tensor:
    from . import _triton_kernels as triton_kernels

    n_segments, d, nnz = offsets.numel() - 1, source.shape[1], indices.numel()
    out = torch.empty(n_segments, d, dtype=dtype, device=source.device)
    block = min(256, _power_of_two(d))
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


def _power_of_two(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())


def _warps(lanes: int) -> int:
    return 4 if lanes <= 2048 else 8


BACKEND = TritonBackend()

__all__ = ["BACKEND", "TritonBackend"]
