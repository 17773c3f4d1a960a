"""The encoder of the Triton backend: dense or tiled product, then the choice of entries."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TILE = 32
# One program keeps at most this many keys in registers; torch does wider selections.
MAX_LANES = 8192
FUSED_VARIABLE = "VISION_PLUGIN_FUSED_ENCODER"
_HALF = (torch.float16, torch.bfloat16)
_BLOCK = 4096  # keys per program of a selection over the batch
# Rows, columns and depth of a block of the product, and rows of a block of chosen tiles.
_BLOCK_M, _BLOCK_N, _BLOCK_K, _CHOSEN_M = 128, 128, 64, 64


@dataclass(frozen=True)
class Product:
    """The encoder's product of some rows, before bias and scale.

    Attributes:
        x: Rows, ``[batch, d_in]``, contiguous, in the dtype of the product.
        W: Weights, ``[d_in, d_sae]``, in the same dtype.
        b_enc: Bias, ``[d_sae]``.
        scale: Weights of the selection, ``[d_sae]``, or None.
        dense: The product itself, ``[batch, d_sae]``, or None where only its tiles are computed.
    """

    x: Tensor
    W: Tensor
    b_enc: Tensor
    scale: Tensor | None
    dense: Tensor | None

    @property
    def n_tiles(self) -> int:
        """Number of tiles of a row."""
        return -(-self.W.shape[1] // TILE)

    @property
    def vectors(self) -> tuple[Tensor, Tensor]:
        """Bias and scale as kernels take them: a kernel needs a pointer, used or not."""
        return self.b_enc, self.b_enc if self.scale is None else self.scale


def make_product(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, scale: Tensor | None, dtype: torch.dtype | None
) -> Product:
    """Return the product of some rows, tiled where that was asked for and dense elsewhere.

    The tiled product never writes its ``[batch, d_sae]`` entries, and is asked for by
    ``VISION_PLUGIN_FUSED_ENCODER=1``, for products in half precision.
    """
    kind = x.dtype if dtype is None else dtype
    if os.environ.get(FUSED_VARIABLE) == "1" and (kind in _HALF or interpreting()):
        return Product(x.to(kind).contiguous(), W_enc.to(kind), b_enc, scale, None)
    return Product(x, W_enc, b_enc, scale, _dense(x, W_enc, dtype))


def _dense(x: Tensor, W_enc: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return ``x @ W_enc``, ``[batch, d_sae]``, accumulated and, if torch can, kept in float32."""
    x, W_enc = (x, W_enc.to(x.dtype)) if dtype is None else (x.to(dtype), W_enc.to(dtype))
    if x.dtype not in _HALF:
        return (x @ W_enc).contiguous()
    try:
        return torch.mm(x, W_enc, out_dtype=torch.float32)
    except (TypeError, RuntimeError, NotImplementedError):
        return (x @ W_enc).contiguous()  # an older torch, or a CPU: rounded to dtype


