"""Statistics of each latent from one pass over the images: top images, a sample, counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

BINS_PER_OCTAVE = 2
LOWEST_OCTAVE, HIGHEST_OCTAVE = -16, 16
N_BINS = (HIGHEST_OCTAVE - LOWEST_OCTAVE) * BINS_PER_OCTAVE
"""Bins of the activation histograms: half octaves from 2^-16 to 2^16, the outer two open."""


@dataclass(frozen=True)
class Ranking:
    """Some images per latent, ``[d_sae, n]`` each; a free place has image -1 and value 0."""

    images: Int[Tensor, "d_sae n"]
    values: Float[Tensor, "d_sae n"]


@dataclass(frozen=True)
class LatentSummary:
    """Statistics of every latent."""

    n_images: int
    top: Ranking
    """The images on which the latent is largest, largest first."""
    sample: Ranking
    """Images drawn evenly from those on which it fires, largest first."""
    n_fired: Int[Tensor, " d_sae"]
    """Number of images on which it fires."""
    histogram: Int[Tensor, "d_sae n_bins"]
    """Its positive values on images, counted in half octaves."""
    total: Float[Tensor, " d_sae"]
    """Sum of its positive values over images."""

    @property
    def d_sae(self) -> int:
        """Return the number of latents."""
        return len(self.n_fired)

    @property
    def frequency(self) -> Float[Tensor, " d_sae"]:
        """Return the share of images on which each latent fires, in float64."""
        return self.n_fired.double() / max(1, self.n_images)


class LatentStatistics:
    """Collect a :class:`LatentSummary` from image-level latents, a few images at a time.

    Memory is d_sae x (n_top + n_sample + 64) numbers, whatever the number of images. A latent
    fires where it is above 0. Ties go to the earlier image. The evaluation's loop feeds it like a
    metric.
    """

    sparse_latents = True

    def __init__(self, d_sae: int, *, n_top: int, n_sample: int, seed: int = 0) -> None:
        self.d_sae, self.seed = d_sae, seed
        self._top = _Running(d_sae, n_top)
        self._sample = _Running(d_sae, n_sample)
        self._n_fired = torch.zeros(d_sae, dtype=torch.int64)
        self._histogram = torch.zeros(d_sae * N_BINS, dtype=torch.int32)
        self._total = torch.zeros(d_sae, dtype=torch.float64)
        self._n_images = 0

    def update(self, latents: Float[Tensor, "b d_sae"], image_indices: Int[Tensor, " b"]) -> None:
        """Add the latents of some images.

        Args:
            latents: Image-level latents, dense or sparse COO.
            image_indices: Numbers of the images in the source; later calls must have larger ones.
        """
        rows, features, values = positive(latents)
        images = image_indices
        self._n_images += len(images)
        self._n_fired += torch.bincount(features, minlength=self.d_sae)
        self._total.index_add_(0, features, values.double())
        self._count(features, values)
        numbers = images[rows]
        self._top.merge(features, values, values, numbers)
        keys = _sampling_keys(images, self.seed)[rows]
        self._sample.merge(features, keys, values, numbers)

    def shown(self, features: Int[Tensor, " f"]) -> Int[Tensor, "f n"]:
        """Return the images, -1 at free places, that some latents would show after those so far."""
        return torch.cat([self._top.images[features], self._sample.images[features]], dim=1)

    def state(self) -> dict[str, Tensor]:
        """Return all that was counted so far, by name."""
        counted = {"fired": self._n_fired, "histogram": self._histogram, "total": self._total}
        counted["n_images"] = torch.tensor(self._n_images)
        return {**counted, **self._top.state("top"), **self._sample.state("sample")}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""
        self._n_fired, self._histogram = state["fired"], state["histogram"]
        self._total, self._n_images = state["total"], int(state["n_images"])
        self._top.restore("top", state)
        self._sample.restore("sample", state)

    def compute(self) -> LatentSummary:
        """Return the statistics of all images so far."""
        return LatentSummary(
            n_images=self._n_images,
            top=self._top.ranking(),
            sample=self._sample.ranking(by_value=True),
            n_fired=self._n_fired,
            histogram=self._histogram.reshape(self.d_sae, N_BINS),
            total=self._total,
        )

    def _count(self, features: Tensor, values: Tensor) -> None:
        octave = torch.log2(values.double()) - LOWEST_OCTAVE
        bins = (octave * BINS_PER_OCTAVE).floor().long().clamp(0, N_BINS - 1)
        ones = torch.ones(1, dtype=torch.int32).expand(len(bins))
        self._histogram.scatter_add_(0, features * N_BINS + bins, ones)


def positive(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return row, latent and value of every positive entry, row by row, on the CPU."""
    if latents.is_sparse:
        entries = latents.coalesce()
        (rows, features), values = entries.indices(), entries.values()
        kept = values > 0
        rows, features, values = rows[kept], features[kept], values[kept]
    else:
        rows, features = (latents > 0).nonzero(as_tuple=True)
        values = latents[rows, features]
    return rows.cpu(), features.cpu(), values.float().cpu()


