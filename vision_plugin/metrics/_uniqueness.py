"""Uniqueness: how many pairs of latents share their top images (arXiv 2504.02821)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin.metrics._result import MetricResult
from vision_plugin.metrics._topimages import TopImages

__all__ = ["Uniqueness", "UniquenessResult", "uniqueness"]

THRESHOLDS = tuple(tenths / 10 for tenths in range(10))
PRODUCTS_AT_ONCE = 2**24
"""Upper bound on the multiply-adds of one block of the incidence product."""


@dataclass(frozen=True)
class UniquenessResult(MetricResult):
    """Overlap of the top-image sets of all pairs of latents.

    Attributes:
        thresholds: the Jaccard indices ``0, 0.1, ..., 0.9``.
        share_above: share of the pairs whose Jaccard index is strictly above each threshold.
        max_jaccard: each latent's largest index with any other; NaN for latents without images.
        mean_jaccard: mean Jaccard index over all pairs.
        n_pairs: number of pairs compared.
        n_features: number of latents.
        n_left_out: number of latents without a top image (dead), whose index would be 0/0.

    Examples:
        >>> found = vp.metrics.uniqueness(torch.tensor([[0, 1], [0, 2], [-1, -1]]))
        >>> found.max_jaccard.tolist(), found.n_left_out
        ([0.3333333333333333, 0.3333333333333333, nan], 1)
    """

    headline = ("mean_jaccard", "share_above_0", "share_above_0.5", "n_left_out")

    thresholds: tuple[float, ...]
    share_above: tuple[float, ...]
    max_jaccard: Float[Tensor, " k"]
    mean_jaccard: float
    n_pairs: int
    n_features: int
    n_left_out: int

    @property
    def score(self) -> Float[Tensor, " k"]:
        """Return ``1 - max_jaccard``: 1 for a latent that shares no top image with any other."""
        return 1 - self.max_jaccard

    def summary(self) -> dict[str, float | int]:
        """Return the shares above each threshold, the mean and the counts."""
        named = zip(self.thresholds, self.share_above, strict=True)
        shares = {f"share_above_{threshold:g}": share for threshold, share in named}
        return {**shares, **super().summary()}


def uniqueness(top_images: Int[Tensor, "k n_top"]) -> UniquenessResult:
    """Compare the top-image sets of all pairs of latents by their Jaccard index.

    The sizes of all intersections are the product of the sparse latent-by-image incidence matrix
    with its transpose, so only pairs that share an image cost anything.

    Args:
        top_images: image numbers ``[k, n_top]`` of each latent, -1 for none, as returned by
            :func:`top_images`. A repeated number counts once.

    Raises:
        ValueError: fewer than two latents have an image.

    Examples:
        >>> found = vp.metrics.uniqueness(torch.tensor([[0, 1], [0, 1], [2, 3]]))
        >>> found.score.tolist(), round(found.mean_jaccard, 3)
        ([0.0, 0.0, 1.0], 0.333)
    """
    incidence = _incidence(top_images)
    sizes = np.diff(incidence.indptr)
    used = int((sizes > 0).sum())
    if used < 2:
        raise ValueError(
            f"uniqueness compares pairs of latents, and {used} of {len(sizes)} have a top image"
        )
    above = np.zeros(len(THRESHOLDS), dtype=np.int64)
    largest = np.zeros(len(sizes))
    total = 0.0
    for start, stop in _blocks(incidence):
        common = incidence[start:stop] @ incidence.T
        rows = np.repeat(np.arange(start, stop), np.diff(common.indptr))
        others = rows != common.indices
        rows, columns, shared = rows[others], common.indices[others], common.data[others]
        jaccard = shared / (sizes[rows] + sizes[columns] - shared)
        above += [int((jaccard > threshold).sum()) for threshold in THRESHOLDS]
        total += float(jaccard.sum())
        np.maximum.at(largest, rows, jaccard)
    n_pairs = used * (used - 1) // 2
    largest[sizes == 0] = math.nan
    # Every pair was met twice, once from each side.
    return UniquenessResult(
        thresholds=THRESHOLDS,
        share_above=tuple(float(count) / 2 / n_pairs for count in above),
        max_jaccard=torch.from_numpy(largest),
        mean_jaccard=total / 2 / n_pairs,
        n_pairs=n_pairs,
        n_features=len(sizes),
        n_left_out=len(sizes) - used,
    )


class Uniqueness(TopImages):
    """Uniqueness of the latents' top images, streamed; see :func:`uniqueness`.

    Args:
        n_features: number of latents.
        n_top: size of the top-image sets, 16 in the paper.

    Examples:
        >>> metric = vp.metrics.Uniqueness(n_features=2, n_top=2)
        >>> metric.update(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
        >>> metric.compute().score.tolist()
        [1.0, 1.0]
    """

    higher_is_better = False

    def compute(self) -> UniquenessResult:
        """Return the overlap of the top images of all data seen, by all processes."""
        return uniqueness(self.top().images)


def _incidence(top_images: Tensor) -> Any:
    """Return the latent-by-image matrix (scipy CSR, int64) with a 1 per top image."""
    from scipy.sparse import csr_array

    images = np.sort(top_images.cpu().numpy().astype(np.int64), axis=1)
    first = np.ones_like(images, dtype=bool)
    first[:, 1:] = images[:, 1:] != images[:, :-1]
    kept = first & (images >= 0)
    indptr = np.concatenate([[0], kept.sum(1).cumsum()])
    # Renumber the images from 0, since their numbers may be large and far apart.
    used, columns = np.unique(images[kept], return_inverse=True)
    ones = np.ones(len(columns), dtype=np.int64)
    return csr_array((ones, columns, indptr), shape=(len(images), max(len(used), 1)))


def _blocks(incidence: Any) -> Iterator[tuple[int, int]]:
    """Yield row ranges whose products stay below the bound, by the latents per image."""
    per_image = np.bincount(incidence.indices, minlength=incidence.shape[1])
    per_entry: npt.NDArray[np.int64] = per_image[incidence.indices]
    cost = np.concatenate([[0], per_entry.cumsum()])[incidence.indptr]
    start = 0
    while start < incidence.shape[0]:
        stop = int(np.searchsorted(cost, cost[start] + PRODUCTS_AT_ONCE, side="right")) - 1
        stop = min(max(stop, start + 1), incidence.shape[0])
        yield start, stop
        start = stop
