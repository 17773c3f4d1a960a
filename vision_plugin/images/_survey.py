"""What a folder holds: images, Parquet files, tars and tables about the images."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path

from vision_plugin.images._image import SUFFIXES

logger = logging.getLogger(__name__)

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
"""Names of tables about the images beside and below them."""
MAX_LINKS = 25_000
"""Links to folders that are followed in one folder."""


@dataclass
class Contents:
    """Relative paths of files in a folder and all below it, each list sorted."""

    images: list[str] = field(default_factory=list)
    parquet: list[str] = field(default_factory=list)
    tars: list[str] = field(default_factory=list)
    metadata: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Sort a file in by its name."""
        base = name.rpartition("/")[2]
        suffix = os.path.splitext(base)[1].lower()  # noqa: PTH122  # for each of millions of files
        if base in METADATA:
            self.metadata.append(name)
        elif suffix in SUFFIXES:
            self.images.append(name)
        elif suffix == ".parquet":
            self.parquet.append(name)
        elif suffix == ".tar":
            self.tars.append(name)
        else:
            self.others.append(name)


def survey(root: Path) -> Contents:
    """Return what is in a folder, with the folders that links lead to; hidden files are left out.

    A link to a folder that it is in itself is not followed.

    Raises:
        ValueError: there are too many links to folders.
    """
    contents = Contents()
    n_links = 0
    waiting: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", (_identity(root.stat()),))]
    while waiting:
        below, above = waiting.pop()
        for entry in _entries(root / below):
            if entry.name.startswith("."):
                continue
            name = f"{below}{entry.name}"
            own = _folder(entry)
            if own is None:
                contents.add(name)
                continue
            n_links += entry.is_symlink()
            if n_links > MAX_LINKS:
                raise ValueError(
                    f"{root} has more than {MAX_LINKS:,} links to folders, by way of each other: "
                    "remove those that lead in circles"
                )
            if own not in above:
                waiting.append((f"{name}/", (*above, own)))
    for names in vars(contents).values():
        names.sort()
    return contents


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except PermissionError:
        logger.warning("%s is left out: it may not be read", folder)
        return []


def _folder(entry: os.DirEntry[str]) -> tuple[int, int] | None:
    """Return what identifies a folder; None for files and for links that lead nowhere."""
    try:
        return _identity(entry.stat()) if entry.is_dir() else None
    except OSError:
        return None


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