class _Running:
    """The ``n`` entries of highest priority per latent, of all seen so far."""

    def __init__(self, d_sae: int, n: int) -> None:
        self.n = n
        self.priorities = torch.zeros(d_sae, n)
        self.values = torch.zeros(d_sae, n)
        self.images = torch.full((d_sae, n), -1, dtype=torch.int64)

    def merge(self, features: Tensor, priorities: Tensor, values: Tensor, images: Tensor) -> None:
        """Add entries ``[m]`` with priorities above 0."""
        if self.n == 0:
            return
        # Only entries above the last place can enter; soon they are few.
        strong = priorities > self.priorities[features, -1]
        features, priorities = features[strong], priorities[strong]
        values, images = values[strong], images[strong]
        touched = features.unique()
        places = self.images[touched] >= 0
        held = touched[:, None].expand(-1, self.n)[places]
        features = torch.cat([held, features])
        priorities = torch.cat([self.priorities[touched][places], priorities])
        values = torch.cat([self.values[touched][places], values])
        images = torch.cat([self.images[touched][places], images])
        order = torch.sort(priorities, descending=True, stable=True).indices
        order = order[torch.sort(features[order], stable=True).indices]
        features = features[order]
        counts = torch.bincount(features, minlength=len(self.images))
        place = torch.arange(len(features)) - (counts.cumsum(0) - counts)[features]
        kept = place < self.n
        where, order = (features[kept], place[kept]), order[kept]
        self.priorities[where] = priorities[order]
        self.values[where] = values[order]
        self.images[where] = images[order]

    def state(self, name: str) -> dict[str, Tensor]:
        """Return the entries by name."""
        parts = {"priorities": self.priorities, "values": self.values, "images": self.images}
        return {f"{name}_{part}": values for part, values in parts.items()}

    def restore(self, name: str, state: dict[str, Tensor]) -> None:
        """Go on from a state."""
        self.priorities, self.values = state[f"{name}_priorities"], state[f"{name}_values"]
        self.images = state[f"{name}_images"]

    def ranking(self, *, by_value: bool = False) -> Ranking:
        """Return the entries by priority, or by value, highest first."""
        if not by_value:
            return Ranking(self.images, self.values)
        values, order = torch.sort(self.values, dim=1, descending=True, stable=True)
        return Ranking(self.images.gather(1, order), values)


def _sampling_keys(images: Tensor, seed: int) -> Tensor:
    """Return a pseudo-random number in (0, 1] per image, the same in every run.

    The same images rank high for all latents, so that they share thumbnails; within one latent
    the sample is even.
    """
    x = (images + 1) * 0x9E3779B1 + seed * 0x85EBCA6B
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    x = x ^ (x >> 16)
    # float32 holds 24 bits exactly.
    return ((x & 0xFFFFFF) + 1).float() / (1 << 24)