def fits(product_rows: int, n: int, k: int) -> bool:
    """Return whether programs have room for the choice of k of n entries, in each of the rows."""
    lanes = power_of_two(k * TILE if _by_tiles(n, k) else n)
    wide = _by_tiles(n, k) and power_of_two(-(-n // TILE)) > MAX_LANES
    return product_rows > 0 and lanes <= MAX_LANES and not wide


def _by_tiles(n: int, k: int) -> bool:
    return n > MAX_LANES or k * TILE * 2 <= n


def choose_in_rows(product: Product, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest keys of each row and their columns, ``[batch, k]``, ascending."""
    from . import _triton_encoder_kernels as kernels

    batch, n = product.x.shape[0], product.W.shape[1]
    device = product.x.device
    use_tiles = _by_tiles(n, k) or product.dense is None
    n_chosen = min(k, product.n_tiles) if use_tiles else 0
    tiles = torch.empty(batch, n_chosen, dtype=torch.int32, device=device)
    keys = product.dense
    if use_tiles:
        width = power_of_two(product.n_tiles)
        kernels.choose_tiles[(batch,)](
            _maxima(product), tiles, product.n_tiles, n_chosen, N_TILES=width,
            num_warps=warps(width),
        )  # fmt: skip
        if keys is None:
            rows = torch.arange(batch, dtype=torch.int32, device=device)
            rows = rows.repeat_interleave(n_chosen)
            keys = _found(product, rows, tiles.view(-1))
    values = torch.empty(batch, k, dtype=torch.float32, device=device)
    indices = torch.empty(batch, k, dtype=torch.int32, device=device)
    lanes = power_of_two(n_chosen * TILE if use_tiles else n)
    kernels.choose_entries[(batch,)](
        keys, *product.vectors, tiles, values, indices, n, n_chosen, k,
        HAS_SCALE=product.scale is not None, TILE=TILE, CANDIDATES=lanes, USE_TILES=use_tiles,
        PACKED=product.dense is None, num_warps=warps(lanes),
    )  # fmt: skip
    return values, indices


def choose_in_batch(product: Product, total: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``total`` largest positive keys of a batch, their rows and their columns.

    The results are ``[total]`` and ascend by row, then column. Where fewer keys are positive, zeros
    in the last column of the last row fill up. Nothing waits for the device.
    """
    from . import _triton_encoder_kernels as kernels

    batch, n, n_tiles = product.x.shape[0], product.W.shape[1], product.n_tiles
    device = product.x.device
    chosen = _largest(_maxima(product).view(-1), min(total, batch * n_tiles), positive=False)
    slot_rows, slot_tiles = (chosen // n_tiles).int(), (chosen % n_tiles).int()
    found = _found(product, slot_rows, slot_tiles)
    places = _largest(found.view(-1), min(total, found.numel()), positive=True)
    values = torch.zeros(total, dtype=torch.float32, device=device)
    rows = torch.full((total,), batch - 1, dtype=torch.int32, device=device)
    columns = torch.full((total,), n - 1, dtype=torch.int32, device=device)
    block = 1024
    kernels.list_entries[(-(-places.numel() // block),)](
        found, places, slot_rows, slot_tiles, values, rows, columns, places.numel(),
        TILE=TILE, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return values, rows, columns


def choose_again(
    values: Tensor, rows: Tensor, columns: Tensor, total: int, last: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ``total`` largest positive of entries that parts of a batch have chosen."""
    places = _largest(values, min(total, values.numel()), positive=True)
    places = torch.nn.functional.pad(places, (0, total - places.numel()), value=-1)
    inside, place = places >= 0, places.clamp(min=0)
    return (
        torch.where(inside, values[place], 0),
        torch.where(inside, rows[place], last[0]),
        torch.where(inside, columns[place], last[1]),
    )


def _maxima(product: Product) -> Tensor:
    """Return the largest key of each tile, ``[batch, n_tiles]``, int32."""
    from . import _triton_encoder_kernels as kernels

    batch, d, n = *product.x.shape, product.W.shape[1]
    n_tiles = product.n_tiles
    maxima = torch.empty(batch, n_tiles, dtype=torch.int32, device=product.x.device)
    common: dict[str, Any] = {"HAS_SCALE": product.scale is not None, "TILE": TILE}
    if product.dense is not None:
        per_program = 32
        kernels.tile_maxima[(batch, -(-n_tiles // per_program))](
            product.dense, *product.vectors, maxima, n, n_tiles, TILES=per_program, num_warps=4,
            **common,
        )  # fmt: skip
        return maxima
    block_m, block_n, block_k = (
        (_BLOCK_M, _BLOCK_N, _BLOCK_K) if not interpreting() else (16, 64, 16)
    )
    kernels.product_maxima[(-(-batch // block_m) * -(-n // block_n),)](
        product.x, product.W, *product.vectors, maxima, batch, n, n_tiles, d,
        product.x.stride(0), *product.W.stride(), BLOCK_M=block_m, BLOCK_N=block_n,
        BLOCK_K=block_k, GROUP=8, UPCAST=interpreting(), num_warps=8, num_stages=3, **common,
    )  # fmt: skip
    return maxima


def _found(product: Product, slot_rows: Tensor, slot_tiles: Tensor) -> Tensor:
    """Return the finished keys of chosen tiles, ``[slots, TILE]``; minus infinity past the end."""
    from . import _triton_encoder_kernels as kernels

    n, n_tiles, n_slots = product.W.shape[1], product.n_tiles, slot_rows.numel()
    device = product.x.device
    found = torch.empty(n_slots, TILE, dtype=torch.float32, device=device)
    common: dict[str, Any] = {"HAS_SCALE": product.scale is not None, "TILE": TILE}
    if product.dense is not None:
        per_program = 32
        kernels.copy_tiles[(-(-n_slots // per_program),)](
            product.dense, *product.vectors, slot_rows, slot_tiles, found, n, n_slots,
            SLOTS=per_program, num_warps=4, **common,
        )  # fmt: skip
        return found
    block = _CHOSEN_M if not interpreting() else 16
    by_tile, order = slot_tiles.sort(stable=True)
    edges = torch.arange(n_tiles + 1, dtype=torch.int32, device=device)
    starts = torch.searchsorted(by_tile, edges, out_int32=True)
    jobs = torch.zeros(n_tiles + 1, dtype=torch.int32, device=device)
    torch.cumsum((starts.diff() + (block - 1)) // block, 0, dtype=torch.int32, out=jobs[1:])
    # Each tile wastes less than one job, so a bound needs no look at the data.
    most_jobs = n_slots // block + min(n_tiles, n_slots)
    kernels.tile_products[(most_jobs,)](
        product.x, product.W, *product.vectors, order.int(), slot_rows, starts, jobs, found,
        n, n_tiles, product.x.shape[1], product.x.stride(0), *product.W.stride(), BLOCK_M=block,
        BLOCK_K=_BLOCK_K if not interpreting() else 16, DEPTH=n_tiles.bit_length() + 1,
        UPCAST=interpreting(), num_warps=4, num_stages=3, **common,
    )  # fmt: skip
    return found


def _largest(keys: Tensor, total: int, *, positive: bool) -> Tensor:
    """Return the places of the ``total`` largest keys, ascending, ties to the first.

    A radix selection: four passes count the digits of what is still in question.

    Args:
        keys: Floats, or int32 keys as kernels order them, ``[n]``.
        total: Number of places, at most n.
        positive: Whether only keys above zero count; -1 then fills up.

    Returns:
        ``[total]``, int64.
    """
    from . import _triton_encoder_kernels as kernels

    size, device = keys.numel(), keys.device
    blocks = -(-size // _BLOCK)
    common: dict[str, Any] = {"ARE_KEYS": keys.dtype == torch.int32, "BLOCK": _BLOCK}
    state = torch.zeros(2, dtype=torch.int32, device=device)
    state[1].fill_(total)
    counts = torch.zeros(4, 512, dtype=torch.int32, device=device)
    for number, shift in enumerate((24, 16, 8, 0)):
        kernels.count_digits[(blocks,)](
            keys, state, counts[number], size, SHIFT=shift, num_warps=8, **common
        )
        kernels.choose_digit[(1,)](
            state, counts[number], SHIFT=shift, POSITIVE=positive, num_warps=4
        )
    above, equal = torch.empty(2, blocks, dtype=torch.int32, device=device)
    kernels.count_chosen[(blocks,)](keys, state, above, equal, size, num_warps=8, **common)
    above, equal = above.cumsum(0, dtype=torch.int32), equal.cumsum(0, dtype=torch.int32)
    places = torch.full((total,), -1, dtype=torch.int64, device=device)
    kernels.list_chosen[(blocks,)](keys, state, above, equal, places, size, num_warps=8, **common)
    return places


def interpreting() -> bool:
    """Return whether Triton runs in its interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def power_of_two(n: int) -> int:
    """Return the least power of two that is at least n and 16."""
    return max(16, 1 << (n - 1).bit_length())


def warps(lanes: int) -> int:
    """Return how many warps share a block of keys."""
    return 4 if lanes <= 2048 else 8
