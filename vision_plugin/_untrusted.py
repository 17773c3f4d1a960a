"""Read what nobody vouches for: regular files up to a limit, and JSON of bounded size and depth.

Every error is a ``ValueError`` that says what was found, where, and what to do next.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

MAX_JSON_BYTES = 64 * 1024 * 1024
"""Larger JSON is refused before it is read."""
MAX_JSON_VALUES = 2_000_000
"""JSON with more values is refused before it is parsed: each takes some hundred bytes of memory."""
MAX_JSON_DEPTH = 64
"""JSON nested deeper is refused."""
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read.

    Nothing else is opened: reading a named pipe or a device may wait for ever, or never end.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is a pipe, a device, a socket or a folder.
    """
    _check_regular(path, os.stat(path))  # noqa: PTH116  # before opening, which may do something
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(path, os.fstat(descriptor))
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path, limit: int) -> bytes:
    """Return the bytes of a regular file.

    Files that the system makes up as they are read, as in ``/proc``, have size 0 and read as empty.

    Args:
        path: File to read.
        limit: Size in bytes above which the file is refused.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is larger than the limit, no regular file, or the system cannot read it.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > limit:
            raise ValueError(
                f"{path} has {size:,} bytes, above the limit of {limit:,}: make it smaller"
            )
        try:
            return stream.read(size)
        except OSError as error:
            raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> ValueError:
    """Return the error that names the file, for one from a stream, which does not know its file."""
    return ValueError(
        f"{path} cannot be read ({error.strerror}): copy it again, or name another file"
    )


def read_json(
    path: Path,
    *,
    limit: int = MAX_JSON_BYTES,
    max_values: int = MAX_JSON_VALUES,
    strict: bool = False,
) -> Any:
    """Return the content of a JSON file; see :func:`parse_json`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is too large, no regular file, or not JSON.
    """
    return parse_json(read_regular(path, limit), path, max_values=max_values, strict=strict)


def parse_json(
    content: bytes,
    where: Path | str,
    *,
    max_values: int = MAX_JSON_VALUES,
    strict: bool = False,
    unique: bool = False,
) -> Any:
    """Return the value of JSON text in UTF-8, in time and memory bounded by its size.

    Args:
        content: The text.
        where: Name of the text in errors.
        max_values: Number of values above which the text is refused.
        strict: Whether to refuse NaN, infinities and repeated keys.
        unique: Whether to refuse repeated keys.

    Raises:
        ValueError: it is not JSON, or holds too many values or too deep ones.
    """
    n_values = sum(content.count(mark) for mark in (b",", b"[", b"{"))
    if n_values > max_values:
        raise ValueError(
            f"{where} holds up to {n_values:,} values, above the limit of {max_values:,} for "
            "JSON: split it, or leave out what is not needed"
        )
    hooks: dict[str, Any] = {}
    if strict or unique:
        hooks["object_pairs_hook"] = _without_doubles
    if strict:
        hooks["parse_constant"] = _no_constant
    try:
        value = json.loads(content.decode("utf-8-sig"), **hooks)
    except RecursionError:
        raise ValueError(_too_deep(where)) from None
    except ValueError as error:
        raise ValueError(f"{where} is not JSON ({error}): mend it or write it again") from error
    is_nested = content.count(b"[") + content.count(b"{") > MAX_JSON_DEPTH
    if is_nested and isinstance(value, (dict, list)):
        _check_depth(value, where)
    return value


def _check_regular(path: Path, found: os.stat_result) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        raise ValueError(
            f"{path} is {_KINDS.get(kind, 'something else')}, not a regular file: name a file that "
            "holds the content"
        )


def _check_depth(value: Any, where: Path | str) -> None:
    level: list[Any] = [value]  # the objects and lists at one depth
    for _ in range(MAX_JSON_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return
    raise ValueError(_too_deep(where))


def _too_deep(where: Path | str) -> str:
    return f"{where} is nested more than {MAX_JSON_DEPTH} deep: JSON like that is not read"


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")
