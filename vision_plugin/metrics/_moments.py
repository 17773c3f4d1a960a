"""The sums behind the monosemanticity score, streamed and merged without loss.

Every sum is taken of ``b = a - minimum``, the latent's distance from the smallest value seen so
far. When the minimum falls by ``delta``, ``b`` grows by ``delta`` on all earlier images, so the
sums follow by the binomial theorem: exact algebra in which only positive numbers are added.
Latents far from zero (say 1000 to 1001) therefore lose no digits, as they would in raw sums.
A sparse latent with an implicit zero has minimum 0 or less, and its zeros cost nothing.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_plugin.metrics._latents import LatentColumns, Latents, row_chunks
from vision_plugin.metrics._streaming import State

N_POWERS = 4
"""Powers of the shifted latents that are summed: 1 and 2 for the score, 3 and 4 for its null."""

CHUNK_ELEMENTS = 2**22
"""Elements of a float64 temporary over latents and embedding dimensions (32 MiB)."""


def empty_image_sums(d_embed: int) -> State:
    """Return zero states for the sums over images alone: count, exclusions, sum, Gram matrix."""
    return {
        "n_images": torch.zeros((), dtype=torch.int64),
        "n_excluded": torch.zeros((), dtype=torch.int64),
        "embedding_sum": torch.zeros(d_embed, dtype=torch.float64),
        "gram": torch.zeros(d_embed, d_embed, dtype=torch.float64),
    }


def empty_ranges(n_features: int) -> State:
    """Return zero states for each latent's minimum, maximum and firing count."""
    return {
        "minimum": torch.full((n_features,), torch.inf, dtype=torch.float64),
        "maximum": torch.full((n_features,), -torch.inf, dtype=torch.float64),
        "n_active": torch.zeros(n_features, dtype=torch.int64),
    }


def empty_pair_sums(n_features: int, d_embed: int) -> State:
    """Return zero states for the power sums and the latent-weighted embedding sums."""
    return {
        "powers": torch.zeros(N_POWERS, n_features, dtype=torch.float64),
        "weighted": torch.zeros(n_features, d_embed, dtype=torch.float64),
    }


def add_images(state: State, unit: Tensor, n_excluded: int) -> None:
    """Add unit embeddings ``[n, d]`` (float64) to the image sums, in place."""
    state["n_images"] += unit.shape[0]
    state["n_excluded"] += n_excluded
    state["embedding_sum"] += unit.sum(0)
    state["gram"].addmm_(unit.T, unit)


def add_ranges(state: State, latents: Latents) -> None:
    """Widen each latent's range and add its firing count, in place."""
    if latents.shape[0] == 0 if isinstance(latents, Tensor) else latents.n_rows == 0:
        return
    if isinstance(latents, Tensor):
        low, high = (bound.double() for bound in torch.aminmax(latents, dim=0))
        active = (latents != 0).sum(0)
    else:
        (low, high), active = latents.extrema(), latents.counts()
    state["minimum"] = torch.minimum(state["minimum"], low)
    state["maximum"] = torch.maximum(state["maximum"], high)
    state["n_active"] += active


def add_pairs(state: State, latents: Latents, unit: Tensor) -> None:
    """Add one batch to the pair sums, which must already be relative to ``state["minimum"]``."""
    if isinstance(latents, LatentColumns):
        _add_sparse(state, latents, unit)
        return
    for start, stop in row_chunks(latents.shape[0], latents.shape[1]):
        shifted = latents[start:stop].double() - state["minimum"]
        state["weighted"].addmm_(shifted.T, unit[start:stop])
        power = shifted.clone()
        for order in range(N_POWERS):
            state["powers"][order] += power.sum(0)
            power *= shifted


def _add_sparse(state: State, columns: LatentColumns, unit: Tensor) -> None:
    """Add the non-zeros alone; latents with implicit zeros are summed from 0, then shifted."""
    minimum, counts = state["minimum"], columns.counts()
    explicit = counts == columns.n_rows
    origin = torch.where(explicit, minimum, torch.zeros_like(minimum))
    values = columns.values
    if bool(origin.any()):
        values = values - origin[columns.features]
    _add_weighted(state["weighted"], columns, values, counts, unit)
    powers = torch.zeros_like(state["powers"])
    power = values.clone()
    for order in range(N_POWERS):
        powers[order].index_add_(0, columns.features, power)
        power *= values
    delta = torch.where(explicit, torch.zeros_like(minimum), -minimum)
    state["powers"] += shift_powers(powers, columns.n_rows, delta)
    if bool(delta.any()):
        _add_outer(state["weighted"], delta, unit.sum(0))


