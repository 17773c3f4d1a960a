"""The images on which each latent is largest, streamed and merged."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vision_plugin.metrics._latents import LatentColumns, Latents
from vision_plugin.metrics._streaming import State

TopRange = Literal["dataset", "top"]

N_TOP = 16
"""Images per latent in the top-image definition."""

VOID = -torch.inf
"""Value of a place without an image."""


def top_values(latents: Latents, n_top: int) -> tuple[Tensor, Tensor]:
    """Return each latent's largest values and their rows, both ``[k, n_top]``, largest first.

    Ties go to the smaller row. Free places hold :data:`VOID` and row -1.
    """
    if isinstance(latents, LatentColumns):
        if bool((latents.values < 0).any()):
            dense = latents.to_dense(torch.arange(latents.n_features, device=latents.rows.device))
            return _top_dense(dense, n_top)
        return _top_sparse(latents, n_top)
    return _top_dense(latents, n_top)


def merge_top(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the largest entries of two top lists; at a tie the first list's come first."""
    values = torch.cat([first[0], second[0]], dim=1)
    ids = torch.cat([first[1], second[1]], dim=1)
    values, order = torch.sort(values, dim=1, descending=True, stable=True)
    n_top = first[0].shape[1]
    return values[:, :n_top].contiguous(), ids.gather(1, order[:, :n_top])


def _top_sparse(columns: LatentColumns, n_top: int) -> tuple[Tensor, Tensor]:
    """Rank the non-zeros, all positive, and after them the rows of the zeros."""
    counts = columns.counts()
    values, rows = _first_zeros(columns, counts, n_top)
    order = torch.sort(columns.values, descending=True, stable=True).indices
    order = order[torch.sort(columns.features[order], stable=True).indices]
    features = columns.features[order]
    place = _places(features, counts)
    kept = place < n_top
    features, place, order = features[kept], place[kept], order[kept]
    values[features, place] = columns.values[order]
    rows[features, place] = columns.rows[order]
    return values, rows


def _first_zeros(columns: LatentColumns, counts: Tensor, n_top: int) -> tuple[Tensor, Tensor]:
    """Return lists ``[k, n_top]`` with each latent's first zeros after places for its non-zeros.

    Zero number ``j`` is in row ``j`` plus the number of non-zeros above it: those with at most
    ``j`` zeros above them.
    """
    zeros_above = columns.rows - _places(columns.features, counts)
    near = zeros_above < n_top
    flat = columns.features[near] * n_top + zeros_above[near]
    above = torch.bincount(flat, minlength=columns.n_features * n_top)
    down = above.view(columns.n_features, n_top).cumsum(1)
    place = torch.arange(n_top, device=counts.device).expand_as(down)
    row = (place + down).gather(1, (place - counts[:, None]).clamp(min=0))
    found = (place >= counts[:, None]) & (row < columns.n_rows)
    values = torch.where(found, 0.0, VOID).to(torch.float64)
    return values, torch.where(found, row, -1)


def _places(features: Tensor, counts: Tensor) -> Tensor:
    """Return each entry's place among the entries of its latent, for entries sorted by latent."""
    first = counts.cumsum(0) - counts
    return torch.arange(features.numel(), device=features.device) - first[features]


def _top_dense(latents: Tensor, n_top: int) -> tuple[Tensor, Tensor]:
    n_rows, n_features = latents.shape
    values = torch.full((n_features, n_top), VOID, dtype=torch.float64, device=latents.device)
    rows = torch.full((n_features, n_top), -1, device=latents.device)
    found = min(n_rows, n_top)
    step = max(1, 2**24 // max(1, n_rows))
    for start in range(0, n_features, step):
        columns = latents[:, start : start + step].T.contiguous()
        ranked, order = torch.sort(columns, dim=1, descending=True, stable=True)
        values[start : start + step, :found] = ranked[:, :found].double()
        rows[start : start + step, :found] = order[:, :found]
    return values, rows


def top_weight_sums(
    state: State, embeddings: Tensor, *, n_powers: int, top_range: TopRange
) -> tuple[Tensor, Tensor]:
    """Return power sums of the top images' weights, and the squared norm of the weighted sum.

    Args:
        state: states ``top_value``, ``top_image``, ``minimum`` and ``n_images``.
        embeddings: unit embeddings of all images, ``[n, d]``.
        n_powers: number of power sums.
        top_range: whether weights start at the minimum of the data set or of the top images.
    """
    n_top = min(N_TOP, int(state["n_images"]))
    value, image = state["top_value"][:, :n_top], state["top_image"][:, :n_top]
    low = state["minimum"] if top_range == "dataset" else value.amin(1)
    weight = value - low[:, None]
    powers = torch.stack([(weight**power).sum(1) for power in range(1, n_powers + 1)])
    step = max(1, 2**24 // (n_top * embeddings.shape[1]))
    squared_norm = [
        torch.einsum("kt,ktd->kd", weight[start : start + step], embeddings[chosen]).square().sum(1)
        for start in range(0, value.shape[0], step)
        for chosen in [image[start : start + step].clamp(min=0)]
    ]
    return powers, torch.cat(squared_norm)
