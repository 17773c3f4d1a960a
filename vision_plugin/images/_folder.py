"""Images in a folder, labelled by sub-folder or described by a metadata file."""

from __future__ import annotations

import logging
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from vision_plugin.images._collection import ImageCollection, no_column
from vision_plugin.images._image import SUFFIXES, UNREAD_SUFFIXES
from vision_plugin.images._metadata import read_metadata
from vision_plugin.images._splits import choose_split, split_depth
from vision_plugin.images._survey import Contents, survey

logger = logging.getLogger(__name__)

FOLDER_LABEL = "folder"
"""Column that names the folder of each image."""


class FolderImages(ImageCollection):
    """Every image below a folder, sorted by relative path; the path is also the image's id.

    ``metadata.jsonl``, ``metadata.csv`` or ``metadata.parquet``, with a ``file_name`` in each
    record, gives columns of the images in its folder and below. Where every image lies in a
    sub-folder, that folder's name is its label.
    """

    kind = "folder"

    def __init__(
        self,
        root: Path,
        *,
        contents: Contents | None = None,
        split: str | None = None,
        labelled: bool = False,
    ) -> None:
        """Find the images.

        Args:
            root: The folder.
            contents: What is in it, where that is known.
            split: Split of the images, which is a sub-folder.
            labelled: Whether every image has to be in a sub-folder.

        Raises:
            ValueError: there are no images, no such split, or several splits and none is asked for.
        """
        contents = contents or survey(root)
        if not contents.images:
            raise ValueError(
                f"{root} holds no images: neither it nor its sub-folders have files that end in "
                f"{', '.join(sorted(SUFFIXES))}"
            )
        _say_what_is_not_read(root, [*contents.parquet, *contents.tars, *contents.others])
        self.root, self._split, self.ids, tables = _of_split(root, contents, split)
        parents = {PurePosixPath(id).parent for id in self.ids}
        above = {str(folder) for parent in parents for folder in (parent, *parent.parents)}
        self._tables = [table for table in tables if str(PurePosixPath(table).parent) in above]
        self._parents = [PurePosixPath(id).parent.name for id in self.ids]
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
        return list(dict.fromkeys([*self._metadata, FOLDER_LABEL]))

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
        """The folder, and the split where it is only a part of it."""
        return {"path": str(self.root), "split": self._split}

    @cached_property
    def _metadata(self) -> dict[str, list[Any]]:
        return read_metadata(self.root, self._tables, self.ids)


def _say_what_is_not_read(root: Path, names: list[str]) -> None:
    unread: list[str] = []
    others: list[str] = []
    for name in names:
        is_unread = PurePosixPath(name).suffix.lower() in UNREAD_SUFFIXES
        (unread if is_unread else others).append(name)
    if unread:
        kinds = ", ".join(sorted({PurePosixPath(name).suffix.lower() for name in unread}))
        message = "%s: %d images are not read, as %s: convert those that end in " + kinds
        logger.warning(message, root, len(unread), unread[0])
    if others:
        logger.info("%s: %d other files are not read, as %s", root, len(others), others[0])


def _of_split(
    root: Path, contents: Contents, split: str | None
) -> tuple[Path, str | None, list[str], list[str]]:
    """Return the folder of a split, its name where it is not a folder's, its images and tables."""
    images, tables = contents.images, contents.metadata
    found = split_depth(images)
    if found is None and split is None:
        return root, None, images, tables
    depth = found or 0
    folders = [_folder_at(id, depth) for id in images]
    names = sorted({folder for folder in folders if folder is not None})
    if found is None and names and split not in names:
        raise ValueError(
            f"{root} has no split {split!r}, but the folders {', '.join(names)}: leave out split=, "
            "or name one of them"
        )
    chosen = choose_split(names, split, str(root))
    loose = folders.count(None)
    if loose:
        example = images[folders.index(None)]
        logger.warning("%s: %d images of no split are left out, as %s", root, loose, example)
    ids = [id for id, folder in zip(images, folders, strict=True) if folder == chosen]
    if depth or any("/" not in table for table in tables):
        return root, chosen, ids, tables
    start = f"{chosen}/"
    below = [table.removeprefix(start) for table in tables if table.startswith(start)]
    return root / str(chosen), None, [id.removeprefix(start) for id in ids], below


def _folder_at(id: str, depth: int) -> str | None:
    folders = id.split("/")[:-1]
    return folders[depth] if depth < len(folders) else None
