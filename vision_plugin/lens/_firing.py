"""Where latents fire: the entries above 0, latent by latent, the largest first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Firing:
    """The images on which each latent is above 0; everything else counts as not firing.

    Attributes:
        n_images: Number of images.
        starts: Place of each latent's first entry, and the number of entries, ``[d_sae + 1]``.
        images: Image of each entry; those of one latent by value, the largest first, of equals the
            earlier image.
        values: Value of each entry.
    """

    n_images: int
    starts: Int[Tensor, " latents_and_one"]
    images: Int[Tensor, " entries"]
    values: Float[Tensor, " entries"]

    @classmethod
    def of(cls, latents: Tensor) -> Firing:
        """Return where latents ``[n, d_sae]`` fire: dense, sparse COO or sparse CSR."""
        if latents.layout == torch.strided:
            rows, columns = torch.nonzero(latents > 0, as_tuple=True)
            values = latents[rows, columns]
        else:
            found = latents if latents.layout == torch.sparse_coo else latents.to_sparse_coo()
            (rows, columns), values = found.coalesce().indices(), found.coalesce().values()
            positive = values > 0
            rows, columns, values = rows[positive], columns[positive], values[positive]
        n_images, d_sae = latents.shape
        return cls._sorted(n_images, d_sae, rows, columns, values)

    @classmethod
    def _sorted(
        cls, n_images: int, d_sae: int, images: Tensor, latents: Tensor, values: Tensor
    ) -> Firing:
        order = torch.sort(values, descending=True, stable=True).indices
        order = order[torch.sort(latents[order], stable=True).indices]
        counts = torch.bincount(latents, minlength=d_sae)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        return cls(n_images, starts, images[order], values[order])

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.starts) - 1

    @property
    def counts(self) -> Int[Tensor, " d_sae"]:
        """Number of images on which each latent fires."""
        return self.starts.diff()

    @property
    def latents(self) -> Int[Tensor, " entries"]:
        """Latent of each entry."""
        return torch.repeat_interleave(torch.arange(self.d_sae), self.counts)

    @property
    def ranks(self) -> Int[Tensor, " entries"]:
        """Place of each entry among those of its latent, from 0."""
        return torch.arange(len(self.images)) - self.starts[:-1].repeat_interleave(self.counts)

    def top(self, n: int) -> Int[Tensor, "d_sae n"]:
        """Return each latent's images, the largest first; ``n_images`` where it has fewer."""
        ranks, latents = self.ranks, self.latents
        kept = ranks < n
        found = torch.full((self.d_sae, n), self.n_images)
        found[latents[kept], ranks[kept]] = self.images[kept]
        return found

    def on(self, images: Int[Tensor, " chosen"]) -> Firing:
        """Return the same for some of the images, which are numbered anew in this order."""
        place = torch.full((self.n_images,), -1)
        place[images] = torch.arange(len(images))
        return self._kept(place[self.images] >= 0, len(images), place)

    def above(self, thresholds: Float[Tensor, " d_sae"]) -> Firing:
        """Return the entries above a threshold of each latent."""
        kept = self.values > thresholds.repeat_interleave(self.counts)
        return self._kept(kept, self.n_images, torch.arange(self.n_images))

    def _kept(self, kept: Bool[Tensor, " entries"], n_images: int, place: Tensor) -> Firing:
        return self._sorted(
            n_images, self.d_sae, place[self.images[kept]], self.latents[kept], self.values[kept]
        )

    def thresholds(self, largest_share: float = 0.5) -> Float[Tensor, " d_sae"]:
        """Return the value above which a latent counts as firing.

        It is 0, unless the latent is above 0 on more than ``largest_share`` of the images: then it
        is the value that this share of the images lies above, as a neuron's median.
        """
        most = int(largest_share * self.n_images)
        found = torch.zeros(self.d_sae, dtype=self.values.dtype)
        dense = self.counts > most
        found[dense] = self.values[self.starts[:-1][dense] + most]
        return found
