"""How much the pages of a Parquet column expand to, by the headers in front of them.

The footer of a file gives a size too, but nothing holds it to the truth: a reader takes as much
memory as the headers say.
"""

from __future__ import annotations

import os

MAX_PAGES = 200_000
"""A column of a row group with more pages is refused."""
_FIRST_READ, _LAST_READ = 256, 16 * 1024 * 1024
"""Bytes that a header is looked for in, at first and at most: it may hold statistics."""
_STOP, _TRUE, _FALSE, _BYTE = 0, 1, 2, 3
_DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = 7, 8, 9, 10, 11, 12
_INTEGERS = (4, 5, 6)
_MAX_DEPTH = 8


def expanded_bytes(descriptor: int, start: int, length: int) -> int:
    """Return the number of bytes that all pages of a column of a row group expand to.

    Args:
        descriptor: The file.
        start: Where the first page begins.
        length: Number of bytes that the pages take in the file.

    Raises:
        ValueError: a header is damaged, or there are too many pages.
    """
    place, expanded = start, 0
    for _ in range(MAX_PAGES):
        if place >= start + length:
            return expanded
        size, stored, header = _page(descriptor, place)
        if size < 0 or stored < 0:
            raise ValueError(f"the page at byte {place:,} has a negative size")
        expanded += size
        place += header + stored
    raise ValueError(f"it has more than {MAX_PAGES:,} pages in one row group")


def _page(descriptor: int, place: int) -> tuple[int, int, int]:
    """Return a page's size when expanded, its size in the file, and the size of its header."""
    n_bytes = _FIRST_READ
    while n_bytes <= _LAST_READ:
        content = os.pread(descriptor, n_bytes, place)
        header = _Compact(content)
        try:
            fields = header.struct()
        except IndexError:
            if len(content) < n_bytes:
                break
            n_bytes *= 16
            continue
        if 2 in fields and 3 in fields:
            return fields[2], fields[3], header.place
        break
    raise ValueError(f"the page at byte {place:,} has a damaged header")


class _Compact:
    """Reads what Thrift's compact protocol writes, of which integers alone are kept."""

    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 0

    def struct(self, depth: int = 0) -> dict[int, int]:
        """Read a struct; return its integers by the numbers of their fields."""
        found: dict[int, int] = {}
        number = 0
        while True:
            mark = self._byte()
            kind, step = mark & 15, mark >> 4
            if kind == _STOP:
                return found
            number = number + step if step else self._signed()
            if kind in _INTEGERS:
                found[number] = self._signed()
            elif kind not in (_TRUE, _FALSE):
                self._skip(kind, depth + 1)

    def _skip(self, kind: int, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise ValueError("a page header is nested too deep")
        if kind == _STRUCT:
            self.struct(depth)
        elif kind == _BINARY:
            self._jump(self._unsigned())
        elif kind == _DOUBLE:
            self._jump(8)
        elif kind == _BYTE:
            self._jump(1)
        elif kind in _INTEGERS:
            self._unsigned()
        elif kind in (_LIST, _SET):
            mark = self._byte()
            n_items = mark >> 4 if mark >> 4 < 15 else self._unsigned()
            self._skip_items([mark & 15], n_items, depth)
        elif kind == _MAP:
            n_items = self._unsigned()
            kinds = self._byte() if n_items else 0
            self._skip_items([kinds >> 4, kinds & 15], n_items, depth)
        else:
            raise ValueError("a page header is damaged")

    def _skip_items(self, kinds: list[int], n_items: int, depth: int) -> None:
        if n_items > len(self.content):
            raise IndexError("more items than bytes")
        for _ in range(n_items):
            for kind in kinds:
                self._skip(_BYTE if kind in (_TRUE, _FALSE) else kind, depth + 1)

    def _jump(self, n_bytes: int) -> None:
        self.place += n_bytes
        if self.place > len(self.content):
            raise IndexError("the header goes on")

    def _byte(self) -> int:
        value = self.content[self.place]
        self.place += 1
        return value

    def _unsigned(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("a page header is damaged")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
