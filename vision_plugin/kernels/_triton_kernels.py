"""The Triton kernels. Each output element has a single owner, and there are no atomics.

They accumulate in float32. Names in capitals are compile-time constants. ``d`` is masked, so any
width works without padding a tensor.
"""

# Triton reads these functions' source and knows no annotations beside constexpr.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _key(value):
    """Return an unsigned integer that orders as the float does.

    -0.0 counts as 0.0, and NaN, whatever its sign, lies above every number.
    """
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    flipped = tl.where(bits < 0, ~bits, bits | -2147483648)
    return tl.where(value != value, -1, flipped).to(tl.uint32, bitcast=True)


@triton.jit
def _kth_largest(keys, k):
    """Return the k-th largest of a block of keys, found bit by bit from the highest."""
    found = tl.full((), 0, tl.uint32)
    bit = tl.full((), 2147483648, tl.uint32)
    for _ in range(32):
        trial = found | bit
        count = tl.sum((keys >= trial).to(tl.int32), axis=0)
        found = tl.where(count >= k, trial, found)
        bit = bit >> 1
    return found


@triton.jit
def _choose(keys, k):
    """Return which k keys are the largest, ties to the first, and their ranks among the chosen."""
    boundary = _kth_largest(keys, k)
    above = keys > boundary
    equal = keys == boundary
    wanted = k - tl.sum(above.to(tl.int32), axis=0)
    chosen = above | (equal & (tl.cumsum(equal.to(tl.int32), axis=0) <= wanted))
    return chosen, tl.cumsum(chosen.to(tl.int32), axis=0) - 1


@triton.jit
def _load_keys(pre, bias, scale, columns, mask, HAS_SCALE: tl.constexpr):
    """Return ``(pre + bias) * scale`` at some columns of a row; minus infinity where masked."""
    value = tl.load(pre + columns, mask=mask, other=0.0).to(tl.float32)
    value += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_SCALE:
        value *= tl.load(scale + columns, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask, value, float("-inf"))


@triton.jit
def tile_maxima(
    pre, bias, scale, maxima, n, n_tiles,
    HAS_SCALE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Find the largest key of each tile of TILE columns; grid (batch, ceil(n_tiles / TILES))."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * TILES * TILE + tl.arange(0, TILES * TILE)
    values = _load_keys(pre + row * n, bias, scale, columns, columns < n, HAS_SCALE)
    # The largest of the values would pass over NaN.
    best = tl.max(tl.reshape(_key(values), (TILES, TILE)), axis=1)
    tiles = tl.program_id(1) * TILES + tl.arange(0, TILES)
    best = best.to(tl.int32, bitcast=True)
    tl.store(maxima + row * n_tiles + tiles, best, mask=tiles < n_tiles)


@triton.jit
def choose_tiles(maxima, chosen_tiles, n_tiles, k, N_TILES: tl.constexpr):
    """Choose the k tiles of each row with the largest maxima, ascending; grid (batch,)."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, N_TILES)
    inside = tiles < n_tiles
    # A key of 0 lies below that of any number: tiles that only fill up the block stay out.
    keys = tl.load(maxima + row * n_tiles + tiles, mask=inside, other=0)
    keys = keys.to(tl.uint32, bitcast=True)
    chosen, rank = _choose(keys, k)
    tl.store(chosen_tiles + row * k + rank, tiles, mask=chosen & inside)


@triton.jit
def choose_entries(
    pre, bias, scale, tiles, values, indices, n, n_chosen, k,
    HAS_SCALE: tl.constexpr, TILE: tl.constexpr, CANDIDATES: tl.constexpr,
    USE_TILES: tl.constexpr,
):  # fmt: skip
    """Choose the k largest keys of each row within its chosen tiles, ascending; grid (batch,)."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, CANDIDATES)
    if USE_TILES:
        slot = lane // TILE
        tile = tl.load(tiles + row * n_chosen + slot, mask=slot < n_chosen, other=0)
        columns = tile * TILE + lane % TILE
        mask = (slot < n_chosen) & (columns < n)
    else:
        columns = lane
        mask = columns < n
    found = _load_keys(pre + row * n, bias, scale, columns, mask, HAS_SCALE)
    keys = tl.where(mask, _key(found), tl.full((), 0, tl.uint32))
    chosen, rank = _choose(keys, k)
    chosen = chosen & mask
    tl.store(values + row * k + rank, found, mask=chosen)
    tl.store(indices + row * k + rank, columns, mask=chosen)


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
def pair_dots(
    segments, source, indices, rows, out, nnz, d, segment_stride, source_stride,
    PAIRS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Compute dot products of row pairs; grid (ceil(nnz / PAIRS),)."""
    pairs = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    inside = pairs < nnz
    index = tl.load(indices + pairs, mask=inside, other=0).to(tl.int64)
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
