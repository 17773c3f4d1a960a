"""Images of any source as batches of pixels, for what reads a model without an SAE."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from vision_plugin._progress import Progress
from vision_plugin.images import open_images, read_batches


def count(images: Any) -> int:
    """Return how many images there are: of a tensor of pixels, or of anything to open."""
    return len(images) if isinstance(images, Tensor) else len(open_images(images))


def pixel_batches(
    model: Any,
    images: Any,
    *,
    batch_size: int,
    title: str,
    places: list[int] | None = None,
    progress: bool = True,
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield places of images and their pixels, a batch at a time.

    Args:
        model: A VisionBridge.
        images: Whatever ``open_images`` takes, or pixels ``[n, channels, height, width]``.
        batch_size: Images per batch.
        title: Name of the work, for the progress bar.
        places: Images to read; all by default.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: there is no image, or none can be read.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    source = images if isinstance(images, Tensor) else open_images(images)
    chosen = list(range(len(source))) if places is None else places
    read = 0
    with Progress(len(chosen), title, shown=progress) as shown:
        for batch, pixels in _batches(model, source, batch_size, chosen):
            read += len(batch)
            shown.advance(len(batch))
            yield batch, pixels
    if not read:
        raise ValueError("images= holds no image that can be read: name others")


def _batches(
    model: Any, source: Any, batch_size: int, places: list[int]
) -> Iterator[tuple[list[int], Tensor]]:
    if isinstance(source, Tensor):
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            yield batch, source[batch].to(device=model.device, dtype=model.dtype)
        return
    for found in read_batches(source, batch_size, {}, indices=places):
        yield list(found), model.preprocess(list(found.values()))
