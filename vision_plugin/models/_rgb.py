"""The one way from a PIL image of any kind to the RGB that a model sees."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float64
from PIL import Image, ImageOps

logger = logging.getLogger(__name__)

_STRIP_PIXELS = 1 << 22
"""Large images are brought to RGB in strips of so many pixels, which bounds the memory."""
_SPANS = (255.0, 65_535.0, 2.0**31 - 1)
"""Largest values of grey in 8, 16 and 32 bits."""
_UNSIGNED = 2.0**32 - 1
"""White of unsigned grey in 32 bits, whose upper half Pillow reads as negative."""
_SCALES = {"L;2": 85, "L;4": 17}
"""What Pillow multiplies grey of few bits with as it decodes it, but not its transparent grey."""


def as_rgb(image: Image.Image) -> Image.Image:
    """Return an image as a person sees it: upright, in RGB of 8 bits, on white.

    EXIF turning is applied, and what is transparent becomes white. Grey of 16 bits spans all of
    them; grey of 32 bits spans 8, 16 or 32 bits, the fewest that hold its largest value. Floats
    span 0 to 1 where none is larger, and else as integers do. An image that is upright RGB
    already is returned as it is.

    Args:
        image: An image of any mode.

    Examples:
        >>> from PIL import Image
        >>> clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
        >>> vp.models.as_rgb(clear).getpixel((0, 0))
        (255, 255, 255)
    """
    key = _transparent_colour(image)
    image.load()
    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _deep_grey(image, key)
    if image.mode == "RGB" and key is None:
        return image
    if image.mode == "La":
        image = image.convert("LA")
    if key is None and not image.has_transparency_data:
        return image.convert("RGB")
    page = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        if key is not None:
            strip.info["transparency"] = key
        rgba = strip.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        page.paste(Image.alpha_composite(white, rgba).convert("RGB"), (0, top))
    return page


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = ImageOps.exif_transpose(image) if image.getexif().get(0x0112, 1) != 1 else image
    except Exception as error:  # the EXIF block is malformed; the pixels are not
        logger.debug("EXIF data of an image cannot be read: %s", error)
        return image
    return turned


def _transparent_colour(image: Image.Image) -> Any:
    """Return the colour or the palette entries that are transparent, as the decoded pixels hold it.

    Ask before the pixels are decoded: Pillow forgets then how many bits they had.
    """
    key = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    raw_mode = str(tiles[0].args) if tiles else ""
    if isinstance(key, int) and image.mode == "L":
        return key * _SCALES.get(raw_mode, 1)
    if isinstance(key, tuple) and (raw_mode == "RGB;16B" or max(key) > 255):
        return tuple(value >> 8 for value in key)
    return key


def _deep_grey(image: Image.Image, key: Any) -> Image.Image:
    """Return grey of 16, 32 or floating-point bits in RGB; grey of the value ``key`` as white."""
    span = _span(image)
    page = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        values = _values(strip)
        if span == _UNSIGNED:
            values %= 2**32
        grey = np.clip(np.rint(np.nan_to_num(values * (255 / span))), 0, 255).astype(np.uint8)
        if key is not None:
            grey[values == key] = 255
        page.paste(Image.fromarray(grey).convert("RGB"), (0, top))
    return page


def _span(image: Image.Image) -> float:
    """Return the value that is white."""
    if image.mode.startswith("I;"):
        return _SPANS[1]
    lowest, highest = 0.0, 0.0
    for _, strip in _strips(image):
        values = _values(strip)
        values = values[np.isfinite(values)]
        lowest = min(lowest, float(values.min(initial=0)))
        highest = max(highest, float(values.max(initial=0)))
    if image.mode == "F" and highest <= 1.0:
        return 1.0
    if lowest < 0 and highest > _SPANS[1] and image.mode == "I":
        return _UNSIGNED
    return next((span for span in _SPANS if highest <= span), highest)


def _values(strip: Image.Image) -> Float64[np.ndarray, "height width"]:
    return np.asarray(strip).astype(np.float64)


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yield an image in strips, each with the row that it begins at."""
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // max(1, width))
    for top in range(0, height, rows):
        yield top, image.crop((0, top, width, min(height, top + rows)))
