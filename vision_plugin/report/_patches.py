"""What fires at every patch of some images, for the image page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
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
    """Record the strongest features of some images; the loop feeds it like a metric."""

    sparse_latents = True
    latents_per = "token"

    def __init__(
        self,
        wanted: Sequence[int],
        features: Sequence[int],
        d_sae: int,
        patch_columns: Int[Tensor, " patches"],
    ) -> None:
        """Choose the images and the features.

        Args:
            wanted: Numbers of the images.
            features: Latents that have a page; others are not recorded.
            d_sae: Number of latents.
            patch_columns: Places of the patches among the tokens.
        """
        self._columns = patch_columns
        self.wanted = frozenset(wanted)
        self._chosen = torch.as_tensor(list(features))
        self._are_all = len(features) == d_sae
        self.found: dict[int, dict[str, Tensor]] = {}

    def update(self, latents: Tensor, image_indices: Int[Tensor, " b"]) -> None:
        """Record those of some images that are wanted.

        Args:
            latents: Latents of the selected tokens, ``[b, tokens, d_sae]`` dense or ``[b * tokens,
                d_sae]`` sparse COO, image by image.
            image_indices: Numbers of the images.
        """
        n_tokens = latents.shape[:-1].numel() // len(image_indices)
        for place, number in enumerate(image_indices.tolist()):
            if number in self.wanted:
                rows = torch.arange(place * n_tokens, (place + 1) * n_tokens, device=latents.device)
                part = latents.index_select(0, rows) if latents.is_sparse else latents[place]
                self._add(number, part.to_dense() if part.is_sparse else part)

    def _add(self, number: int, tokens: Float[Tensor, "tokens d_sae"]) -> None:
        if not self._are_all:
            tokens = tokens[:, self._chosen.to(tokens.device)]
        patches = tokens[self._columns.to(tokens.device)]
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
