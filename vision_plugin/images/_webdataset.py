"""Images in WebDataset tar shards, indexed by their headers and read in place."""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vision_plugin.images._collection import ImageCollection, no_column
from vision_plugin.images._image import MAX_FILE_BYTES, SUFFIXES, BadImageError

MAX_RANGE = 100_000
"""Largest number of names that one pattern may stand for."""
_TEXT_SUFFIXES = (".cls", ".txt", ".json")


class WebDatasetImages(ImageCollection):
    """Samples of tar files: members whose names agree up to the first dot of the file name.

    The image is the member with an image's suffix. ``cls`` and ``txt`` members, and the fields
    of ``json`` members, are columns. Nothing is ever unpacked to disk.
    """

    kind = "webdataset"

    def __init__(self, tars: Sequence[Path], *, where: str, column: str | None = None) -> None:
        self._where = where
        self.tars = [Path(tar) for tar in tars]
        self.suffix = None if column is None else "." + column.lstrip(".").lower()
        ids: list[str] = []
        self.ids = ids
        self._tar, self._offset, self._size = array("q"), array("q"), array("q")
        self._texts: dict[str, dict[int, tuple[int, int, int]]] = {s: {} for s in _TEXT_SUFFIXES}
        for number, tar in enumerate(self.tars):
            self._index(number, tar, ids)
        if not self.ids:
            raise ValueError(f"{where} holds no images in its {len(self.tars)} tar files")

    def _index(self, number: int, path: Path, ids: list[str]) -> None:
        """Find where each member of a tar lies."""
        images: dict[str, int] = {}
        others: list[tuple[str, str, int, int]] = []
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if not member.isreg() or member.issparse():
                        continue
                    key, suffix = split_name(member.name)
                    if suffix in _TEXT_SUFFIXES:
                        others.append((key, suffix, member.offset_data, member.size))
                    elif key not in images and self._is_image(suffix):
                        images[key] = len(ids)
                        ids.append(f"{path.name}/{key}")
                        self._tar.append(number)
                        self._offset.append(member.offset_data)
                        self._size.append(member.size)
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(
                f"{path} cannot be read as a tar file ({error}); unpack a compressed one to "
                "plain .tar first"
            ) from error
        for key, suffix, offset, size in others:
            if key in images:
                self._texts[suffix][images[key]] = (number, offset, size)

    def _is_image(self, suffix: str) -> bool:
        return suffix in SUFFIXES if self.suffix is None else suffix == self.suffix

    def raw(self, index: int) -> bytes:
        """Return the bytes of the image's member."""
        if self._size[index] > MAX_FILE_BYTES:
            raise BadImageError(self.ids[index], f"{self._size[index]:,} bytes are too many")
        return self._read(self._tar[index], self._offset[index], self._size[index])

    def _read(self, tar: int, offset: int, size: int) -> bytes:
        with self.tars[tar].open("rb") as stream:
            return os.pread(stream.fileno(), size, offset)

    @property
    def column_names(self) -> list[str]:
        """Suffixes of the text members, and the fields of the first ``json`` member."""
        names = [s[1:] for s in (".cls", ".txt") if self._texts[s]]
        first = min(self._texts[".json"], default=None)
        return names if first is None else [*names, *self._fields(first)]

    @property
    def default_label(self) -> str | None:
        """The ``cls`` members, else a label column."""
        return "cls" if self._texts[".cls"] else super().default_label

    def column(self, name: str) -> list[Any]:
        """Return texts, or one field of the ``json`` members; None where a sample has none."""
        if name not in self.column_names:
            raise ValueError(no_column(name, self.column_names, self._where))
        return [self.value(name, index) for index in range(len(self))]

    def value(self, name: str, index: int) -> Any:
        """Return one sample's text or field."""
        suffix = f".{name}"
        if suffix in (".cls", ".txt"):
            place = self._texts[suffix].get(index)
            return None if place is None else self._read(*place).decode("utf-8", "replace").strip()
        return self._fields(index).get(name)

    def _fields(self, index: int) -> dict[str, Any]:
        place = self._texts[".json"].get(index)
        if place is None:
            return {}
        try:
            fields = json.loads(self._read(*place))
        except ValueError as error:
            raise ValueError(
                f"the json member of {self.ids[index]} is not JSON: {error}"
            ) from error
        return fields if isinstance(fields, dict) else {}

    @property
    def details(self) -> dict[str, Any]:
        """The pattern as it was given."""
        return {"path": self._where}


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into key and suffix: ``a/b.seg.png`` is ``a/b`` and ``.seg.png``."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    return folder + slash + stem, (dot + suffix).lower()


def expand(pattern: str) -> list[Path]:
    """Return the files that a pattern with ``{000..003}``, ``{a,b}`` or ``*`` matches, in order.

    Raises:
        ValueError: a range stands for too many names.
        FileNotFoundError: a named file is missing, or nothing matches.
    """
    paths: list[Path] = []
    for name in _expand_braces(pattern):
        if any(c in name for c in "*?["):
            paths += [Path(found) for found in sorted(glob.glob(name, recursive=True))]  # noqa: PTH207
        elif Path(name).is_file():
            paths.append(Path(name))
        else:
            raise FileNotFoundError(f"{name} (of {pattern}) does not exist")
    if not paths:
        raise FileNotFoundError(f"no file matches {pattern}")
    return paths


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    head, tail = pattern[: match.start()], pattern[match.end() :]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match.group(1))
    if span is None:
        options = match.group(1).split(",")
    else:
        first, last = int(span.group(1)), int(span.group(2))
        if abs(last - first) >= MAX_RANGE:
            raise ValueError(f"{pattern} stands for more than {MAX_RANGE:,} files")
        step = 1 if last >= first else -1
        width = len(span.group(1))
        options = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    return [name for option in options for name in _expand_braces(head + option + tail)]
