"""Images of any source with ids and labels, and the small copies that the pages show."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vision_plugin.images import label_text, open_images
from vision_plugin.models import as_rgb

logger = logging.getLogger(__name__)

LOSSLESS_BELOW = 128
"""Largest side, in pixels, of images kept as PNG, since JPEG would show on them."""


class ImageReader:
    """Images by number, with an id and a label each; unreadable ones are counted and left out."""

    def __init__(self, images: Any, *, max_bad_images: int) -> None:
        """Open the images.

        Args:
            images: An image source, a sequence of PIL images, or a path that ``open_images`` takes.
            max_bad_images: Number of unreadable images that are left out before an error.

        Raises:
            ValueError: there are no images.
        """
        if isinstance(images, (str, Path)):
            images = open_images(images)
        if len(images) == 0:
            raise ValueError("images= is empty: give at least one image to report on")
        self.images = images
        self.max_bad_images = max_bad_images
        self.bad: dict[int, str] = {}
        self._ids: Sequence[Any] | None = getattr(images, "ids", None)
        self.sequential = bool(getattr(images, "sequential", False))
        self._labels = None if self.sequential else getattr(images, "labels", None)
        self._label_of = getattr(images, "label", None) if self.sequential else None
        self._seen_labels: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> Image.Image | None:
        """Return image ``index`` in RGB; warn and return None if it cannot be read.

        Raises:
            ValueError: more than ``max_bad_images`` could not be read.
        """
        try:
            image = as_rgb(self.images[index])
        except (OSError, ValueError) as error:
            self._note(index, error)
            return None
        if self._label_of is not None:
            self._seen_labels[index] = label_text(self._label_of(index))
        return image

    def id(self, index: int) -> str:
        """Return the image's id; its number where the source has no ids."""
        return str(index) if self._ids is None else str(self._ids[index])

    def label(self, index: int) -> str:
        """Return the image's label, or an empty text."""
        if self._labels is not None:
            return label_text(self._labels[index])
        return self._seen_labels.get(index, "")

    def _note(self, index: int, error: Exception) -> None:
        if index in self.bad:
            return
        self.bad[index] = " ".join(str(error).split())[:200] or type(error).__name__
        logger.warning("image %s is left out: %s", self.id(index), self.bad[index])
        if len(self.bad) > self.max_bad_images:
            raise ValueError(
                f"{len(self.bad)} of {len(self)} images cannot be read, the last {self.id(index)}"
                f" ({self.bad[index]}): mend images=, or allow more with max_bad_images="
            ) from error


class ModelView:
    """Turn a model's pixels back into images: what the model sees, which its patches cover.

    Preprocessing may crop, squash and normalise in any way. The normalisation is read off the
    pixels of a black and a white image.
    """

    def __init__(self, model: Any) -> None:
        plain = [Image.new("RGB", (64, 64), colour) for colour in ("black", "white")]
        pixels = model.preprocess(plain).float().cpu()
        height, width = pixels.shape[-2:]
        self.black, self.white = pixels[:, :, height // 2, width // 2]
        self.size = (width, height)

    @property
    def usable(self) -> bool:
        """Return whether pixels are three colours and can be turned back."""
        return len(self.black) == 3 and bool(((self.white - self.black).abs() > 1e-6).all())

    def __call__(self, pixels: Tensor) -> list[Image.Image]:
        """Return one image per row of pixels ``[batch, 3, height, width]``."""
        black, span = self.black[:, None, None], (self.white - self.black)[:, None, None]
        values = ((pixels.detach().float().cpu() - black) / span * 255).round().clamp(0, 255)
        arrays = values.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        return [Image.fromarray(array) for array in arrays]


class ImageWriter:
    """Write one small copy per image, named by its number alone."""

    def __init__(self, folder: Path, *, size: int, lossless: bool) -> None:
        self.folder, self.size = folder, size
        self.suffix = "png" if lossless else "jpg"
        self.written: set[int] = set()
        folder.mkdir()

    def write(self, index: int, image: Image.Image) -> None:
        """Shrink an image to fit and save it, unless it is saved already."""
        if index in self.written:
            return
        small = image.copy()
        small.thumbnail((self.size, self.size), Image.Resampling.LANCZOS)
        path = self.folder / f"{index}.{self.suffix}"
        if self.suffix == "png":
            small.save(path, format="PNG")
        else:
            small.save(path, format="JPEG", quality=88)
        self.written.add(index)
