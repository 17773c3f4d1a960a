"""Ways to damage bytes and JSON, by a random generator."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

CANARY = "../canary"
"""The folder that no input may touch, as seen from the folder that inputs are read in."""


def truncated(data: bytes, rng: random.Random) -> bytes:
    """Cut the end off, anywhere."""
    return data[: rng.randrange(len(data))]


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Change one to four bytes, more often near either end, where headers are."""
    damaged = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        near = min(len(data), 400)
        place = rng.choice(
            (rng.randrange(len(data)), rng.randrange(near), -1 - rng.randrange(near))
        )
        damaged[place] ^= rng.randrange(1, 256)
    return bytes(damaged)


def spliced(data: bytes, rng: random.Random) -> bytes:
    """Copy a piece over, into or out of another place."""
    start = rng.randrange(len(data))
    piece = data[start : start + rng.randrange(1, 200)]
    place = rng.randrange(len(data))
    after = place + rng.choice((0, len(piece), rng.randrange(1, 50)))
    return data[:place] + rng.choice((piece, b"")) + data[after:]


def blanked(data: bytes, rng: random.Random) -> bytes:
    """Overwrite a run of bytes by zeros, ones or noise."""
    start, length = rng.randrange(len(data)), rng.choice((1, 4, 8, 64, 512))
    fill = rng.choice((b"\0" * length, b"\xff" * length, rng.randbytes(length)))
    return data[:start] + fill + data[start + length :]


def enlarged(data: bytes, rng: random.Random) -> bytes:
    """Overwrite four or eight bytes by a huge number, of either byte order."""
    start = rng.choice((rng.randrange(len(data)), rng.randrange(min(len(data), 400))))
    number = rng.choice((2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1, 2**40, 2**24))
    size = 4 if number < 2**32 else 8
    return (
        data[:start] + number.to_bytes(size, rng.choice(("little", "big"))) + data[start + size :]
    )


def grown(data: bytes, rng: random.Random) -> bytes:
    """Append or prepend rubbish, or the whole once more."""
    rubbish = rng.choice((data, rng.randbytes(300), b"\0" * 4096, b"{}", b"\n"))
    return rng.choice((data + rubbish, rubbish + data))


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": truncated,
    "bytes flipped": flipped,
    "pieces moved": spliced,
    "runs overwritten": blanked,
    "numbers enlarged": enlarged,
    "rubbish added": grown,
}


def nested(depth: int, rng: random.Random) -> Any:
    """A list or an object so many levels deep."""
    value: Any = 1
    for _ in range(depth):
        value = rng.choice(([value], {"a": value}))
    return value


def value(rng: random.Random) -> Any:
    """A value that no field expects."""
    plain = (None, True, False, -1, 0, 1, 1.5, "", "x", [], {}, [None], {"a": 1}, "1", "nan", "0")
    hostile = (
        *(2**31, 2**63, 2**64, 10**12, 10**30, -(2**70), 1e308, -1e-320, 10**400),
        *(float("nan"), float("inf"), float("-inf")),
        *("../x", f"{CANARY}/keep.txt", "/dev/zero", "/etc/passwd", "a\0b", "\ud800", "\x1b[2J"),
        *("x" * 100_000, "{}", "[[[[", "a\nb", "\u202e", "%s%n", "{0.__class__}", "~nosuch"),
        *([[]] * 3, ["x"] * 2000, {str(i): i for i in range(500)}, [[[1, 2], [3]], "a", None]),
    )
    if rng.random() < 0.1:
        return nested(rng.choice((5, 50, 90)), rng)
    return rng.choice(plain if rng.random() < 0.5 else hostile)


def places(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every value of a JSON document."""
    if path:
        yield path
    if isinstance(tree, dict | list):
        keys = tree if isinstance(tree, dict) else range(len(tree))
        for key in keys:
            yield from places(tree[key], (*path, key))


def edited(tree: Any, rng: random.Random, *, times: int = 1) -> Any:
    """Return a document with values replaced, removed, exchanged or added."""
    tree = deepcopy(tree)
    for _ in range(times):
        listed = list(places(tree))
        if not listed or rng.random() < 0.03:
            return value(rng)
        *way, last = rng.choice(listed)
        inner = tree
        for key in way:
            inner = inner[key]
        how = rng.random()
        if how < 0.65:
            inner[last] = value(rng)
        elif how < 0.8:
            del inner[last]
        elif how < 0.9 and isinstance(inner, dict):
            inner[rng.choice(("", "__class__", "a" * 5000, "../x", "\0"))] = inner.pop(last)
        else:
            inner[last] = deepcopy(at(tree, rng.choice(listed)))
    return tree


def everywhere(tree: Any, rng: random.Random) -> Any:
    """Return a document in which one number is huge wherever it stands, so that all agree."""
    numbers = sorted({v for p in places(tree) if type(v := at(tree, p)) is int})
    if not numbers:
        return edited(tree, rng)
    old, new = rng.choice(numbers), rng.choice((10**9, 10**12, 2**63 - 1, 2**64, 10**30, -1, 0))

    def renew(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: renew(inner) for key, inner in node.items()}
        if isinstance(node, list):
            return [renew(inner) for inner in node]
        return new if type(node) is int and node == old else node

    return renew(tree)


def at(tree: Any, path: tuple[Any, ...]) -> Any:
    """Return the value at a path."""
    for key in path:
        tree = tree[key]
    return tree


def as_json(tree: Any) -> bytes:
    """Write a document, also one with NaN and half characters."""
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def json_bomb(valid: bytes, rng: random.Random) -> bytes:
    """Text that is no JSON, or JSON that no reader wants."""
    depth = rng.choice((500, 5_000, 100_000, 900_000))
    digits = rng.choice((5_000, 400_000))
    key = rng.choice((b'{"a":', b'{"metadata":', b'{"schema":'))
    return rng.choice(
        (
            lambda: b"[" * depth,
            lambda: b"[" * depth + b"]" * depth,
            lambda: key * depth + b"1" + b"}" * depth,
            lambda: key * depth,
            lambda: b'{"a":' + b"[" * depth + b"]" * depth + b"}",
            lambda: b"1" * digits,
            lambda: b'{"n_images": ' + b"9" * digits + b"}",
            lambda: b"-" + b"1" * digits + b"e" + b"9" * 30,
            lambda: valid.replace(b":", b": " + b"9" * digits + b", ", 1),
            lambda: b"\xef\xbb\xbf" + valid,
            lambda: valid.decode("utf-8", "replace").encode("utf-16"),
            lambda: valid + b"\xff\xfe",
            lambda: valid.replace(b"{", b"{" + valid[1:].rstrip()[:40] + b",", 1),
            lambda: b" " * rng.choice((10, 3_000_000)) + valid,
            lambda: valid + b" " * 3_000_000,
            lambda: b"{" + b",".join(b'"%d":%d' % (i, i) for i in range(150_000)) + b"}",
            lambda: b"[" + b",".join([b"{}"] * 300_000) + b"]",
            lambda: b'"' + b"\\u0000" * 100_000 + b'"',
            lambda: rng.choice(
                (b"", b"\0", b"null", b"NaN", b"true", b'"x"', b"[]", b"{}", b"-", b"{'a': 1}")
            ),
            lambda: b'{"a": 1e999, "b": -1e999, "c": NaN}',
            lambda: b'{"\\ud800": "\\udfff"}',
        )
    )()
