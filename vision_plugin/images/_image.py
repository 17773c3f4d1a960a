"""Decode the bytes of any image to plain RGB, upright and on white."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from PIL import (
    IcoImagePlugin,
    Image,
    ImageFile,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
)

from vision_plugin._untrusted import read_regular
from vision_plugin.models import as_rgb

MAX_SCANS = 150
"""JPEG files with more scans are refused: each goes over all pixels again, and ten are usual."""
MAX_PIXELS = 100_000_000
"""Images with more pixels are refused before they are decoded."""
MAX_FILE_BYTES = 512 * 1024 * 1024
"""Larger files are refused before they are read."""
SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("png", "apng", "jpg", "jpeg", "jpe", "jfif", "gif", "webp", "bmp", "dib", "tif", "tiff"),
        *("avif", "avifs", "ppm", "pgm", "pbm", "pnm", "pfm", "ico", "tga", "qoi"),
        *("jp2", "j2k", "jpc", "jpf", "jpx", "j2c"),
    )
)
"""Suffixes of image files in folders and tar files."""
UNREAD_SUFFIXES = frozenset(
    f".{name}"
    for name in (
        *("heic", "heif", "jxl", "svg", "psd", "xcf", "exr", "hdr", "eps", "pcx", "icns", "dds"),
        *("dng", "raw", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf"),
    )
)
"""Suffixes of image files that are not read."""
_FORMATS = (
    *("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"),
    *("AVIF", "PPM", "ICO", "TGA", "JPEG2000", "QOI"),
)
"""Pillow's decoders that may read the bytes: none of them starts another program."""

Raw = bytes | Path | Image.Image


class BadImageError(ValueError):
    """An image cannot be used; the message says why.

    Args:
        id: Name of the image.
        reason: What is wrong with it.

    Examples:
        >>> try:
        ...     vp.images.decode_image(b"no picture", "a.png")
        ... except vp.images.BadImageError as error:
        ...     print(error)
        image a.png: not an image in a known format
    """

    def __init__(self, id: str, reason: str) -> None:
        super().__init__(f"image {id}: {reason}")
        self.id = id
        self.reason = reason

    def __reduce__(self) -> tuple[type[BadImageError], tuple[str, str]]:
        return BadImageError, (self.id, self.reason)


def decode_image(raw: Raw, id: str) -> Image.Image:
    """Decode an image and bring it to RGB.

    ``models.as_rgb`` says how. Of an animation in a file, the first frame counts.

    Args:
        raw: Encoded bytes, a file, or an image in memory.
        id: Name of the image in errors.

    Raises:
        BadImageError: the image is broken, truncated, too large, or in no known format.

    Examples:
        >>> import io
        >>> file = io.BytesIO()
        >>> world.images[0].save(file, "png")
        >>> vp.images.decode_image(file.getvalue(), "a.png").size
        (128, 128)
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
        _check_size(raw.size, id)
        return _alone(as_rgb(raw), raw)
    with _open(raw, id) as image:
        for size in _sizes(image):
            _check_size(size, id)
        image.seek(0)
        return _alone(as_rgb(image), image)


def _open(raw: bytes | Path, id: str) -> ImageFile.ImageFile:
    if isinstance(raw, Path):
        path = raw
        try:
            raw = read_regular(path, MAX_FILE_BYTES)
        except ValueError as error:
            # A reason is the same wherever the folder lies: manifests record it.
            raise BadImageError(id, f"it {str(error).removeprefix(f'{path} ')}") from error
    if not raw:
        raise BadImageError(id, "empty")
    if raw.startswith(b"\xff\xd8") and (n_scans := raw.count(b"\xff\xda")) > MAX_SCANS:
        raise BadImageError(id, f"{n_scans:,} scans are too many, above the limit of {MAX_SCANS}")
    try:
        return Image.open(io.BytesIO(raw), formats=_FORMATS)
    except Image.DecompressionBombError as error:
        raise BadImageError(id, f"more than {MAX_PIXELS:,} pixels") from error


def _alone(rgb: Image.Image, image: Image.Image) -> Image.Image:
    """Return the pixels alone, without the file behind the image and its metadata."""
    alone = rgb.copy() if rgb is image else rgb
    alone.info = {}
    return alone


def _sizes(image: Image.Image) -> Iterator[tuple[int, int]]:
    """Yield an image's size, and that of what is decoded on the way, which may be larger."""
    yield image.size
    if isinstance(image, IcoImagePlugin.IcoImageFile):
        yield image.ico.getimage(image.size).size
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        width, height = TiffImagePlugin.TILEWIDTH, TiffImagePlugin.TILELENGTH
        yield int(image.tag_v2.get(width, 1)), int(image.tag_v2.get(height, 1))


def _check_size(size: tuple[int, int], id: str) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise BadImageError(
            id,
            f"{width} x {height} is {width * height:,} pixels, above the limit of {MAX_PIXELS:,}",
        )
    if width * height == 0:
        raise BadImageError(id, f"{width} x {height} pixels: there is nothing in it")


def _reason(error: Exception) -> str:
    """Return one line that is the same in every run: without addresses of objects."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        return f"an image inside it has more than {MAX_PIXELS:,} pixels"
    if "MAX_TEXT" in text:
        return (
            f"a text beside the pixels expands beyond {PngImagePlugin.MAX_TEXT_CHUNK:,} bytes, or "
            f"all of them beyond {PngImagePlugin.MAX_TEXT_MEMORY:,}: save it without metadata"
        )
    return re.sub(r"<[^>]* at 0x[0-9a-f]+>", "the data", text)[:200]
