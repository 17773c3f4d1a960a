"""Decode the bytes of any image to plain RGB, upright and on white."""

from __future__ import annotations

import io
import logging
import re
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from vision_plugin.models import as_rgb

logger = logging.getLogger(__name__)

MAX_PIXELS = 100_000_000
"""Images with more pixels are refused before they are decoded."""
MAX_FILE_BYTES = 512 * 1024 * 1024
"""Larger files are refused before they are read."""
SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("png", "jpg", "jpeg", "jpe", "jfif", "gif", "webp", "bmp", "tif", "tiff"),
        *("avif", "ppm", "pgm", "pbm", "ico", "tga", "jp2", "qoi"),
    )
)
"""Suffixes of image files in folders and tar files."""
_FORMATS = (
    *("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"),
    *("AVIF", "PPM", "ICO", "TGA", "JPEG2000", "QOI"),
)
"""Pillow's decoders that may read the bytes: none of them starts another program."""

Raw = bytes | Path | Image.Image


class BadImageError(ValueError):
    """An image cannot be used; the message says why."""

    def __init__(self, id: str, reason: str) -> None:
        super().__init__(f"image {id}: {reason}")
        self.id = id
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImageError], tuple[str, str]]:
        return BadImageError, (self.id, self.reason)


def decode_image(raw: Raw, id: str) -> Image.Image:
    """Decode an image and bring it to RGB.

    The function lays transparency on white, scales 16-bit values to 8 bits, applies EXIF rotation
    and takes the first frame of an animation.

    Args:
        raw: Encoded bytes, a file, or an image in memory.
        id: Name of the image in errors.

    Raises:
        BadImageError: the image is broken, truncated, too large, or in no known format.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns about images that are refused below with a reason, or that do no harm.
            warnings.simplefilter("ignore")
            return _decode(raw, id)
    except BadImageError:
        raise
    except UnidentifiedImageError as error:
        raise BadImageError(id, "not an image in a known format") from error
    except FileNotFoundError as error:
        raise BadImageError(id, "the file is gone") from error
    except Exception as error:  # decoders raise nearly every type on malformed bytes
        raise BadImageError(id, _reason(error)) from error


def _decode(raw: Raw, id: str) -> Image.Image:
    if isinstance(raw, Image.Image):
        _check_size(raw, id)
        return _to_rgb(raw)
    with _open(raw, id) as image:
        _check_size(image, id)
        image.seek(0)
        image.load()
        return _to_rgb(image)


def _open(raw: bytes | Path, id: str) -> ImageFile.ImageFile:
    if isinstance(raw, Path):
        size = raw.stat().st_size
        if size > MAX_FILE_BYTES:
            raise BadImageError(
                id, f"the file has {size:,} bytes, above the limit of {MAX_FILE_BYTES:,}"
            )
        raw = raw.read_bytes()
    if not raw:
        raise BadImageError(id, "empty")
    try:
        return Image.open(io.BytesIO(raw), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImageError(id, f"more than {MAX_PIXELS:,} pixels") from error


def _check_size(image: Image.Image, id: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImageError(
            id,
            f"{width} x {height} is {width * height:,} pixels, above the limit of {MAX_PIXELS:,}",
        )
    if width * height == 0:
        raise BadImageError(id, f"{width} x {height} pixels: there is nothing in it")


def _to_rgb(image: Image.Image) -> Image.Image:
    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_8_bits(image)
    # A copy without the file behind it, its metadata or its palette.
    rgb = as_rgb(image)
    return Image.frombytes("RGB", rgb.size, rgb.tobytes()) if rgb is image else rgb


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception as error:  # the EXIF block is malformed; the pixels are not
        logger.debug("EXIF data of an image cannot be read: %s", error)
        return image


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Return grey values of 16, 32 or floating-point bits as 8 bits.

    Integers span 16 bits where one is above 255. Floats span 0 to 1 where none is above 1, and
    else 0 to 255.
    """
    values = np.asarray(image).astype(np.float64)
    top = float(values.max())
    if image.mode == "F":
        scale = 255.0 if top <= 1.0 else 1.0
    elif image.mode == "I" and top <= 255:
        scale = 1.0
    else:
        scale = 255 / 65535
    values = np.nan_to_num(values * scale)
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def _reason(error: Exception) -> str:
    """Return one line that is the same in every run: without addresses of objects."""
    text = " ".join(str(error).split()) or type(error).__name__
    return re.sub(r"<[^>]* at 0x[0-9a-f]+>", "the data", text)[:200]
