"""Hostile images: damaged bytes, sizes that lie, blocks that expand, tags that loop."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from PIL import Image, PngImagePlugin

from tests.faults._corpus import _readers as readers
from tests.faults._corpus import _samples as samples
from tests.faults._corpus._case import Rule
from tests.faults._corpus._mutate import BYTES

HUGE = (0, 1, 2**15, 2**16 - 1, 2**24, 2**31 - 1, 2**32 - 1)


def shown(data: bytes, suffix: str, folder: Path) -> Path:
    """A folder with one image."""
    return samples.put({f"hostile.{suffix}": data}, folder)


def damaged(how: str, folder: Path, rng: random.Random) -> Path:
    """An image of any format with damaged bytes."""
    kind = rng.choice(samples.IMAGES)
    data = BYTES[how](samples.image(kind), rng)
    return shown(data, kind.rpartition(".")[2], folder)


def chunk(name: bytes, content: bytes) -> bytes:
    """A PNG chunk with the right checksum."""
    checksum = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)


@cache
def zeros_in(size: int) -> bytes:
    """Return so many zeros, compressed."""
    return zlib.compress(bytes(size), 9)


def png(folder: Path, rng: random.Random) -> Path:
    """A PNG of right checksums and wrong content."""
    width, height = rng.choice(HUGE), rng.choice(HUGE)
    sizes = (width, height) if rng.random() < 0.5 else (24, 20)
    depth, colour = rng.choice(((8, 2), (16, 2), (8, 3), (1, 0), (8, 6), (7, 2), (8, 9), (16, 3)))
    head = struct.pack(">IIBBBBB", *sizes, depth, colour, 0, 0, rng.choice((0, 0, 1, 9)))
    pixels = zeros_in(rng.choice((0, 100, 20 * (24 * 3 + 1), 40 << 20)))
    zeros = zeros_in(rng.choice((1 << 16, 40 << 20)))
    extra = rng.choice(
        (
            lambda: b"",
            lambda: chunk(b"zTXt", b"a\0\0" + zeros),
            lambda: chunk(b"iTXt", b"a\0\1\0\0\0" + zeros),
            lambda: chunk(b"iCCP", b"a\0\0" + zeros),
            lambda: chunk(b"zTXt", b"a\0\0" + zeros) * 40,
            lambda: chunk(b"tEXt", b"a\0" + b"x" * 2_000_000),
            lambda: chunk(b"tEXt", b"a\0b") * 50_000,
            lambda: chunk(b"eXIf", b"II*\0" + struct.pack("<IH", 8, 9) + rng.randbytes(90)),
            lambda: chunk(b"PLTE", bytes(rng.choice((0, 1, 3, 768, 3000)))),
            lambda: chunk(b"tRNS", rng.randbytes(rng.choice((0, 1, 2, 6, 300)))),
            lambda: chunk(b"acTL", struct.pack(">II", rng.choice(HUGE), 0)),
            lambda: chunk(b"fcTL", rng.randbytes(26)),
            lambda: chunk(b"pHYs", rng.randbytes(rng.choice((1, 9)))),
            lambda: chunk(b"gAMA", bytes(rng.choice((0, 4)))),
            lambda: chunk(b"IHDR", head),
            lambda: struct.pack(">I", 2**31 - 1) + b"tEXt",
            lambda: chunk(rng.randbytes(4), rng.randbytes(20)),
        )
    )()
    body = chunk(b"IHDR", head) + extra + chunk(b"IDAT", pixels)
    return shown(
        b"\x89PNG\r\n\x1a\n" + body + rng.choice((chunk(b"IEND", b""), b"")), "png", folder
    )


def jpeg(folder: Path, rng: random.Random) -> Path:
    """A JPEG whose segments lie."""
    data = samples.image(rng.choice(("jpg", "progressive.jpg")))
    frame = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    how = rng.randrange(7)
    if how == 0:
        size = struct.pack(">HH", *(rng.choice((0, 1, 9_000, 65_535)) for _ in range(2)))
        data = data[: frame + 5] + size + data[frame + 9 :]
    elif how == 1:
        data = data[: frame + 9] + bytes([rng.choice((0, 2, 4, 255))]) + data[frame + 10 :]
    elif how == 2:  # one scan, many times
        scan = data.find(b"\xff\xda")
        data = data[:scan] + data[scan:-2] * rng.choice((10, 1000, 20_000)) + data[-2:]
    elif how == 3:
        tag = rng.choice((b"\xff\xe1", b"\xff\xe2", b"\xff\xed", b"\xff\xfe", b"\xff\xee"))
        names = (b"Exif\0\0", b"ICC_PROFILE\0\1\2", b"Photoshop 3.0\0", b"Adobe", b"MPF\0")
        content = rng.choice(names) + rng.randbytes(rng.choice((0, 3, 60, 60_000)))
        data = data[:2] + tag + struct.pack(">H", len(content) + 2) + content + data[2:]
    elif how == 4:
        data = data[:2] + exif(rng) + data[2:]
    elif how == 5:
        data = data[:2] + b"\xff\xfe\xff\xff" + b"x" * 65_533 + data[2:]
    else:
        data = data[:2] + b"\xff" * rng.choice((100, 3_000_000)) + data[2:]
    return shown(data, "jpg", folder)


def exif(rng: random.Random) -> bytes:
    """An EXIF segment with wild tags: loops, huge counts, turnings that do not exist."""
    entries = [
        struct.pack(
            "<HHII",
            rng.choice((0x0112, 0x8769, 0x8825, 0x0201, 0xA005, rng.randrange(65_536))),
            rng.choice((1, 2, 3, 4, 5, 7, 12, 99)),
            rng.choice((0, 1, 4, 2**16, 2**31, 2**32 - 1)),
            rng.choice((0, 8, 3, 6, 99, 2**31, 2**32 - 1)),
        )
        for _ in range(rng.choice((1, 3, 30)))
    ]
    following = struct.pack("<I", rng.choice((0, 8, 2**32 - 1)))
    tags = b"II*\0" + struct.pack("<IH", 8, len(entries)) + b"".join(entries) + following
    content = b"Exif\0\0" + tags
    return b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content


def tiff(folder: Path, rng: random.Random) -> Path:
    """A TIFF of wild tags, or with directories in a circle."""
    order = rng.choice("<>")
    entries = []
    for tag in rng.sample((256, 257, 258, 259, 262, 273, 277, 278, 279, 317, 322, 324, 339), 9):
        count = rng.choice((1, 1, 1, 3, 2**20, 2**31 - 1))
        number = rng.choice((1, 1, 3, 8, 24, 32, 5, 7, 34712, 2**16 - 1, 2**31 - 1))
        entries.append(
            struct.pack(order + "HHII", tag, rng.choice((3, 4, 5, 13, 16)), count, number)
        )
    following = rng.choice((0, 8, 2**31))
    data = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    data += struct.pack(order + "H", len(entries)) + b"".join(entries)
    data += struct.pack(order + "I", following) + rng.randbytes(300)
    return shown(data, "tif", folder)


def simple(folder: Path, rng: random.Random) -> Path:
    """Formats whose sizes stand in a few bytes at the front."""
    width, height = rng.choice(HUGE), rng.choice(HUGE)
    kind = rng.choice(("ppm", "pgm", "bmp", "gif", "tga", "ico", "webp", "qoi"))
    short = struct.pack("<HH", width % 65_536, height % 65_536)
    if kind in ("ppm", "pgm"):
        comment = b"#" * rng.choice((0, 100, 3_000_000)) + b"\n"
        number = b"9" * rng.choice((1, 3, 20, 400_000))
        mode = rng.choice((b"P6", b"P5", b"P3", b"P4", b"Pf", b"P0", b"PyP"))
        data = mode + b"\n" + comment + b"%d %s\n%s\n" % (width, number, number) + bytes(500)
    elif kind == "bmp":
        info = struct.pack("<IiiHHIIiiII", 40, _signed(width), _signed(height), 1,
                           rng.choice((1, 4, 8, 24, 32, 99)), rng.choice((0, 1, 2, 3, 9)),
                           0, 0, 0, rng.choice(HUGE), 0)  # fmt: skip
        data = b"BM" + struct.pack("<IHHI", 54, 0, 0, rng.choice((54, 2**31))) + info + bytes(90)
    elif kind == "gif":
        data = b"GIF89a" + short + b"\x87\0\0" + bytes(768)
        data += (b"," + bytes(4) + short + b"\0\x08\x02L\x01\0") * rng.choice((1, 20_000)) + b";"
    elif kind == "tga":
        data = bytes([0, 0, rng.choice((2, 3, 10, 11)), 0, 0, 0, 0, 0, 0, 0, 0, 0]) + short
        data += bytes([rng.choice((8, 24, 32)), 0]) + rng.randbytes(90)
    elif kind == "ico":
        count = rng.choice((1, 65_535))
        entry = struct.pack("<BBBBHHII", 0, 0, 0, 0, 1, 32, rng.choice(HUGE), rng.choice((22, 0)))
        data = struct.pack("<HHH", 0, 1, count) + entry * min(count, 2000) + samples.image()
    elif kind == "qoi":
        data = b"qoif" + struct.pack(">II", width, height) + b"\x03\0" + rng.randbytes(90)
    else:
        size = struct.pack("<I", width)[:3] + struct.pack("<I", height)[:3]
        extended = b"VP8X" + struct.pack("<I", 10) + bytes([rng.randrange(256), 0, 0, 0]) + size
        data = b"RIFF" + struct.pack("<I", rng.choice(HUGE)) + b"WEBP" + extended
        data += samples.image("webp")[12:]
    return shown(data, kind, folder)


def _signed(number: int) -> int:
    return number if number < 2**31 else number - 2**32


def bombs(folder: Path, rng: random.Random) -> Path:
    """Sound images that are small as files and huge as pixels, frames or text."""
    kind = rng.choice(("png", "gif", "tif", "webp", "frames", "text", "jp2"))
    stream = io.BytesIO()
    side = rng.choice((9_000, 12_000, 16_000))
    if kind == "text":
        notes = PngImagePlugin.PngInfo()
        for i in range(rng.choice((1, 90))):
            notes.add_text(f"k{i}", "x" * 900_000, zip=True)
        Image.new("L", (4, 4)).save(stream, "PNG", pnginfo=notes)
        kind = "png"
    elif kind == "frames":
        frames = [Image.new("P", (300, 300), i % 256) for i in range(400)]
        frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
        kind = "gif"
    elif kind == "tif":
        Image.new("L", (side, side)).save(stream, "TIFF", compression="tiff_adobe_deflate")
    elif kind == "png":
        Image.new(rng.choice(("1", "L", "I;16")), (side, side)).save(stream, "PNG")
    elif kind == "jp2":
        Image.new("L", (3_000, 3_000)).save(stream, "JPEG2000", irreversible=True)
    else:
        Image.new("RGB", (3_000, 3_000)).save(stream, {"gif": "GIF", "webp": "WEBP"}[kind])
    return shown(stream.getvalue(), kind, folder)


MADE: dict[str, tuple[int, Callable[[Path, random.Random], Path]]] = {
    "PNG chunks": (400, png),
    "JPEG segments": (250, jpeg),
    "TIFF tags": (200, tiff),
    "sizes of other formats": (300, simple),
    "bombs": (14, bombs),
}
RULES = (
    *(Rule("image", how, 250, partial(damaged, how), readers.images) for how in BYTES),
    *(Rule("image", name, count, make, readers.images) for name, (count, make) in MADE.items()),
)
