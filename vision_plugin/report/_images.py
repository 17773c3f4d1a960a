"""Images of any source with ids and labels, and the model's view of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vision_plugin.images import label_text, open_images
from vision_plugin.models import as_rgb
from vision_plugin.report._inputs import clean

logger = logging.getLogger(__name__)

_MAX_TEXTS = 12
"""Columns of texts that can be searched."""


class ImageReader:
    """Images by number, with an id and labels each; unreadable ones are counted and left out."""

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
        # Asking a stream for a column reads all of it.
        self.columns = {} if self.sequential else _text_columns(images)

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
        """Return the image's label, or its first text, or an empty text."""
        if self._labels is not None:
            return label_text(self._labels[index])
        for values in self.columns.values():
            return values[index]
        return self._seen_labels.get(index, "")

    def texts(self, index: int) -> dict[str, str]:
        """Return all that is written about an image, by column; ``label`` for its label."""
        found = {name: values[index] for name, values in self.columns.items() if values[index]}
        label = self.label(index)
        return found if not label or label in found.values() else {"label": label, **found}

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


def _text_columns(images: Any) -> dict[str, list[str]]:
    """Return the columns of texts beside the images, cleaned; lists of texts become one text."""
    found: dict[str, list[str]] = {}
    for name in list(getattr(images, "column_names", ()))[:_MAX_TEXTS]:
        values = images.column(name)
        first = next((value for value in values if value is not None), None)
        is_list = isinstance(first, (list, tuple)) and all(isinstance(v, str) for v in first)
        if isinstance(first, str) or is_list:
            found[clean(name)] = [_joined(value) for value in values]
    return found


def _joined(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        value = ", ".join(str(part) for part in value)
    return clean(label_text(value))


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

    def arrays(self, pixels: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """Return ``[batch, height, width, 3]`` of pixels ``[batch, 3, height, width]``."""
        black, span = self.black[:, None, None], (self.white - self.black)[:, None, None]
        values = ((pixels.detach().float().cpu() - black) / span * 255).round().clamp(0, 255)
        arrays: np.ndarray[Any, np.dtype[np.uint8]]
        arrays = values.to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
        return arrays
