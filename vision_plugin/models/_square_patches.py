"""Preprocessing for towers whose native processor cuts each image to its own grid (NaFlex)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vision_plugin.models._processing import HuggingFaceImages
from vision_plugin.models._rgb import as_rgb


class SquarePatches(HuggingFaceImages):
    """The native processor on images made square, so that all images of a batch have one grid.

    The output is pixels; the bridge cuts them into patches, at this or any other size.
    """

    def __call__(self, images: Sequence[Image.Image]) -> Float[Tensor, "n c h w"]:
        """Resize to the largest square grid that the processor allows, and normalise as it does."""
        grid = int(self.processor.max_num_patches**0.5)
        patch = int(self.processor.patch_size)
        side = grid * patch
        square = [as_rgb(p).resize((side, side), self._resample()) for p in images]
        batch: Any = self.processor(images=square, max_num_patches=grid * grid, return_tensors="pt")
        patches: Tensor = batch["pixel_values"]
        cut = patches.reshape(len(square), grid, grid, patch, patch, -1)
        return torch.einsum("nijabc->nciajb", cut).reshape(len(square), -1, side, side)

    def _resample(self) -> Image.Resampling:
        return Image.Resampling(int(self.processor.resample))
