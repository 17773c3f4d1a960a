"""The members of a tar file, found by their headers alone.

Python's ``tarfile`` trusts the sizes that headers give: a negative or huge one makes it loop, or
take memory without end. It also takes a damaged header in the middle for the end. Both are errors
here.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from vision_plugin._untrusted import open_regular

logger = logging.getLogger(__name__)

BLOCK = 512
MAX_EXTENSION_BYTES = 1024 * 1024
"""Headers with a longer name, or with more pax records, are refused."""
MAX_GAP_BLOCKS = 4096
"""After so many empty blocks a file has ended; fewer may lie between tars that were joined."""
_PLAIN = (b"0", b"\0", b"7")
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")
"""Links, devices, folders and pipes: nothing follows, whatever size their headers give."""
_LONG_NAME, _PAX, _SPARSE = b"L", b"x", b"S"
_OTHER_EXTENSIONS = (b"K", b"g", b"X", b"N", b"V", b"M")
_PAX_LENGTH = re.compile(rb"(\d{1,7}) ")


class Member(NamedTuple):
    """A member of a tar, and where its content lies."""

    name: str
    offset: int
    size: int
    is_plain: bool
    """Whether it is a file with its content: no link, folder, device or sparse file."""


def members(path: Path) -> Iterator[Member]:
    """Yield the members of an uncompressed tar in order.

    Raises:
        ValueError: it is not a tar, damaged, truncated, or no regular file.
    """
    with open_regular(path) as stream:
        headers = _Headers(stream.fileno(), os.fstat(stream.fileno()).st_size)
        try:
            yield from headers.walk()
            if not headers.is_ended:
                logger.warning("%s has no mark at its end: it may have been cut short", path)
        except _DamageError as error:
            raise ValueError(
                f"{path} cannot be read as a tar file ({error}); unpack a compressed one to "
                "plain .tar first, and fetch a damaged one again"
            ) from None


class _DamageError(ValueError):
    pass


@dataclass
class _Extension:
    """What headers in front of a member's own say about it."""

    name: str | None = None
    size: int | None = None
    is_sparse: bool = False


@dataclass
class _Headers:
    descriptor: int
    end: int
    is_ended: bool = False

    def walk(self) -> Iterator[Member]:
        if self.end == 0:
            raise _DamageError("it is empty")
        place, gap, extension = 0, 0, _Extension()
        while place < self.end and gap < MAX_GAP_BLOCKS:
            header = os.pread(self.descriptor, BLOCK, place)
            if not header.strip(b"\0"):
                place, gap = place + BLOCK, gap + 1
                continue
            _check(header, place)
            kind, gap = header[156:157], 0
            offset = place + BLOCK
            if kind == _SPARSE:
                offset = self._after_map(header, offset)
            size = _number(header[124:136]) if extension.size is None else extension.size
            size = 0 if kind in _WITHOUT_CONTENT else size
            if not 0 <= size <= self.end - offset:
                raise _DamageError(
                    f"the member at byte {place:,} claims {size:,} bytes, and "
                    f"{max(0, self.end - offset):,} follow"
                )
            place = offset + -(-size // BLOCK) * BLOCK
            if kind == _LONG_NAME:
                extension.name = _text(self._content(offset, size))
            elif kind == _PAX:
                _read_pax(self._content(offset, size), extension)
            elif kind not in _OTHER_EXTENSIONS:
                name = extension.name or _name(header)
                is_plain = kind in _PLAIN and not extension.is_sparse and not name.endswith("/")
                yield Member(name, offset, size, is_plain)
                extension = _Extension()
        if place > self.end:
            raise _DamageError("it ends in the middle of its last member")
        self.is_ended = gap > 0

    def _content(self, offset: int, size: int) -> bytes:
        if size > MAX_EXTENSION_BYTES:
            raise _DamageError(
                f"the header at byte {offset:,} has {size:,} bytes, above the limit of "
                f"{MAX_EXTENSION_BYTES:,}"
            )
        return os.pread(self.descriptor, size, offset)

    def _after_map(self, header: bytes, offset: int) -> int:
        """Return where the content of a sparse file begins: behind the blocks with its map."""
        more = header[482:483] != b"\0"
        while more:
            more = os.pread(self.descriptor, BLOCK, offset)[504:505] not in (b"\0", b"")
            offset += BLOCK
        return offset


def _check(header: bytes, place: int) -> None:
    if len(header) < BLOCK:
        raise _DamageError(f"it ends in the middle of the header at byte {place:,}")
    rest = header[:148] + b" " * 8 + header[156:]
    excess = _number(header[148:156]) - sum(rest)
    # Some old writers add up signed bytes.
    if excess and excess != -256 * sum(value > 127 for value in rest):
        raise _DamageError(f"there is no header at byte {place:,}")


def _number(field: bytes) -> int:
    """Return a number in octal digits, or in base 256; -1 for anything else."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    digits = field.partition(b"\0")[0].strip()
    return int(digits or b"0", 8) if re.fullmatch(rb"[0-7]*", digits) else -1


def _read_pax(content: bytes, extension: _Extension) -> None:
    """Note what pax records, ``LENGTH KEY=VALUE`` and a line's end each, say about a member."""
    start, end = 0, len(content.rstrip(b"\0"))
    while start < end:
        head = _PAX_LENGTH.match(content, start)
        after = start + int(head.group(1)) if head else 0
        record = content[head.end() if head else 0 : after]
        key, equals, value = record.removesuffix(b"\n").partition(b"=")
        if after > end or not equals:
            raise _DamageError("a pax header is damaged")
        if key == b"path":
            extension.name = _text(value)
        elif key == b"size":
            extension.size = int(value) if re.fullmatch(rb"\d{1,19}", value) else -1
        extension.is_sparse |= key.startswith(b"GNU.sparse.")
        start = after


def _name(header: bytes) -> str:
    name, prefix = _text(header[:100]), _text(header[345:500])
    return f"{prefix}/{name}" if prefix and header[257:263] == b"ustar\0" else name


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")
