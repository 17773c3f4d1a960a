"""Jackknife standard error of the monosemanticity score: leave out one image at a time.

An image that is at the latent's minimum has weight 0, so leaving it out changes nothing (the
minimum itself is held fixed). The others are visited in a second pass over the non-zeros, each at
the cost of one dot product:

    numerator without i = numerator - b_i (e_i . W - b_i),    denominator likewise with sum b

where ``b`` are the latents above their minimum and ``W = sum b e``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vision_plugin.metrics._latents import LatentColumns, Latents, row_chunks

ENTRIES_AT_ONCE = 2**15


@dataclass(frozen=True)
class PairSums:
    """Smallest value, sum of b, W, and the score's numerator and denominator of each latent."""

    minimum: Tensor
    total: Tensor
    weighted: Tensor
    numerator: Tensor
    denominator: Tensor
    smallest_share: float
    """Below this share of ``total**2`` a denominator counts as 0."""


def jackknife_error(latents: Latents, unit: Tensor, sums: PairSums) -> Tensor:
    """Return the standard error of each score, ``[k]``; NaN where a left-out score is undefined."""
    n_images = unit.shape[0]
    score = sums.numerator / sums.denominator
    change, change_squared = torch.zeros_like(score), torch.zeros_like(score)
    undefined = torch.zeros_like(score, dtype=torch.bool)
    for features, b, dots in _weights(latents, unit, sums):
        numerator = sums.numerator[features] - b * (dots - b)
        rest = sums.total[features] - b
        denominator = sums.denominator[features] - b * rest
        counts = b > 0
        bad = counts & (denominator <= sums.smallest_share * rest * rest)
        difference = torch.where(counts & ~bad, numerator / denominator - score[features], 0.0)
        change.index_add_(0, features, difference)
        change_squared.index_add_(0, features, difference * difference)
        undefined[features[bad]] = True
    spread = (change_squared - change * change / n_images).clamp(min=0)
    error = (spread * (n_images - 1) / n_images).sqrt()
    return torch.where(undefined, torch.full_like(error, math.nan), error)


def _weights(
    latents: Latents, unit: Tensor, sums: PairSums
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield (features, b, e . W), flat, for every entry whose weight may not be 0."""
    if isinstance(latents, LatentColumns):
        at_zero = sums.minimum == 0
        sparse = at_zero[latents.features].nonzero().squeeze(1)
        for part in torch.split(sparse, ENTRIES_AT_ONCE):
            features, rows = latents.features[part], latents.rows[part]
            dots = (unit[rows] * sums.weighted[features]).sum(1)
            yield features, latents.values[part], dots
        moved = (~at_zero).nonzero().squeeze(1)
        step = max(1, 2**22 // max(1, latents.n_rows))
        for features in torch.split(moved, step) if moved.numel() else ():
            yield from _dense_weights(latents.to_dense(features), features, unit, sums)
        return
    yield from _dense_weights(
        latents, torch.arange(latents.shape[1], device=latents.device), unit, sums
    )


def _dense_weights(
    columns: Tensor, features: Tensor, unit: Tensor, sums: PairSums
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for start, stop in row_chunks(columns.shape[0], 8 * columns.shape[1]):
        b = columns[start:stop].double() - sums.minimum[features]
        dots = unit[start:stop] @ sums.weighted[features].T
        yield features.repeat(stop - start), b.reshape(-1), dots.reshape(-1)