def _add_weighted(
    weighted: Tensor, columns: LatentColumns, values: Tensor, counts: Tensor, unit: Tensor
) -> None:
    """Add ``values^T unit`` to ``weighted`` ``[k, d]``, in place and without a copy of its size."""
    ends, present = counts.cumsum(0), counts.nonzero().squeeze(1)
    many = present.numel() > columns.n_features // 4 and values.numel() < 2**31
    # MKL's product is quicker, but reads and writes every row of the sums.
    if many and unit.device.type == "cpu" and torch.backends.mkl.is_available():
        starts = torch.cat([ends.new_zeros(1), ends]).int()
        shape = (columns.n_features, columns.n_rows)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse (CSR tensor|invariant)")
            transposed = torch.sparse_csr_tensor(starts, columns.rows.int(), values, size=shape)
        weighted.addmm_(transposed, unit)
        return
    step = max(1, CHUNK_ELEMENTS // max(1, unit.shape[1]))
    for start in range(0, present.numel(), step):
        features = present[start : start + step]
        first, last = int(features[0]), int(features[-1])
        inside = slice(int(ends[first] - counts[first]), int(ends[last]))
        sums = F.embedding_bag(
            columns.rows[inside],
            unit,
            (ends - counts)[features] - inside.start,
            mode="sum",
            per_sample_weights=values[inside],
        )
        weighted.index_add_(0, features, sums)


def move_minimum(state: State, minimum: Tensor) -> None:
    """Make the pair sums relative to a new, lower minimum, in place.

    ``state["n_images"]`` and ``state["embedding_sum"]`` must still describe the images summed.
    """
    n_images = int(state["n_images"])
    if n_images:
        delta = state["minimum"] - minimum
        state["powers"].copy_(shift_powers(state["powers"], n_images, delta))
        _add_outer(state["weighted"], delta, state["embedding_sum"])
    state["minimum"] = minimum.clone()


def shift_powers(powers: Tensor, n_images: int, delta: Tensor) -> Tensor:
    """Return the sums of (b + delta)^p for p = 1..4 from ``powers`` ``[4, k]``, those of b^p."""
    if not bool(delta.any()):
        return powers
    with_zeroth = [torch.full_like(delta, n_images), *powers]
    return torch.stack(
        [
            sum(
                (math.comb(order, j) * delta ** (order - j) * with_zeroth[j] for j in range(order)),
                start=with_zeroth[order],
            )
            for order in range(1, N_POWERS + 1)
        ]
    )


def _add_outer(weighted: Tensor, delta: Tensor, embedding_sum: Tensor) -> None:
    step = max(1, CHUNK_ELEMENTS // max(1, embedding_sum.numel()))
    for moved in torch.split(delta.nonzero().squeeze(1), step):
        weighted.index_add_(0, moved, torch.outer(delta[moved], embedding_sum))


def merge_image_sums(first: State, second: State) -> State:
    """Add two sets of image sums."""
    return {name: first[name] + second[name] for name in empty_image_sums(0)}


def merge_ranges(first: State, second: State) -> State:
    """Join two sets of ranges."""
    return {
        "minimum": torch.minimum(first["minimum"], second["minimum"]),
        "maximum": torch.maximum(first["maximum"], second["maximum"]),
        "n_active": first["n_active"] + second["n_active"],
    }


def merge_moments(first: State, second: State) -> State:
    """Merge image sums, ranges and pair sums of two shards without changing either."""
    ranges = merge_ranges(first, second)
    moved = {**first, "powers": first["powers"].clone(), "weighted": first["weighted"].clone()}
    move_minimum(moved, ranges["minimum"])
    powers, weighted = moved["powers"], moved["weighted"].add_(second["weighted"])
    n_images = int(second["n_images"])
    if n_images:
        delta = second["minimum"] - ranges["minimum"]
        powers += shift_powers(second["powers"], n_images, delta)
        _add_outer(weighted, delta, second["embedding_sum"])
    sums = merge_image_sums(first, second)
    return {**sums, **ranges, "powers": powers, "weighted": weighted}
