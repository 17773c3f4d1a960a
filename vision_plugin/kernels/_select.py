"""Exact selection of the largest entries of dense pre-activations, with torch operators.

Larger values come first, ties go to the lowest index. NaN comes before every number, as it does in
``torch.topk``: a selection that dropped it would hide that a model or an SAE is broken. A row's k
largest entries lie in its k tiles with the largest maxima, so most of the row is read once, for
the maxima alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TILE = 32
# Selection by tiles pays when it leaves out most of the row.
_TILES_PAY = 4
# Rows with a tie at the boundary need passes over whole rows, of this many elements at a time.
_TIE_ELEMENTS = 1 << 22


def topk_rows(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest entries of each row, by ascending index.

    Args:
        keys: Matrix, ``[batch, n]``, contiguous.
        k: Entries per row, from 1 to n.

    Returns:
        The entries ``[batch, k]`` and their column numbers ``[batch, k]`` (int32).
    """
    n = keys.shape[1]
    if k == n:
        columns = torch.arange(n, dtype=torch.int32, device=keys.device)
        return keys.clone(), columns.expand(keys.shape).contiguous()
    # One more than asked for: only equal neighbours at the boundary are ambiguous.
    if (k + 1) * _TILE * _TILES_PAY <= n:
        values, columns = _topk_of_tiles(keys, k + 1)
    else:
        values, columns = keys.topk(k + 1, sorted=True)
    tied = values[:, k - 1] == values[:, k]
    columns = columns[:, :k].sort(dim=1).values
    if tied.any():
        rows = tied.nonzero().squeeze(1)
        boundary = values[rows, k - 1]
        step = max(1, _TIE_ELEMENTS // n)
        for start in range(0, rows.numel(), step):
            part = slice(start, start + step)
            columns[rows[part]] = _break_ties(keys[rows[part]], boundary[part], k)
    return keys.gather(1, columns), columns.int()


def _topk_of_tiles(keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest entries of each row, descending; ties go to any of the equal ones."""
    batch, n = keys.shape
    n_tiles = n // _TILE
    whole = n_tiles * _TILE
    tiles = keys[:, :whole].reshape(batch, n_tiles, _TILE)
    best = tiles.amax(dim=2).topk(k, dim=1, sorted=False).indices
    within = torch.arange(_TILE, device=keys.device)
    columns = (best[:, :, None] * _TILE + within).flatten(1)
    if whole < n:  # the last, incomplete tile always takes part
        rest = torch.arange(whole, n, device=keys.device).expand(batch, -1)
        columns = torch.cat([columns, rest], dim=1)
    top = keys.gather(1, columns).topk(k, dim=1, sorted=True)
    return top.values, columns.gather(1, top.indices)


def _break_ties(keys: Tensor, boundary: Tensor, k: int) -> Tensor:
    """Return the columns of the k largest of each row, ``[rows, k]``, ties to the lowest column."""
    above = ~(keys <= boundary[:, None])  # NaN too
    equal = keys == boundary[:, None]
    wanted = k - above.sum(dim=1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=1) <= wanted))
    return chosen.nonzero()[:, 1].view(-1, k)


def largest_positive(keys: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return the ``total`` largest positive entries of a matrix, by ascending flat index.

    Args:
        keys: Matrix, ``[batch, n]``, contiguous; NaN ranks as infinity.
        total: Number of entries; fewer come back if fewer are positive.

    Returns:
        The entries ``[nnz]`` and their flat positions ``[nnz]`` (int64).
    """
    flat = keys.view(-1)
    if total <= 0:
        return flat.new_empty(0), torch.empty(0, dtype=torch.long, device=keys.device)
    n_tiles = flat.numel() // _TILE
    if n_tiles * _TILE == flat.numel() and total * _TILES_PAY <= n_tiles:
        tiles = flat.view(n_tiles, _TILE)
        maxima = _ranks(tiles.amax(dim=1))
        # total tiles reach this value, so at least total entries do.
        floor = _kth_largest(maxima, total)
        hits = ((maxima >= floor) & (maxima > 0)).nonzero().squeeze(1)
        within = torch.arange(_TILE, device=keys.device)
        values = tiles.index_select(0, hits)
        keep = ~((values < floor) | (values <= 0))
        positions = (hits[:, None] * _TILE + within)[keep]
        values = values[keep]
    else:
        positions = (flat <= 0).logical_not_().nonzero().squeeze(1)
        values = flat[positions]
    if values.numel() <= total:
        return values, positions
    ranks = _ranks(values)
    boundary = _kth_largest(ranks, total)
    above = ranks > boundary
    equal = ranks == boundary
    chosen = above | (equal & (equal.cumsum(0) <= total - above.sum()))
    return values[chosen], positions[chosen]


def _ranks(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _kth_largest(values: Tensor, k: int) -> Tensor:
    if values.device.type == "cpu":
        return values.kthvalue(values.numel() - k + 1).values
    return values.topk(k, sorted=False).values.amin()


def above_threshold(keys: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Return entries that are positive and above their column's threshold, by flat index.

    Args:
        keys: Matrix, ``[batch, n]``, contiguous; NaN is above every threshold.
        threshold: Threshold of each column, ``[n]``; no number is above NaN.

    Returns:
        The entries ``[nnz]`` and their flat positions ``[nnz]`` (int64), ascending.
    """
    floor = threshold.clamp(min=0).nan_to_num(nan=torch.inf, posinf=torch.inf)
    positions = (keys <= floor).logical_not_().view(-1).nonzero().squeeze(1)
    return keys.view(-1)[positions], positions
