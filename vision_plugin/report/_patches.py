"""What fires at every patch of some images, for the image page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

PER_PATCH, PER_IMAGE = 8, 16
_LEVELS = 255


@dataclass(frozen=True)
class ImageRecord:
    """The strongest features of one image."""

    latents: list[list[int]]
    """At each patch, strongest first; fewer where fewer fire."""
    values: list[list[float]]
    summed: list[tuple[int, float, float]]
    """Feature, its sum over the image's tokens, and its largest value at a patch."""
    maps: list[list[int]]
    """Values of these features at the patches, from 0 to 255 for the largest at a patch."""


class PatchRecorder:
    """Record the strongest features of some images, as the second pass comes to them."""

    def __init__(self, wanted: Sequence[int], features: Sequence[int], d_sae: int) -> None:
        """Choose the images and the features.

        Args:
            wanted: Numbers of the images.
            features: Latents that have a page; others are not recorded.
            d_sae: Number of latents.
        """
        self.wanted = frozenset(wanted)
        self._chosen = torch.as_tensor(list(features))
        self._are_all = len(features) == d_sae
        self.found: dict[int, dict[str, Tensor]] = {}

    def add(
        self, number: int, tokens: Float[Tensor, "tokens d_sae"], patches: Float[Tensor, "p d_sae"]
    ) -> None:
        """Record an image.

        Args:
            number: Its number.
            tokens: Latents of all selected tokens.
            patches: Latents of its patches.
        """
        if not self._are_all:
            chosen = self._chosen.to(tokens.device)
            tokens, patches = tokens[:, chosen], patches[:, chosen]
        top = patches.float().clamp(min=0).topk(min(PER_PATCH, patches.shape[1]), dim=1)
        sums = tokens.float().clamp(min=0).sum(0).topk(min(PER_IMAGE, tokens.shape[1]))
        maps = patches.float().clamp(min=0)[:, sums.indices].T
        self.found[number] = {
            "latents": self._chosen[top.indices.cpu()],
            "values": top.values.cpu(),
            "summed": self._chosen[sums.indices.cpu()],
            "sums": sums.values.cpu(),
            "maps": maps.cpu().contiguous(),
        }

    def state(self) -> dict[str, Tensor]:
        """Return all that was recorded so far, by name."""
        return {
            f"image.{number}.{name}": value
            for number, parts in self.found.items()
            for name, value in parts.items()
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state."""
        for key, value in state.items():
            if key.startswith("image."):
                _, number, name = key.split(".")
                self.found.setdefault(int(number), {})[name] = value

    def records(self) -> dict[int, ImageRecord]:
        """Return the records by the number of the image, ascending."""
        return {number: _record(self.found[number]) for number in sorted(self.found)}


def _record(parts: dict[str, Tensor]) -> ImageRecord:
    counts = (parts["values"] > 0).sum(1).tolist()
    latents, values = parts["latents"].tolist(), parts["values"].tolist()
    n_summed = int((parts["sums"] > 0).sum())
    largest = parts["maps"].amax(1)
    levels = (parts["maps"] / largest[:, None].clamp(min=1e-30) * _LEVELS).round().int()
    return ImageRecord(
        [row[:n] for row, n in zip(latents, counts, strict=True)],
        [row[:n] for row, n in zip(values, counts, strict=True)],
        list(zip(parts["summed"].tolist(), parts["sums"].tolist(), largest.tolist(), strict=True))[
            :n_summed
        ],
        levels[:n_summed].tolist(),
    )
