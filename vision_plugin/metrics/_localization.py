"""Localization: are a latent's active patches neighbours? Moran's I on the patch grid.

Moran (1950, Biometrika 37:17), with the eight neighbours of each patch weighing 1, as VISAEBench
uses it for vision SAEs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin.metrics._latents import LatentColumns, read_latents
from vision_plugin.metrics._result import MetricResult, mean_of_defined, median_of_defined
from vision_plugin.metrics._streaming import StreamingMetric

__all__ = ["Localization", "LocalizationResult", "morans_i"]

NON_LOCALIZED_BELOW = 0.1
SMALLEST_VARIATION = 1e-10
"""Sum of squared deviations at or below which a map counts as flat (VISAEBench's bound)."""


@dataclass(frozen=True)
class LocalizationResult(MetricResult):
    """Moran's I of ``k`` latents.

    Attributes:
        score: mean of Moran's I over the images that count, NaN for latents with too few of them.
            1 for one patch of activity, 0 for scattered patches, negative for a checkerboard.
        n_valid: number of images that count, per latent.
        min_images: fewest images of a latent that has a score.

    Examples:
        >>> maps = torch.zeros(1, 16, 1)
        >>> maps[0, [0, 1, 4, 5]] = torch.tensor([[1.0], [1.0], [1.0], [2.0]])
        >>> metric = vp.metrics.Localization(
        ...     n_features=1, grid_size=(4, 4), min_active_patches=2, min_images=1
        ... )
        >>> metric.update(maps)
        >>> metric.compute().n_valid.tolist()
        [1]
    """

    headline = ("mean_score", "share_non_localized", "n_defined")

    score: Float[Tensor, " k"]
    n_valid: Int[Tensor, " k"]
    min_images: int

    def summary(self) -> dict[str, float | int]:
        """Return mean and median over scored latents, and how many there are."""
        scored = self.score[~self.score.isnan()]
        below = (scored < NON_LOCALIZED_BELOW).double()
        return {
            "mean_score": mean_of_defined(scored),
            "median_score": median_of_defined(scored),
            "share_non_localized": mean_of_defined(below),
            "n_features": self.score.numel(),
            "n_defined": scored.numel(),
            "n_never_valid": int((self.n_valid == 0).sum()),
        }


class Localization(StreamingMetric):
    r"""Mean Moran's I of each latent's activation maps.

        I = (P / S) sum_pq W_pq c_p c_q / sum_p c_p^2,    c = activations less their mean

    over the ``P`` patches, ``W`` the 8-neighbour weights and ``S`` their sum. An image counts for a
    latent that fires on some patches, not too few and not nearly all, and not with equal strength
    on all. Only such (image, latent) pairs are computed.

    VISAEBench stops near 200 images per latent (``max_images=200`` with updates of 64 images is its
    exact rule). There is no cap by default, since a cap depends on the order of the images.

    Args:
        n_features: number of latents.
        grid_size: rows and columns of patches.
        min_active_patches: fewest active patches of an image that counts.
        max_active_fraction: largest share of active patches of an image that counts.
        min_images: fewest images of a latent that has a score.
        max_images: number of images after which a latent takes no further update.

    Examples:
        >>> maps = torch.zeros(1, 16, 1)  # 1 image, 4 x 4 patches, 1 latent: active in a corner
        >>> maps[0, [0, 1, 4, 5]] = torch.tensor([[1.0], [1.0], [1.0], [2.0]])
        >>> metric = vp.metrics.Localization(
        ...     n_features=1, grid_size=(4, 4), min_active_patches=2, min_images=1
        ... )
        >>> metric.update(maps)
        >>> round(metric.compute().score.item(), 3)
        0.283
    """

    sparse_latents = True
    higher_is_better = True
    latents_per = "patch"

    total: Tensor
    n_valid: Tensor

    def __init__(
        self,
        *,
        n_features: int,
        grid_size: tuple[int, int],
        min_active_patches: int = 5,
        max_active_fraction: float = 0.9,
        min_images: int = 50,
        max_images: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if min(grid_size) < 1 or math.prod(grid_size) < 2:
            raise ValueError(f"grid_size={grid_size} must hold at least two patches")
        self.n_features, self.grid_size = n_features, grid_size
        self.min_active_patches = min_active_patches
        self.max_active_patches = int(max_active_fraction * math.prod(grid_size))
        self.min_images, self.max_images = min_images, max_images
        self.add_state("total", torch.zeros(n_features, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("n_valid", torch.zeros(n_features, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, latents: Tensor) -> None:
        """Add images.

        Args:
            latents: patch latents ``[images, patches, n_features]`` dense, or
                ``[images * patches, n_features]`` dense, sparse COO or sparse CSR, image by image,
                patches row by row. No CLS or register tokens.

        Raises:
            ValueError: the number of patches does not fit the grid.
        """
        n_patches = math.prod(self.grid_size)
        if latents.ndim == 3:
            if latents.shape[1] != n_patches:
                raise ValueError(
                    f"latents have {latents.shape[1]} patches, but the grid "
                    f"{self.grid_size[0]} by {self.grid_size[1]} has {n_patches}; leave out CLS "
                    "and register tokens"
                )
            latents = latents.flatten(0, 1)
        read = read_latents(latents.detach().to(self.device), n_features=self.n_features)
        if latents.shape[0] % n_patches:
            raise ValueError(f"{latents.shape[0]} rows are not whole images of {n_patches} patches")
        if isinstance(read, Tensor):
            rows, features = read.nonzero(as_tuple=True)
            values = read[rows, features].double()
        else:
            rows, features, values = read.rows, read.features, read.values
        entries = LatentColumns(latents.shape[0], self.n_features, features, rows, values)
        closed = None if self.max_images is None else self.n_valid >= self.max_images
        for features, maps in self._maps(entries, n_patches, closed):
            score, varies = morans_i(maps)
            self.total.index_add_(0, features[varies], score[varies])
            self.n_valid += torch.bincount(features[varies], minlength=self.n_features)

    def _maps(
        self, entries: LatentColumns, n_patches: int, closed: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield latents and maps ``[pairs, height, width]`` of image-latent pairs that count."""
        n_images = entries.n_rows // n_patches
        pair_of_entry = entries.features * n_images + entries.rows // n_patches
        pairs, inverse, active = torch.unique(
            pair_of_entry, return_inverse=True, return_counts=True
        )
        counts = (active >= self.min_active_patches) & (active <= self.max_active_patches)
        if closed is not None:
            counts &= ~closed[pairs // n_images]
        place = torch.where(counts, counts.cumsum(0) - 1, -1)
        features = pairs[counts] // n_images
        slot, patch = place[inverse], entries.rows % n_patches
        step = max(1, 2**22 // n_patches)
        for start in range(0, features.numel(), step):
            size = min(step, features.numel() - start)
            inside = (slot >= start) & (slot < start + size)
            maps = entries.values.new_zeros(size, n_patches)
            maps[slot[inside] - start, patch[inside]] = entries.values[inside]
            yield features[start : start + size], maps.view(size, *self.grid_size)

    def compute(self) -> LocalizationResult:
        """Return the scores over all images seen, by all processes."""
        n_valid = self.n_valid.clone()
        score = self.total / n_valid
        enough = (n_valid >= self.min_images) & (n_valid > 0)
        return LocalizationResult(
            score=torch.where(enough, score, torch.full_like(score, math.nan)),
            n_valid=n_valid,
            min_images=self.min_images,
        )


def morans_i(
    maps: Float[Tensor, "n height width"],
) -> tuple[Float[Tensor, " n"], Tensor]:
    """Return Moran's I of each map under the 8-neighbour weights, and whether the map varies.

    Args:
        maps: one map per image, ``[n, height, width]``.

    Examples:
        >>> board = torch.tensor([[[1.0, 0, 1], [0, 1, 0], [1, 0, 1]]])
        >>> corner = torch.tensor([[[1.0, 1, 0], [1, 1, 0], [0, 0, 0]]])
        >>> index, varies = vp.metrics.morans_i(torch.cat([board, corner]))
        >>> [round(value, 3) for value in index.tolist()], varies.tolist()
        ([-0.19, 0.125], [True, True])
    """
    height, width = maps.shape[1:]
    ones = torch.ones(1, height, width, dtype=maps.dtype, device=maps.device)
    total_weight = _neighbour_sum(ones).sum()
    centred = maps - maps.mean((1, 2), keepdim=True)
    variation = centred.square().sum((1, 2))
    together = (centred * _neighbour_sum(centred)).sum((1, 2))
    score = height * width / total_weight * together / variation.clamp(min=SMALLEST_VARIATION)
    return score, variation > SMALLEST_VARIATION


def _neighbour_sum(maps: Tensor) -> Tensor:
    """Return the sum over the eight neighbours of each cell, fewer at the edges."""
    padded = F.pad(maps, (1, 1, 1, 1))
    rows = padded[:, :-2] + padded[:, 1:-1] + padded[:, 2:]
    return rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] - maps
