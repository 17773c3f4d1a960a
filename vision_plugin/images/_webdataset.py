"""Images in WebDataset tar shards, indexed by their headers and read in place."""

from __future__ import annotations

import glob
import logging
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vision_plugin._untrusted import open_regular, parse_json
from vision_plugin.images._collection import ImageCollection, no_column
from vision_plugin.images._image import MAX_FILE_BYTES, SUFFIXES, BadImageError
from vision_plugin.images._tar import members

logger = logging.getLogger(__name__)

MAX_TEXT_BYTES = 16 * 1024 * 1024
"""Larger members with text or JSON are refused."""
MAX_RANGE = 100_000
"""Largest number of names that one pattern may stand for."""
_TEXT_SUFFIXES = (".cls", ".txt", ".json")


class WebDatasetImages(ImageCollection):
    """Samples of tar files: members whose names agree up to the first dot of the file name.

    The image is the member with an image's suffix. ``cls`` and ``txt`` members, and the fields
    of ``json`` members, are columns. Nothing is ever unpacked to disk.
    """

    kind = "webdataset"

    def __init__(
        self,
        tars: Sequence[Path],
        *,
        where: str,
        column: str | None = None,
        split: str | None = None,
    ) -> None:
        self._where, self._split = where, split
        self.tars = list(tars)
        self.suffix = None if column is None else "." + column.lstrip(".").lower()
        self._names = [tar.name for tar in self.tars]
        if len(set(self._names)) < len(self.tars):
            # Tars of one name in several folders: an id has to be about one image.
            above = os.path.commonpath([tar.absolute().parent for tar in self.tars])
            self._names = [os.path.relpath(tar.absolute(), above) for tar in self.tars]
        ids: list[str] = []
        self.ids = ids
        self._tar, self._offset, self._size = array("q"), array("q"), array("q")
        self._texts: dict[str, dict[int, tuple[int, int, int]]] = {s: {} for s in _TEXT_SUFFIXES}
        others: Counter[str] = Counter()
        without = 0
        for number, tar in enumerate(self.tars):
            without += self._index(number, tar, ids, others)
        if not self.ids:
            raise ValueError(self._nothing(others))
        if others:
            logger.info(
                "%s: %d members are neither images nor texts, as those that end in %s",
                *(where, others.total(), others.most_common(1)[0][0]),
            )
        if without:
            logger.warning("%s: %d samples without an image are left out", where, without)

    def _index(self, number: int, path: Path, ids: list[str], others: Counter[str]) -> int:
        """Find where each member of a tar lies; return how many samples have no image.

        Args:
            number: Place of the tar among the tars.
            path: The tar.
            ids: Receives the id of each image.
            others: Counts the suffixes of members that are neither images nor texts.
        """
        found: dict[str, tuple[int, str]] = {}
        texts: dict[tuple[str, str], tuple[int, int]] = {}
        links = 0
        for member in members(path):
            key, suffix = split_name(member.name)
            if not member.is_plain:
                links += not member.name.endswith("/")
            elif suffix in _TEXT_SUFFIXES:
                if (key, suffix) in texts:
                    raise ValueError(_twice(path, key, suffix))
                texts[key, suffix] = member.offset, member.size
            elif not self._is_image(suffix):
                others[suffix] += 1
            elif key in found:
                raise ValueError(_twice(path, key, found[key][1], suffix))
            else:
                found[key] = len(ids), suffix
                ids.append(f"{self._names[number]}/{key}")
                self._tar.append(number)
                self._offset.append(member.offset)
                self._size.append(member.size)
        if links:
            logger.warning("%s: %d links, devices or sparse files are left out", path, links)
        for (key, suffix), (offset, size) in texts.items():
            if key in found:
                self._texts[suffix][found[key][0]] = (number, offset, size)
        return len({key for key, _ in texts} - found.keys())

    def _nothing(self, others: Counter[str]) -> str:
        message = f"{self._where} holds no images in its {len(self.tars)} tar files"
        if not others:
            return message
        suffixes = ", ".join(repr(suffix) for suffix, _ in others.most_common(5))
        return (
            f"{message}: their members end in {suffixes}. Name the suffix of the images with "
            "column= (image_column= in a configuration)"
        )

    def _is_image(self, suffix: str) -> bool:
        return suffix in SUFFIXES if self.suffix is None else suffix == self.suffix

    def raw(self, index: int) -> bytes:
        """Return the bytes of the image's member."""
        if self._size[index] > MAX_FILE_BYTES:
            raise BadImageError(self.ids[index], f"{self._size[index]:,} bytes are too many")
        return self._read(self._tar[index], self._offset[index], self._size[index])

    def _read(self, tar: int, offset: int, size: int) -> bytes:
        with open_regular(self.tars[tar]) as stream:
            return os.pread(stream.fileno(), size, offset)

    def _text(self, index: int, tar: int, offset: int, size: int) -> bytes:
        if size > MAX_TEXT_BYTES:
            raise ValueError(
                f"a text of {self.ids[index]} has {size:,} bytes, above the limit of "
                f"{MAX_TEXT_BYTES:,}: shorten it, or leave out its column"
            )
        return self._read(tar, offset, size)

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
            if place is None:
                return None
            return self._text(index, *place).decode("utf-8", "replace").strip()
        return self._fields(index).get(name)

    def _fields(self, index: int) -> dict[str, Any]:
        place = self._texts[".json"].get(index)
        if place is None:
            return {}
        where = f"the json member of {self.ids[index]}"
        fields = parse_json(self._text(index, *place), where)
        if not isinstance(fields, dict):
            raise ValueError(
                f"{where} holds a {type(fields).__name__}, not an object: write its fields as "
                '{"name": value}'
            )
        return fields

    @property
    def details(self) -> dict[str, Any]:
        """The pattern as it was given, and the split."""
        return {"path": self._where, "split": self._split}


def _twice(path: Path, key: str, first: str, second: str | None = None) -> str:
    if second in (None, first):
        return f"{path} holds two members {key}{first}: leave one of them out"
    return (
        f"{path}: the sample {key} has several images, {first} and {second}: name the suffix to "
        "use with column= (image_column= in a configuration)"
    )


def holds_images(tar: Path) -> bool:
    """Return whether a tar has an image.

    Raises:
        ValueError: it cannot be read as a tar.
    """
    return any(m.is_plain and split_name(m.name)[1] in SUFFIXES for m in members(tar))


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
    for number, name in enumerate(_expand_braces(pattern)):
        if number >= MAX_RANGE:
            raise ValueError(f"{pattern} stands for more than {MAX_RANGE:,} files")
        if any(c in name for c in "*?["):
            paths += [Path(found) for found in sorted(glob.glob(name, recursive=True))]  # noqa: PTH207
        elif Path(name).exists():
            paths.append(Path(name))
        else:
            raise FileNotFoundError(f"{name} (of {pattern}) does not exist")
    if not paths:
        raise FileNotFoundError(f"no file matches {pattern}")
    return paths


def _expand_braces(pattern: str) -> Iterator[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    head, tail = pattern[: match.start()], pattern[match.end() :]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match.group(1))
    options: Iterable[str] = match.group(1).split(",")
    if span is not None:
        first, last = int(span.group(1)), int(span.group(2))
        if abs(last - first) >= MAX_RANGE:
            raise ValueError(f"{pattern} stands for more than {MAX_RANGE:,} files")
        step = 1 if last >= first else -1
        width = len(span.group(1))
        options = (f"{number:0{width}d}" for number in range(first, last + step, step))
    for option in options:
        yield from _expand_braces(head + option + tail)
