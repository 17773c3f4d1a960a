"""The images shown, as the model sees them, kept from the first pass as far as memory goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor

from vision_plugin.report._images import ModelView

_MOST_BYTES = 2**28


class Views:
    """Views of the images that features show so far; the loop feeds it like a metric.

    An image that is kept need not be read and prepared again. Those that do not fit are.
    """

    def __init__(
        self,
        view: ModelView,
        grid: tuple[int, int],
        shown: Callable[[Tensor], Tensor],
        latents: Int[Tensor, " f"],
    ) -> None:
        """Begin with none.

        Args:
            view: Turns pixels back into images.
            grid: Rows and columns of patches.
            shown: Returns the images ``[f, places]`` that some latents show so far, -1 for none.
            latents: Latents that have a page.
        """
        self.view, self.grid = view, grid
        self._shown, self._latents = shown, latents
        self.kept: dict[int, np.ndarray[Any, np.dtype[np.uint8]]] = {}

    def update(
        self, pixels: Float[Tensor, "b channels height width"], image_indices: Int[Tensor, " b"]
    ) -> None:
        """Keep the images that are shown now, and none that are shown no more if room is short."""
        numbers, shown = image_indices.numpy(), self._shown(self._latents).numpy()
        chosen = np.flatnonzero(np.isin(numbers, shown))
        if len(chosen) == 0:
            return
        arrays = self.view.arrays(self.covered(pixels[chosen]))
        room = _MOST_BYTES // arrays[0].nbytes
        if len(self.kept) + len(arrays) > room:
            still = set(np.unique(shown).tolist())
            self.kept = {n: array for n, array in self.kept.items() if n in still}
        free = max(0, room - len(self.kept))
        # Each is copied, so that the batch can go.
        pairs = zip(numbers[chosen][:free].tolist(), arrays, strict=False)
        self.kept.update({number: array.copy() for number, array in pairs})

    def covered(self, pixels: Tensor) -> Tensor:
        """Return the part of the pixels that patches cover; a remainder at far edges has none."""
        rows, columns = self.grid
        height, width = pixels.shape[-2:]
        return pixels[..., : height // rows * rows, : width // columns * columns]

    def of(self, pixels: Tensor) -> list[Image.Image]:
        """Return the views of some images."""
        return [Image.fromarray(array) for array in self.view.arrays(self.covered(pixels))]

    def take(self, number: int) -> Image.Image:
        """Return the view of an image that was kept, and keep it no longer."""
        return Image.fromarray(self.kept.pop(number))

    def state(self) -> dict[str, Tensor]:
        """Return nothing: what a killed build kept is read again."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Begin with none."""
