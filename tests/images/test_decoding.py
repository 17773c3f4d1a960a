"""An image of any kind becomes the RGB that a person would see, or a reason why not."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests._images import image
from vision_plugin.images import BadImageError
from vision_plugin.images import _image as decoding
from vision_plugin.images._image import decode_image


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def pixels(raw: bytes) -> np.ndarray:
    image = decode_image(raw, "it")
    assert image.mode == "RGB"
    return np.asarray(image)


def attempt(raw: bytes) -> tuple[np.ndarray | None, str | None]:
    """The pixels, or the reason why there are none."""
    try:
        return pixels(raw), None
    except BadImageError as error:
        assert error.id == "it"  # noqa: PT017
        return None, error.reason


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (3, 1))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.putpixel((1, 0), (255, 0, 0, 0))
    image.putpixel((2, 0), (0, 0, 0, 128))
    row = pixels(encoded(image, "PNG"))[0]
    assert row[0].tolist() == [255, 0, 0]
    assert row[1].tolist() == [255, 255, 255]
    assert abs(int(row[2][0]) - 127) <= 1


def test_a_palette_with_a_transparent_entry() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([0, 200, 0, 9, 9, 9])
    image.putpixel((1, 0), 1)
    row = pixels(encoded(image, "PNG", transparency=1))[0]
    assert row.tolist() == [[0, 200, 0], [255, 255, 255]]


def test_a_grey_key_colour_that_is_transparent() -> None:
    image = Image.new("L", (2, 1), 40)
    image.putpixel((1, 0), 90)
    row = pixels(encoded(image, "PNG", transparency=90))[0]
    assert row.tolist() == [[40, 40, 40], [255, 255, 255]]


def test_cmyk_becomes_its_colour() -> None:
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    red = pixels(encoded(image, "JPEG", quality=95))[8, 8]
    assert red[0] > 230
    assert max(red[1:]) < 30


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(format: str) -> None:
    values = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    row = pixels(encoded(Image.fromarray(values), format))[0, :, 0]
    assert row.tolist() == [0, 1, 100, 255]


def test_floats_between_zero_and_one_are_scaled() -> None:
    values = np.array([[0.0, 0.5, 1.0, np.nan]], dtype=np.float32)[:, :3]
    row = pixels(encoded(Image.fromarray(values), "TIFF"))[0, :, 0]
    assert row.tolist() == [0, 128, 255]


def test_exif_rotation_is_applied() -> None:
    image = Image.new("RGB", (20, 10), "white")
    image.paste("black", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    upright = pixels(encoded(image, "JPEG", exif=exif, quality=95))
    assert upright.shape == (20, 10, 3)
    assert upright[2].mean() < 40
    assert upright[-3].mean() > 215


def test_malformed_exif_does_not_cost_the_image() -> None:
    raw = encoded(image(), "JPEG", exif=b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff garbage")
    assert pixels(raw).shape == (20, 24, 3)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_counts(format: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("#ff0000", "#0000ff")]
    raw = encoded(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
    assert pixels(raw)[4, 4].tolist() == [255, 0, 0]


def test_one_bit_and_grey_with_alpha() -> None:
    assert pixels(encoded(Image.new("1", (2, 2), 1), "PNG")).min() == 255
    assert pixels(encoded(Image.new("LA", (2, 2), (7, 0)), "PNG")).min() == 255


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "BMP"])
def test_a_file_cut_anywhere_is_bad_or_whole_never_half(format: str) -> None:
    raw = encoded(image(size=(64, 64)), format)
    whole = pixels(raw)
    for length in range(0, len(raw), max(1, len(raw) // 60)):
        cut, reason = attempt(raw[:length])
        assert reason or np.array_equal(cut, whole)


@given(
    st.binary(max_size=200),
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"\xff\xd8\xff"]),
)
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_a_image_or_a_bad_one(tail: bytes, head: bytes) -> None:
    cut, reason = attempt(head + tail)
    assert cut is not None or (reason and "0x" not in reason)


def bomb(width: int, height: int) -> bytes:
    """A tiny PNG that claims a huge size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0"))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(10_001, 10_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1)])
def test_a_bomb_is_refused_before_it_goes_off(size: tuple[int, int]) -> None:
    with pytest.raises(BadImageError, match=r"pixels|too large|invalid") as caught:
        decode_image(bomb(*size), "bomb.png")
    assert caught.value.id == "bomb.png"


def test_a_file_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MAX_FILE_BYTES", 10)
    path = tmp_path / "a.png"
    path.write_bytes(encoded(image(), "PNG"))
    with pytest.raises(BadImageError, match="above the limit of 10"):
        decode_image(path, "a.png")


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty"),
        (b"hello", "not an image in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image in a known format"),
        (Path("/no/such/file.png"), "the file is gone"),
    ],
)
def test_the_reason_says_what_is_wrong(raw: bytes | Path, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        decode_image(raw, "it")
