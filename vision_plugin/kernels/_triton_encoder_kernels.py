"""Triton kernels of the encoder: tiles of the product, and the choice of the largest entries.

A row's k largest entries lie in its k tiles of TILE columns with the largest maxima, and a batch's
largest entries in as many tiles of the batch. So the product leaves only the maxima behind, and the
chosen tiles are computed again, grouped by tile: a weight is read once for all rows that chose it.
Counts are added atomically, as integers, whose sum does not depend on the order.
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
    USE_TILES: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Choose the k largest keys of each row within its chosen tiles, ascending; grid (batch,).

    PACKED says that ``pre`` holds the finished keys of the chosen tiles alone, one after the other.
    """
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
    if PACKED:
        place = row * n_chosen * TILE + lane
        found = tl.load(pre + place, mask=mask, other=float("-inf"))
    else:
        found = _load_keys(pre + row * n, bias, scale, columns, mask, HAS_SCALE)
    keys = tl.where(mask, _key(found), tl.full((), 0, tl.uint32))
    chosen, rank = _choose(keys, k)
    chosen = chosen & mask
    tl.store(values + row * k + rank, found, mask=chosen)
    tl.store(indices + row * k + rank, columns, mask=chosen)


@triton.jit
def _product(
    x, W, rows, columns, row_mask, column_mask, d, stride_x, stride_k, stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Return ``x[rows] @ W[:, columns]`` in float32.

    Both kernels below add up in this order, so that an entry has the same bits in either. UPCAST is
    for Triton's interpreter, which multiplies bfloat16 wrongly.
    """
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    left = x + rows.to(tl.int64)[:, None] * stride_x
    right = W + columns.to(tl.int64)[None, :] * stride_n
    for start in range(0, d, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        inside = inner < d
        a = tl.load(left + inner[None, :], mask=row_mask[:, None] & inside[None, :], other=0.0)
        b = tl.load(
            right + inner[:, None] * stride_k,
            mask=inside[:, None] & column_mask[None, :],
            other=0.0,
        )
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision="ieee")
    return total


@triton.jit
def _finished(value, bias, scale, columns, mask, HAS_SCALE: tl.constexpr):
    """Return ``(value + bias) * scale`` of a block of rows; minus infinity where masked."""
    value += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
    if HAS_SCALE:
        value *= tl.load(scale + columns, mask=mask, other=0.0).to(tl.float32)[None, :]
    return tl.where(mask[None, :], value, float("-inf"))


@triton.jit
def product_maxima(
    x, W, bias, scale, maxima, batch, n, n_tiles, d, stride_x, stride_k, stride_n,
    HAS_SCALE: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Multiply, and keep the largest key of each tile alone; grid (blocks of rows and columns,).

    GROUP blocks of rows share their columns one after the other, which keeps weights in the cache.
    """
    blocks_m = tl.cdiv(batch, BLOCK_M)
    blocks_n = tl.cdiv(n, BLOCK_N)
    group = tl.program_id(0) // (GROUP * blocks_n)
    first = group * GROUP
    size = tl.minimum(blocks_m - first, GROUP)
    within = tl.program_id(0) % (GROUP * blocks_n)
    rows = (first + within % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    block_n = within // size
    columns = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    value = _product(
        x, W, rows, columns, rows < batch, columns < n, d, stride_x, stride_k, stride_n,
        BLOCK_M, BLOCK_N, BLOCK_K, UPCAST,
    )  # fmt: skip
    value = _finished(value, bias, scale, columns, columns < n, HAS_SCALE)
    per_block: tl.constexpr = BLOCK_N // TILE
    # The largest of the values would pass over NaN.
    best = tl.max(tl.reshape(_key(value), (BLOCK_M, per_block, TILE)), axis=2)
    tiles = block_n * per_block + tl.arange(0, per_block)
    target = maxima + rows.to(tl.int64)[:, None] * n_tiles + tiles[None, :]
    mask = (rows < batch)[:, None] & (tiles < n_tiles)[None, :]
    tl.store(target, best.to(tl.int32, bitcast=True), mask=mask)


@triton.jit
def tile_products(
    x, W, bias, scale, order, slot_rows, starts, jobs, found, n, n_tiles, d,
    stride_x, stride_k, stride_n,
    HAS_SCALE: tl.constexpr, TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Compute chosen tiles, all of one tile together; grid (jobs,).

    ``order`` lists the slots by tile, those of tile t from ``starts[t]``, and ``jobs[t]`` counts
    the jobs of the tiles before t. A bisection of DEPTH steps finds the tile of a job.
    """
    job = tl.program_id(0)
    if job < tl.load(jobs + n_tiles):
        low = 0
        high = n_tiles
        for _ in range(DEPTH):
            middle = (low + high) // 2
            before = tl.load(jobs + middle) <= job
            open_ = low + 1 < high
            low = tl.where(open_ & before, middle, low)
            high = tl.where(open_ & (before == 0), middle, high)
        place = tl.load(starts + low) + (job - tl.load(jobs + low)) * BLOCK_M
        places = place + tl.arange(0, BLOCK_M)
        inside = places < tl.load(starts + low + 1)
        slots = tl.load(order + places, mask=inside, other=0).to(tl.int64)
        rows = tl.load(slot_rows + slots, mask=inside, other=0)
        columns = low * TILE + tl.arange(0, TILE)
        value = _product(
            x, W, rows, columns, inside, columns < n, d, stride_x, stride_k, stride_n,
            BLOCK_M, TILE, BLOCK_K, UPCAST,
        )  # fmt: skip
        value = _finished(value, bias, scale, columns, columns < n, HAS_SCALE)
        target = found + slots[:, None] * TILE + tl.arange(0, TILE)[None, :]
        tl.store(target, value, mask=inside[:, None])


@triton.jit
def copy_tiles(
    pre, bias, scale, slot_rows, slot_tiles, found, n, n_slots,
    HAS_SCALE: tl.constexpr, TILE: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Copy chosen tiles of dense pre-activations, finished; grid (ceil(n_slots / SLOTS),)."""
    lane = tl.arange(0, SLOTS * TILE)
    slot = tl.program_id(0) * SLOTS + lane // TILE
    inside = slot < n_slots
    row = tl.load(slot_rows + slot, mask=inside, other=0).to(tl.int64)
    columns = tl.load(slot_tiles + slot, mask=inside, other=0) * TILE + lane % TILE
    # A row is not the same for all lanes, so each has its own place.
    value = _load_keys(pre + row * n, bias, scale, columns, inside & (columns < n), HAS_SCALE)
    tl.store(found + slot.to(tl.int64) * TILE + lane % TILE, value, mask=inside)


@triton.jit
def _block_keys(keys, size, ARE_KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """Load a block of keys, or of floats as keys; the key below all others past the end."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    if ARE_KEYS:
        found = tl.load(keys + place, mask=inside, other=0).to(tl.uint32, bitcast=True)
    else:
        found = _key(tl.load(keys + place, mask=inside, other=0.0))
    return tl.where(inside, found, tl.full((), 0, tl.uint32)), place, inside


@triton.jit
def count_digits(
    keys, state, counts, size, SHIFT: tl.constexpr, ARE_KEYS: tl.constexpr, BLOCK: tl.constexpr
):
    """Count the 8-bit digits at SHIFT of the keys that begin as the boundary so far; 512 counts."""
    found, _, inside = _block_keys(keys, size, ARE_KEYS, BLOCK)
    digit = ((found >> SHIFT) & 255).to(tl.int32)
    if SHIFT < 24:
        prefix = tl.load(state).to(tl.uint32, bitcast=True)
        inside = inside & ((found >> (SHIFT + 8)) == (prefix >> (SHIFT + 8)))
    # What does not count goes into the upper half, which nothing reads.
    counted = tl.histogram(tl.where(inside, digit, 256), 512)
    tl.atomic_add(counts + tl.arange(0, 512), counted, sem="relaxed")


@triton.jit
def choose_digit(state, counts, SHIFT: tl.constexpr, POSITIVE: tl.constexpr):
    """Take the next digit of the boundary, which ``state[1]`` keys are to reach; grid (1,).

    After the last digit ``state`` holds the boundary, and how many of the keys equal to it are
    chosen. POSITIVE lets no key reach the boundary that is not above that of zero.
    """
    digit = tl.arange(0, 256)
    count = tl.load(counts + digit)
    wanted = tl.load(state + 1)
    reach = tl.sum(count, axis=0) - tl.cumsum(count, axis=0) + count
    best = tl.max(tl.where(reach >= wanted, digit, 0), axis=0)
    above = tl.sum(tl.where(digit > best, count, 0), axis=0)
    boundary = tl.load(state).to(tl.uint32, bitcast=True) | (best.to(tl.uint32) << SHIFT)
    wanted -= above
    if POSITIVE and SHIFT == 0:
        zero = tl.full((), 2147483648, tl.uint32)
        wanted = tl.where(boundary <= zero, 0, wanted)
        boundary = tl.where(boundary <= zero, zero, boundary)
    tl.store(state, boundary.to(tl.int32, bitcast=True))
    tl.store(state + 1, wanted)


@triton.jit
def count_chosen(keys, state, above, equal, size, ARE_KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """Count the keys of each block above the boundary, and equal to it; grid (blocks,)."""
    found, _, inside = _block_keys(keys, size, ARE_KEYS, BLOCK)
    boundary = tl.load(state).to(tl.uint32, bitcast=True)
    block = tl.program_id(0)
    tl.store(above + block, tl.sum((inside & (found > boundary)).to(tl.int32), axis=0))
    tl.store(equal + block, tl.sum((inside & (found == boundary)).to(tl.int32), axis=0))


@triton.jit
def list_chosen(
    keys, state, above, equal, chosen, size, ARE_KEYS: tl.constexpr, BLOCK: tl.constexpr
):
    """List the places of the chosen keys, ascending; grid (blocks,).

    ``above`` and ``equal`` are sums over all blocks up to each, itself included.
    """
    found, place, inside = _block_keys(keys, size, ARE_KEYS, BLOCK)
    boundary = tl.load(state).to(tl.uint32, bitcast=True)
    wanted = tl.load(state + 1)
    is_above = (inside & (found > boundary)).to(tl.int32)
    is_equal = (inside & (found == boundary)).to(tl.int32)
    block = tl.program_id(0)
    above_before = tl.load(above + block) - tl.sum(is_above, axis=0)
    equal_before = tl.load(equal + block) - tl.sum(is_equal, axis=0)
    is_equal = is_equal & (equal_before + tl.cumsum(is_equal, axis=0) <= wanted).to(tl.int32)
    taken = is_above | is_equal
    rank = above_before + tl.minimum(equal_before, wanted) + tl.cumsum(taken, axis=0) - 1
    tl.store(chosen + rank, place, mask=taken != 0)


@triton.jit
def list_entries(
    found, chosen, slot_rows, slot_tiles, values, rows, columns, size,
    TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write value, row and column of chosen entries, but for places of -1; grid (blocks,)."""
    entry = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(chosen + entry, mask=entry < size, other=-1)
    mask = place >= 0
    slot = place // TILE
    tile = tl.load(slot_tiles + slot, mask=mask, other=0)
    tl.store(values + entry, tl.load(found + place, mask=mask, other=0.0), mask=mask)
    tl.store(rows + entry, tl.load(slot_rows + slot, mask=mask, other=0), mask=mask)
    tl.store(columns + entry, tile * TILE + (place % TILE).to(tl.int32), mask=mask)
