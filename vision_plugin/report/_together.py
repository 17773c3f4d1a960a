"""Latents that fire on the same images: correlations over images spread over the source."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin.report._statistics import positive

MOST_IMAGES, LEAST_IMAGES = 4096, 256
_MULTIPLICATIONS = 4e11
"""Work that the correlations may take: some 20 seconds on two cores."""
_BLOCK = 1024


def images_to_keep(n_images: int, n_features: int, d_other: int) -> list[int]:
    """Return the numbers of the images whose latents are kept, spread over the source."""
    affordable = int(_MULTIPLICATIONS / max(1, n_features * d_other))
    n = min(n_images, max(LEAST_IMAGES, min(MOST_IMAGES, affordable)))
    return sorted({int(i * n_images / n) for i in range(n)})


@dataclass(frozen=True)
class Kept:
    """Image-level latents of some images, as entries in order of the images."""

    n_images: int
    d_sae: int
    rows: Int[Tensor, " entries"]
    features: Int[Tensor, " entries"]
    values: Float[Tensor, " entries"]

    def columns(self, chosen: Int[Tensor, " n"]) -> Float[Tensor, "images n"]:
        """Return the latents of some columns, centred and scaled to norm 1; 0 if constant."""
        place = torch.full((self.d_sae,), -1)
        place[chosen] = torch.arange(len(chosen))
        to = place[self.features]
        kept = to >= 0
        dense = torch.zeros(self.n_images, len(chosen))
        dense[self.rows[kept], to[kept]] = self.values[kept]
        dense -= dense.mean(0, keepdim=True)
        norm = dense.norm(dim=0, keepdim=True)
        return torch.where(norm > 1e-6, dense / norm.clamp(min=1e-12), 0.0)


class KeptLatents:
    """Keep the latents of the images in a list; the loop feeds it like a metric."""

    sparse_latents = True

    def __init__(self, d_sae: int, numbers: list[int]) -> None:
        self.d_sae = d_sae
        self._row = {number: row for row, number in enumerate(numbers)}
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._seen: set[int] = set()

    def update(self, latents: Float[Tensor, "b d_sae"], image_indices: Int[Tensor, " b"]) -> None:
        """Add the latents of some images, dense or sparse COO."""
        to = torch.tensor([self._row.get(number, -1) for number in image_indices.tolist()])
        if not bool((to >= 0).any()):
            return
        rows, features, values = positive(latents)
        rows = to[rows]
        kept = rows >= 0
        self._parts.append((rows[kept], features[kept], values[kept]))
        self._seen |= set(to[to >= 0].tolist())

    def state(self) -> dict[str, Tensor]:
        """Return all that was kept so far, by name."""
        found = self._joined()
        names = ("kept_rows", "kept_features", "kept_values")
        seen = torch.tensor(sorted(self._seen), dtype=torch.int64)
        return {**dict(zip(names, found, strict=True)), "kept_seen": seen}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""
        self._parts = [(state["kept_rows"], state["kept_features"], state["kept_values"])]
        self._seen = set(state["kept_seen"].tolist())

    def compute(self) -> Kept:
        """Return the latents of the images that could be read."""
        rows, features, values = self._joined()
        order = torch.full((len(self._row),), -1)
        seen = torch.tensor(sorted(self._seen), dtype=torch.int64)
        order[seen] = torch.arange(len(seen))
        return Kept(len(seen), self.d_sae, order[rows], features, values)

    def _joined(self) -> tuple[Tensor, Tensor, Tensor]:
        nothing = torch.zeros(0, dtype=torch.int64)
        parts = [(nothing, nothing, torch.zeros(0)), *self._parts]
        rows, features, values = (torch.cat(part) for part in zip(*parts, strict=True))
        return rows, features, values


@dataclass(frozen=True)
class Partners:
    """Each latent's partners with the largest correlation over images, largest first."""

    latents: Int[np.ndarray, "features n"]
    correlations: Float[np.ndarray, "features n"]
    n_images: int


@torch.no_grad()
def partners(first: Kept, features: list[int], second: Kept, n: int) -> Partners | None:
    """Return the ``n`` latents of ``second`` that correlate most with each of some of ``first``.

    Args:
        first: Latents whose partners are wanted.
        features: Their numbers.
        second: Latents among which they are looked for, of the same images. If it is ``first``,
            a latent is not its own partner.
        n: Number of partners.

    Returns:
        None where fewer than 16 images were kept or no partner is wanted.
    """
    itself = first is second
    n = min(n, second.d_sae - itself)
    if n < 1 or first.n_images < 16:
        return None
    wanted = torch.tensor(features)
    best_value = torch.full((len(wanted), n), -math.inf)
    best_latent = torch.zeros((len(wanted), n), dtype=torch.int64)
    for other in torch.arange(second.d_sae).split(_BLOCK):
        columns = second.columns(other)
        for place in torch.arange(len(wanted)).split(_BLOCK):
            found = first.columns(wanted[place]).T @ columns
            if itself:
                found[wanted[place][:, None] == other[None]] = -math.inf
            values = torch.cat([best_value[place], found], 1)
            latents = torch.cat([best_latent[place], other.expand(len(place), -1)], 1)
            top = values.topk(n, dim=1)
            best_value[place] = top.values
            best_latent[place] = latents.gather(1, top.indices)
    return Partners(best_latent.numpy(), best_value.clamp(-1, 1).numpy(), first.n_images)
