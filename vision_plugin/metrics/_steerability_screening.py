"""Adaptive steerability: every latent on a few images, the rest only for those still in doubt.

With ``v_i`` the change of all concepts' probabilities on image ``i``, the score on ``m`` of ``N``
images drawn without replacement is on average too large, because of the images' spread, so that

    |delta_m|^2 - V (1/m - 1/N),    V = sum_i |v_i - delta_m|^2 / (m - 1)

estimates the score on all ``N`` without bias. Its standard deviation is, to first order (the
projection of a U-statistic, Hoeffding 1948), ``2 sqrt(Var(h) (1/m - 1/N))`` with ``h_i`` the mean
inner product of ``v_i`` with the other images' changes. A latent is dropped where the estimate plus
``margin`` standard deviations does not exceed the threshold. The number of images grows from stage
to stage; every image is run below the hook once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vision_plugin.steering import Shift, Steering

__all__ = ["Screening"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Screening:
    """How an adaptive run drops latents.

    Attributes:
        first: number of images that every latent is steered on; at least 3.
        growth: factor from one stage's number of images to the next.
        margin: standard deviations by which a latent's estimate must lie below the threshold for it
            to be dropped; a larger margin is slower and misses fewer latents.
        seed: seed of the order of the images.

    Examples:
        >>> list(vp.metrics.Screening(first=4).stages(20))
        [(0, 4), (4, 8), (8, 16), (16, 20)]
    """

    first: int = 12
    growth: float = 2.0
    margin: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.first < 3:
            raise ValueError(f"first={self.first}: the spread over images needs at least 3 images")
        if self.growth <= 1:
            raise ValueError(f"growth={self.growth} must exceed 1, so that the stages end")
        if self.margin < 0:
            raise ValueError(f"margin={self.margin} must not be negative")

    def stages(self, n_images: int) -> Iterator[tuple[int, int]]:
        """Yield growing ranges of images until all are in one."""
        start, stop = 0, min(self.first, n_images)
        while start < n_images:
            yield start, stop
            start, stop = stop, min(n_images, max(stop + 1, int(stop * self.growth)))


@dataclass(frozen=True)
class Screened:
    """What screening found out about each latent.

    Attributes:
        delta: mean changes over the images seen, ``[k, c]``.
        n_seen: number of images seen, ``[k]``.
        score: unbiased estimate of the sum of squares over all images, ``[k]``, float64.
    """

    delta: Tensor
    n_seen: Tensor
    score: Tensor


def screen(
    steering: Steering,
    pixels: Tensor,
    latents: Tensor,
    strength: float,
    *,
    threshold: float,
    screening: Screening,
) -> Screened:
    """Steer every latent on as many images as it takes to decide on it."""
    n_images = len(pixels)
    generator = torch.Generator().manual_seed(screening.seed)
    order = torch.randperm(n_images, generator=generator)
    sums = _Sums.empty(len(latents), steering.texts)
    alive = torch.arange(len(latents))
    for start, stop in screening.stages(n_images):
        for prepared in steering.prepare(pixels[order[start:stop].to(pixels.device)]):
            sums.add(alive, steering.shift(prepared, latents[alive], strength, spread=True))
        if stop == n_images:
            break
        alive = alive[sums.upper_bound(alive, n_images, screening.margin) > threshold]
        logger.info("%d of %d latents left after %d images", len(alive), len(latents), stop)
        if not len(alive):
            break
    delta = sums.total / sums.n_seen.to(sums.total)[:, None]
    score = sums.upper_bound(torch.arange(len(latents)), n_images, 0.0)
    return Screened(delta, sums.n_seen, score.clamp(min=0))


@dataclass
class _Sums:
    """Sums over the images that each latent was steered on; all but ``total`` are ``[k]``."""

    total: Tensor
    squares: Tensor
    agreement: Tensor
    freedom: Tensor
    n_seen: Tensor

    @classmethod
    def empty(cls, n_latents: int, texts: Tensor) -> _Sums:
        zero = torch.zeros(n_latents, dtype=torch.float64)
        n_seen = torch.zeros(n_latents, dtype=torch.long)
        total = texts.new_zeros(n_latents, len(texts))
        return cls(total, zero, zero.clone(), zero.clone(), n_seen)

    def add(self, latents: Tensor, shift: Shift) -> None:
        assert shift.spread is not None
        self.total.index_add_(0, latents.to(self.total.device), shift.total)
        self.squares[latents] += shift.spread.squares.cpu()
        self.agreement[latents] += shift.spread.agreement.cpu()
        self.freedom[latents] += shift.n_images - 1
        self.n_seen[latents] += shift.n_images

    def upper_bound(self, latents: Tensor, n_images: int, margin: float) -> Tensor:
        """Return the estimate of the score on all images, plus ``margin`` standard deviations."""
        seen = self.n_seen[latents].double()
        chosen = self.total[latents.to(self.total.device)].double()
        score = chosen.square().sum(1).cpu() / seen.square()
        left = 1 / seen - 1 / n_images
        variance = (self.squares[latents] - seen * score).clamp(min=0) / (seen - 1)
        freedom = self.freedom[latents]
        measured = self.agreement[latents] / freedom.clamp(min=1)
        # Batches of one image say nothing about h, whose variance cannot exceed |delta|^2 V.
        agreement = torch.where(freedom > 0, measured, score * variance)
        return score - variance * left + margin * 2 * (agreement * left).sqrt()
