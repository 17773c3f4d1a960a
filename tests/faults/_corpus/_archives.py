"""Hostile tar shards."""

from __future__ import annotations

import io
import random
import tarfile
from functools import cache, partial
from pathlib import Path

from tests.faults._corpus import _readers as readers
from tests.faults._corpus import _samples as samples
from tests.faults._corpus._case import Rule
from tests.faults._corpus._mutate import BYTES, CANARY, as_json, edited, json_bomb

FIELDS = {
    "name": (0, 100),
    "mode": (100, 8),
    "uid": (108, 8),
    "size": (124, 12),
    "mtime": (136, 12),
    "type": (156, 1),
    "link": (157, 100),
    "magic": (257, 8),
    "prefix": (345, 155),
}
"""Place and length of each field of a tar header."""
ABOUT = {"label": "cat", "caption": "a cat", "score": 0.5, "tags": ["a"]}


def tar(members: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> bytes:
    """A tar of plain members."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as made:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            made.addfile(member, io.BytesIO(content))
    return stream.getvalue()


@cache
def valid() -> bytes:
    """Two samples with every kind of member."""
    members = {}
    for i, kind in enumerate(("png", "jpg")):
        members[f"a/{i:03}.{kind}"] = samples.image(kind)
        members[f"a/{i:03}.cls"] = str(i).encode()
        members[f"a/{i:03}.txt"] = b"a cat"
        members[f"a/{i:03}.json"] = as_json(ABOUT)
    return tar(members)


def put(data: bytes, folder: Path) -> Path:
    """Write a shard and return it."""
    return samples.put({"hostile.tar": data}, folder) / "hostile.tar"


def damaged(how: str, folder: Path, rng: random.Random) -> Path:
    """Damaged bytes anywhere."""
    return put(BYTES[how](valid(), rng), folder)


def summed(header: bytes) -> bytes:
    """A header with the right checksum."""
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


def headers(folder: Path, rng: random.Random) -> Path:
    """Headers of right checksums and wrong content."""
    data = bytearray(valid())
    starts = [i for i in range(0, len(data), 512) if data[i + 257 : i + 262] == b"ustar"]
    for start in rng.sample(starts, rng.choice((1, 1, 3))):
        name = rng.choice(list(FIELDS))
        at, length = FIELDS[name]
        if name == "type":
            content = rng.choice(b"0123456789ABDKLMNSVXgx\0\xff").to_bytes(1, "big")
        elif name in ("name", "link", "prefix"):
            content = rng.choice(
                (b"../" * 33, f"{CANARY}/touched.png".encode(), b"/etc/passwd", b"\xff" * 100, b"")
            )
        else:
            content = rng.choice(
                (
                    b"\xff" * length,  # negative
                    b"\x80" + b"\xff" * (length - 1),  # huge
                    b"\x80" + bytes(length - 2) + b"\x01",
                    b"7" * (length - 1) + b"\0",
                    b"-1\0",
                    b"99999999\0",
                    b"\0" * length,
                    b" " * length,
                    rng.randbytes(length),
                )
            )
        block = bytearray(data[start : start + 512])
        block[at : at + length] = content[:length].ljust(length, b"\0")
        data[start : start + 512] = summed(bytes(block))
    return put(bytes(data), folder)


def extended(folder: Path, rng: random.Random) -> Path:
    """Pax and GNU headers that say something else than the member."""
    member = tarfile.TarInfo("a/000.png")
    member.size = 100
    keys = (
        *("size", "path", "linkpath", "mtime", "hdrcharset", "uid", "GNU.sparse.map"),
        *("GNU.sparse.major", "GNU.sparse.realsize", "GNU.sparse.name"),
    )
    key = rng.choice(keys)
    content = rng.choice(
        (
            "-1",
            "0",
            "9" * 30,
            "1e9",
            "x",
            "",
            "../" * 9,
            "1,2,3",
            "0,99999999999999",
            "BINARY",
            "1.5",
        )
    )
    member.pax_headers = {key: content, **({"size": "7"} if rng.random() < 0.2 else {})}
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as made:
        made.addfile(member, io.BytesIO(bytes(100)))
    data = stream.getvalue()
    if rng.random() < 0.4:  # the length before a record lies
        data = data.replace(
            b" " + key.encode(), rng.choice((b"9 ", b"0 ", b"  ")) + key.encode(), 1
        )
    return put(data[:-1024] + valid(), folder)


def long_headers(folder: Path, rng: random.Random) -> Path:
    """A header that announces, or is, a very long name or record."""
    size = rng.choice((10_000, 3_000_000, 2**33, 2**60))
    kind = rng.choice((b"L", b"K", b"x", b"g", b"S"))
    block = bytearray(512)
    block[:9] = b"././@long"
    block[156:157] = kind
    block[257:265] = b"ustar  \0"
    block[124:136] = b"\x80" + size.to_bytes(11, "big")
    body = (b"x" * size if kind in b"LK" else b"%d path=x\n" % size) if size < 2**30 else b""
    body = body.ljust(-(-len(body) // 512) * 512, b"\0")
    data = summed(bytes(block)) + body
    return put(data * rng.choice((1, 2)) + valid(), folder)


def about(folder: Path, rng: random.Random) -> Path:
    """Members beside the images that are not what their suffix says."""
    hostile = rng.choice(
        (
            lambda: as_json(edited(ABOUT, rng)),
            lambda: as_json(edited(ABOUT, rng)),
            lambda: json_bomb(as_json(ABOUT), rng),
            lambda: rng.choice(tuple(BYTES.values()))(as_json(ABOUT), rng),
        )
    )()
    members = {"a/0.png": samples.image(), "a/1.png": samples.image("jpg")}
    order = ["a/0.json", "a/1.json"]
    rng.shuffle(order)
    members |= {order[0]: hostile, order[1]: as_json(ABOUT)}
    other = rng.choice((b"", b"\xff\xfe", b"\0" * 900, b"x" * 2_000_000, b"1\n2", b"-1", hostile))
    members |= {f"a/0{rng.choice(('.cls', '.txt'))}": other}
    return put(tar(members), folder)


def names(folder: Path, rng: random.Random) -> Path:
    """Members of odd names, twice, or very many."""
    image = samples.image()
    name = rng.choice(
        (
            *(f"{CANARY}/touched.png", "/etc/passwd.png", ".png", "a/.png", "..png", "a.b.c.png"),
            *("x" * 90 + ".png", "a/0.PNG", "a\n0.png", "\x1b[2J.png", "a/0.png/", "a/0.jpg.png"),
        )
    )
    members = {name: image, "a/0.png": image, "a/0.jpg": samples.image("jpg")}
    if rng.random() < 0.2:
        members = {f"{i}.png": b"" for i in range(rng.choice((3_000, 30_000)))}
    data = tar(members)
    if rng.random() < 0.3:
        data = data[:-1024].rstrip(b"\0").ljust(-(-len(data) // 512) * 512, b"\0") + data
    return put(data, folder)


RULES = (
    *(Rule("tar", how, 60, partial(damaged, how), readers.images) for how in BYTES),
    Rule("tar", "headers", 350, headers, readers.images),
    Rule("tar", "pax headers", 200, extended, readers.images),
    Rule("tar", "long headers", 60, long_headers, readers.images),
    Rule("tar", "json, cls and txt members", 200, about, readers.images),
    Rule("tar", "names", 80, names, readers.images),
)
