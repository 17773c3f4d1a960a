"""Triton kernels of decoding and gradients, without atomics: an output element has one owner.

They accumulate in float32. Names in capitals are compile-time constants. ``d`` is masked, so any
width works without padding a tensor.
"""

# Triton reads these functions' source and knows no annotations beside constexpr.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _add_rows(
    source, indices, weights, begin, end, columns, mask, d, stride, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum ``weights[p] * source[indices[p], columns]`` for p from begin to end, in order."""
    total = tl.zeros((BLOCK_D,), tl.float32)
    for p in range(begin, end):
        index = tl.load(indices + p).to(tl.int64)
        weight = tl.load(weights + p).to(tl.float32)
        row = tl.load(source + index * stride + columns, mask=mask, other=0.0)
        total += weight * row.to(tl.float32)
    return total


@triton.jit
def long_segments(
    source, indices, offsets, weights, first_part, partial, n_segments, d, stride,
    SPLIT: tl.constexpr, BLOCK_D: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Sum parts of the segments longer than SPLIT; grid (parts, ceil(d / BLOCK_D)).

    ``first_part[s]`` is the number of parts before segment s; a bisection of DEPTH steps finds the
    owner of a part.
    """
    part = tl.program_id(0)
    if part < tl.load(first_part + n_segments):
        low = 0
        high = n_segments
        for _ in range(DEPTH):
            middle = (low + high) // 2
            before = tl.load(first_part + middle) <= part
            open_ = low + 1 < high
            low = tl.where(open_ & before, middle, low)
            high = tl.where(open_ & (before == 0), middle, high)
        start = tl.load(offsets + low) + (part - tl.load(first_part + low)) * SPLIT
        end = tl.minimum(start + SPLIT, tl.load(offsets + low + 1))
        columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = columns < d
        total = _add_rows(source, indices, weights, start, end, columns, mask, d, stride, BLOCK_D)
        tl.store(partial + part.to(tl.int64) * d + columns, total, mask=mask)


@triton.jit
def short_segments(
    source, indices, offsets, weights, first_part, partial, out, d, stride,
    SPLIT: tl.constexpr, BLOCK_D: tl.constexpr, ANY_LONG: tl.constexpr,
):  # fmt: skip
    """Sum each segment from its entries or from its parts; grid (segments, blocks of d)."""
    segment = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = columns < d
    begin = tl.load(offsets + segment)
    end = tl.load(offsets + segment + 1)
    target = out + segment.to(tl.int64) * d + columns
    is_long = end - begin > SPLIT
    if ANY_LONG & is_long:
        total = tl.zeros((BLOCK_D,), tl.float32)
        first = tl.load(first_part + segment)
        part = partial + first.to(tl.int64) * d + columns
        for _ in range(first, tl.load(first_part + segment + 1)):
            total += tl.load(part, mask=mask, other=0.0)
            part += d
        tl.store(target, total, mask=mask)
    else:
        total = _add_rows(source, indices, weights, begin, end, columns, mask, d, stride, BLOCK_D)
        tl.store(target, total, mask=mask)


@triton.jit
def row_sums(
    source, indices, weights, bias, out, n_rows, k, d, stride,
    BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Sum the k gathered rows of each row, and the bias; grid (rows, blocks of d).

    With CHECK, and in a debug build, an index that is no row of ``source`` ends the program with an
    error of the device.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = columns < d
    total = tl.zeros((BLOCK_D,), tl.float32)
    for p in range(k):
        index = tl.load(indices + row * k + p).to(tl.int64)
        if CHECK:
            inside = (index >= 0) & (index < n_rows)
            tl.device_assert(inside, "a latent is out of range of the decoder")
            index = tl.where(inside, index, 0)
        weight = tl.load(weights + row * k + p).to(tl.float32)
        place = source + index * stride + columns
        total += weight * tl.load(place, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * d + columns, total, mask=mask)


@triton.jit
def level_sums(
    source, indices, offsets, weights, bias, out, n_rows, n_levels, d, stride,
    BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Sum each row's segments one after the other, writing each level; grid (rows, blocks of d)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = columns < d
    total = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    begin = tl.load(offsets + row * n_levels)
    for level in range(n_levels):
        end = tl.load(offsets + row * n_levels + level + 1)
        total += _add_rows(source, indices, weights, begin, end, columns, mask, d, stride, BLOCK_D)
        tl.store(out + (level * n_rows + row) * d + columns, total, mask=mask)
        begin = end


@triton.jit
def pair_dots(
    segments, source, indices, rows, out, nnz, k, d, segment_stride, source_stride,
    PAIRS: tl.constexpr, BLOCK_D: tl.constexpr, UNIFORM: tl.constexpr,
):  # fmt: skip
    """Compute dot products of row pairs; grid (ceil(nnz / PAIRS),).

    UNIFORM says that every segment has k pairs; ``rows`` is then not read.
    """
    pairs = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    inside = pairs < nnz
    index = tl.load(indices + pairs, mask=inside, other=0).to(tl.int64)
    if UNIFORM:
        row = (pairs // k).to(tl.int64)
    else:
        row = tl.load(rows + pairs, mask=inside, other=0).to(tl.int64)
    total = tl.zeros((PAIRS,), tl.float32)
    for start in range(0, d, BLOCK_D):
        columns = start + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (columns < d)[None, :]
        left = tl.load(
            segments + (row * segment_stride)[:, None] + columns[None, :], mask=mask, other=0.0
        )
        right = tl.load(
            source + (index * source_stride)[:, None] + columns[None, :], mask=mask, other=0.0
        )
        total += tl.sum(left.to(tl.float32) * right.to(tl.float32), axis=1)
    tl.store(out + pairs, total, mask=inside)
