"""Read images in batches, and set aside those that cannot be read."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from vision_plugin.images._image import BadImageError

logger = logging.getLogger(__name__)


def read_batches(
    images: Any,
    batch_size: int,
    bad: dict[str, str],
    *,
    indices: Sequence[int] | None = None,
    max_bad: int | None = None,
) -> Iterator[dict[int, Image.Image]]:
    """Yield images by their place in a source, ``batch_size`` places at a time.

    Args:
        images: An image source.
        batch_size: Places to read per batch; a batch without a readable image is skipped.
        bad: Receives the reason, by id, for each image that cannot be read.
        indices: Places to read, in this order; all by default.
        max_bad: Unreadable images to allow; any number by default.

    Raises:
        ValueError: more than ``max_bad`` images cannot be read.

    Examples:
        >>> bad = {}
        >>> [list(batch) for batch in vp.images.read_batches(vp.open_images("demo:5"), 2, bad)]
        [[0, 1], [2, 3], [4]]
        >>> bad
        {}
    """
    places = range(len(images)) if indices is None else indices
    for start in range(0, len(places), batch_size):
        batch = {}
        for index in places[start : start + batch_size]:
            try:
                batch[index] = images[index]
            except BadImageError as error:
                bad[images.ids[index]] = str(error)
                if max_bad is not None and len(bad) > max_bad:
                    raise ValueError(
                        f"{len(bad)} of {len(images)} images cannot be read, the last of them: "
                        f"{error}. Mend or remove them, or allow more with max_bad_images="
                    ) from error
        if batch:
            yield batch


def read_spread(images: Any, n: int) -> dict[int, Image.Image]:
    """Return images spread evenly over a source, by their places in it.

    An image that cannot be read is left out with a warning.

    Args:
        images: An image source.
        n: How many images to read.

    Raises:
        ValueError: none of them can be read.

    Examples:
        >>> list(vp.images.read_spread(vp.open_images("demo:9"), 3))
        [0, 3, 6]
    """
    step = max(1, len(images) // n)
    places = range(0, len(images), step)[:n]
    bad: dict[str, str] = {}
    found: dict[int, Image.Image] = {}
    for batch in read_batches(images, n, bad, indices=places):
        found |= batch
    for reason in bad.values():
        logger.warning("left out: %s", reason)
    if not found:
        reason = next(iter(bad.values()))
        raise ValueError(
            f"none of {len(places)} images can be read: {reason}. Mend them, or name other images"
        )
    return found
