"""Images in a folder, labelled by sub-folder or described by a metadata file."""

from __future__ import annotations

import csv
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

from vision_plugin.images._collection import ImageCollection, no_column
from vision_plugin.images._image import SUFFIXES

FOLDER_LABEL = "folder"
"""Column that names the folder of each image."""


class FolderImages(ImageCollection):
    """Every image below a folder, sorted by relative path; the path is also the image's id.

    ``metadata.jsonl`` or ``metadata.csv`` at the top, with a ``file_name`` in each record, gives
    columns. Where every image lies in a sub-folder, that folder's name is its label.
    """

    kind = "folder"

    def __init__(self, root: Path, *, labelled: bool = False) -> None:
        self.root = root
        self.ids = sorted(_image_files(root))
        if not self.ids:
            raise ValueError(
                f"{root} holds no images: neither it nor its sub-folders have files that end in "
                f"{', '.join(sorted(SUFFIXES))}"
            )
        self._parents = [Path(id).parent.name for id in self.ids]
        if labelled and not all(self._parents):
            loose = self.ids[self._parents.index("")]
            raise ValueError(
                f"{root} is not an imagefolder: {loose} lies outside any label's sub-folder. Move "
                "it, or leave out 'imagefolder:'"
            )

    def raw(self, index: int) -> Path:
        """Return the path of the file."""
        return self.root / self.ids[index]

    @property
    def column_names(self) -> list[str]:
        """Columns of the metadata file, and the folder."""
        return [*self._metadata, FOLDER_LABEL]

    def column(self, name: str) -> list[Any]:
        """Return values in the order of the ids; None where the metadata leaves an image out."""
        if name in self._metadata:
            return self._metadata[name]
        if name == FOLDER_LABEL:
            return list(self._parents)
        raise ValueError(no_column(name, self.column_names, str(self.root)))

    @property
    def default_label(self) -> str | None:
        """A label column of the metadata, else the sub-folder."""
        return super().default_label or (FOLDER_LABEL if all(self._parents) else None)

    @property
    def details(self) -> dict[str, Any]:
        """The path as it was given."""
        return {"path": str(self.root)}

    @cached_property
    def _metadata(self) -> dict[str, list[Any]]:
        records = {str(r.get("file_name")): r for r in _metadata_records(self.root)}
        names = dict.fromkeys(name for record in records.values() for name in record)
        return {
            name: [records.get(id, {}).get(name) for id in self.ids]
            for name in names
            if name != "file_name"
        }


def _image_files(root: Path) -> list[str]:
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = Path(folder).relative_to(root)
        found += [
            (below / name).as_posix()
            for name in files
            if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
        ]
    return found


def _metadata_records(root: Path) -> list[dict[str, Any]]:
    lines, table = root / "metadata.jsonl", root / "metadata.csv"
    try:
        if lines.is_file():
            text = lines.read_text(encoding="utf-8")
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        if table.is_file():
            with table.open(newline="", encoding="utf-8") as stream:
                return list(csv.DictReader(stream))
    except ValueError as error:
        raise ValueError(f"the metadata file in {root} cannot be read: {error}") from error
    return []
