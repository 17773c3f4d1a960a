"""A file, the same image in memory, and the image that a model is given become the same RGB."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

import vision_plugin as vp
from vision_plugin.images import BadImageError, open_images
from vision_plugin.images._image import decode_image
from vision_plugin.models import as_rgb

ORIENTATION = 0x0112


def png(
    rows: list[bytes], width: int, depth: int, colour: int, transparent: bytes | None = None
) -> bytes:
    """A PNG by the letter of its specification."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + body))
        return struct.pack(">I", len(body)) + kind + body + check

    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    key = b"" if transparent is None else chunk(b"tRNS", transparent)
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = chunk(b"IHDR", header), key, chunk(b"IDAT", data), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(values: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "TIFF")
    return stream.getvalue()


def row(*colours: tuple[int, int, int] | int) -> list[list[int]]:
    return [list(c) if isinstance(c, tuple) else [c, c, c] for c in colours]


def turned() -> bytes:
    """Two pixels side by side, red and blue, that the camera saw one above the other."""
    image = Image.new("RGB", (2, 1), "red")
    image.putpixel((1, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    stream = io.BytesIO()
    image.save(stream, "PNG", exif=exif)
    return stream.getvalue()


WHITE, RED, BLUE = (255, 255, 255), (255, 0, 0), (0, 0, 255)
FILES: dict[str, tuple[bytes, list[list[list[int]]]]] = {
    "transparent colour": (
        png([b"\x01\x02\x03\x04\x05\x06"], 2, 8, 2, struct.pack(">HHH", 1, 2, 3)),
        [row(WHITE, (4, 5, 6))],
    ),
    "transparent black": (png([b"\0" * 6], 2, 8, 2, bytes(6)), [row(WHITE, WHITE)]),
    "transparent colour of 16 bits": (
        png([b"\x01\x02\x03\x04\x05\x06" + b"\xff" * 6], 2, 16, 2, bytes([1, 2, 3, 4, 5, 6])),
        [row(WHITE, WHITE)],
    ),
    "transparent grey": (png([b"\x5a\x05"], 2, 8, 0, b"\0\x05"), [row(0x5A, WHITE)]),
    "transparent grey of 1 bit": (png([b"\x40"], 2, 1, 0, b"\0\0"), [row(WHITE, WHITE)]),
    "transparent grey of 2 bits": (png([b"\x1b"], 4, 2, 0, b"\0\1"), [row(0, WHITE, 170, 255)]),
    "transparent grey of 4 bits": (png([b"\x5a"], 2, 4, 0, b"\0\x05"), [row(WHITE, 170)]),
    "transparent grey of 16 bits": (
        png([b"\x80\x80\x12\x34"], 2, 16, 0, b"\x12\x34"),
        [row(128, WHITE)],
    ),
    "grey of 16 bits": (tiff(np.array([[0, 257, 25700, 65535]], np.uint16)), [row(0, 1, 100, 255)]),
    "grey of 32 bits that fits in 8": (tiff(np.array([[0, 7, 255]], np.int32)), [row(0, 7, 255)]),
    "grey of 32 bits that fits in 16": (
        tiff(np.array([[0, 25700, 65535]], np.int32)),
        [row(0, 100, 255)],
    ),
    "grey of 32 bits": (tiff(np.array([[0, 2**30, 2**31 - 1]], np.int32)), [row(0, 128, 255)]),
    "floats up to 1": (tiff(np.array([[0, 0.5, 1]], np.float32)), [row(0, 128, 255)]),
    "floats up to 255": (tiff(np.array([[0, 100, 255]], np.float32)), [row(0, 100, 255)]),
    "floats up to 65535": (tiff(np.array([[0, 25700, 65535]], np.float32)), [row(0, 100, 255)]),
    "floats without a number": (
        tiff(np.array([[np.nan, 0.5, 1, np.inf, -np.inf]], np.float32)),
        [row(0, 128, 255, 255, 0)],
    ),
    "a turned camera": (turned(), [row(RED), row(BLUE)]),
}


def in_memory(raw: bytes) -> Image.Image:
    return Image.open(io.BytesIO(raw))


def loaded(raw: bytes) -> Image.Image:
    image = in_memory(raw)
    image.load()
    return image


@pytest.mark.parametrize("name", FILES)
def test_a_file_an_image_in_memory_and_what_the_model_is_given_are_one(name: str) -> None:
    raw, expected = FILES[name]
    assert np.asarray(decode_image(raw, "it")).tolist() == expected
    assert np.asarray(as_rgb(in_memory(raw))).tolist() == expected
    if " of 2 bits" not in name and " of 4 bits" not in name:  # Pillow has forgotten the bits
        assert np.asarray(open_images([loaded(raw)])[0]).tolist() == expected
        assert np.asarray(as_rgb(loaded(raw))).tolist() == expected


@pytest.mark.parametrize("name", ["grey of 16 bits", "floats up to 1", "a turned camera"])
def test_preprocessing_an_image_is_preprocessing_its_rgb(name: str, tiny_clip: str) -> None:
    model = vp.load_model(tiny_clip)
    raw, expected = FILES[name]
    plain = Image.fromarray(np.array(expected, np.uint8))
    assert model.preprocess([loaded(raw)]).equal(model.preprocess([plain]))
    assert not model.preprocess([plain]).equal(model.preprocess([Image.new("RGB", plain.size)]))


def test_it_is_turned_once() -> None:
    once = as_rgb(in_memory(turned()))
    assert np.asarray(as_rgb(once)).tolist() == np.asarray(once).tolist()


def test_rgb_is_handed_back_and_a_source_hands_out_a_copy() -> None:
    plain = Image.new("RGB", (2, 2))
    assert as_rgb(plain) is plain
    source = open_images([plain])
    source[0].putpixel((0, 0), (1, 1, 1))
    assert source[0].getpixel((0, 0)) == (0, 0, 0)


def test_strips_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (50, 7, 4), np.uint8)),
        Image.fromarray(rng.integers(0, 65536, (50, 7), np.uint16)),
        Image.fromarray(rng.random((50, 7), np.float32)),
    ]
    whole = [as_rgb(image).tobytes() for image in images]
    monkeypatch.setattr("vision_plugin.models._rgb._STRIP_PIXELS", 20)
    assert [as_rgb(image).tobytes() for image in images] == whole


def text_chunk(kind: bytes, text: bytes) -> bytes:
    body = b"about\0" + (b"\0" + zlib.compress(text) if kind == b"zTXt" else text)
    check = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + check


@pytest.mark.parametrize(
    "chunks",
    [
        lambda: text_chunk(b"zTXt", b" " * 300_000_000),
        lambda: text_chunk(b"zTXt", b" " * 1_000_000) * 80,
    ],
)
def test_text_that_expands_is_refused_in_a_sentence(chunks: Callable[[], bytes]) -> None:
    raw = png([b"\0"], 1, 8, 0)
    start = raw.index(b"IDAT") - 4
    with pytest.raises(BadImageError, match=r"text .* 1,048,576 bytes, .* save it without meta"):
        decode_image(raw[:start] + chunks() + raw[start:], "it")
