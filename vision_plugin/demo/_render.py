"""Drawing of a scene's image, and of the exact mask of its object."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool
from PIL import Image

from vision_plugin.demo._backdrops import backdrop, hang_label
from vision_plugin.demo._drawing import cover, paint
from vision_plugin.demo._factors import Scene

IMAGE_SIZE = 128
"""The side of a drawn image in pixels, unless another is asked for.

Examples:
    >>> vp.demo.render(vp.demo.Scene(shape="star", colour="red")).size == (vp.demo.IMAGE_SIZE,) * 2
    True
"""
SMALLEST_SIZE = 32


def render(scene: Scene, *, image_size: int = IMAGE_SIZE) -> Image.Image:
    """Draw a scene.

    Args:
        scene: the scene to draw.
        image_size: the side of the square image in pixels, at least 32.

    Returns:
        An RGB image; the same scene and size give the same pixels.

    Raises:
        ValueError: ``image_size`` is below 32 pixels.

    Examples:
        >>> vp.demo.render(vp.demo.Scene(shape="star", colour="red"), image_size=64).size
        (64, 64)
    """
    _check_size(image_size)
    pixels = paint(backdrop(scene, image_size), cover(scene, image_size), scene.colour)
    image = Image.fromarray(pixels)
    hang_label(image, scene)
    return image


def object_mask(scene: Scene, *, image_size: int = IMAGE_SIZE) -> Bool[np.ndarray, "size size"]:
    """Return the pixels of `render(scene)` that the object touches, antialiased rim included.

    These are exactly the pixels that change when the object is drawn in another colour. A label
    never covers the object.

    Args:
        scene: the scene.
        image_size: the side of the square image in pixels, at least 32.

    Raises:
        ValueError: ``image_size`` is below 32 pixels.

    Examples:
        >>> mask = vp.demo.object_mask(vp.demo.Scene(shape="star", colour="red"))
        >>> mask.shape, bool(mask[64, 64]), bool(mask[0, 0])
        ((128, 128), True, False)
    """
    _check_size(image_size)
    coverage = cover(scene, image_size)
    mask = np.zeros((image_size, image_size), dtype=bool)
    height, width = coverage.inside.shape
    rows = slice(coverage.top, coverage.top + height)
    columns = slice(coverage.left, coverage.left + width)
    mask[rows, columns] = coverage.inside > 0
    return mask


def _check_size(image_size: int) -> None:
    if image_size < SMALLEST_SIZE:
        raise ValueError(
            f"image_size={image_size}: the demo world's images need at least {SMALLEST_SIZE} "
            "pixels a side for their textures and words."
        )
