"""The base of every kind of image collection, and the columns beside the images."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from vision_plugin.images._image import Raw

LABEL_COLUMNS = ("label", "labels")
"""Columns that hold the labels where no other is named."""


class ImageCollection(ABC):
    """Images that can be read by number, with their ids and columns.

    Subclasses open files only when they are first asked for an image, and again in every process
    that they are sent to.
    """

    kind: str
    """Kind of collection, as records name it: ``folder``, ``parquet``, ..."""
    ids: Sequence[str]
    """A name per image that stays the same from run to run."""
    sequential = False
    """Whether reading backwards, or far ahead, is slow."""

    def __len__(self) -> int:
        return len(self.ids)

    @abstractmethod
    def raw(self, index: int) -> Raw:
        """Return image ``index`` as bytes, a file or an image in memory."""

    @property
    def column_names(self) -> list[str]:
        """Columns beside the image."""
        return []

    def column(self, name: str) -> list[Any]:
        """Return all values of a column.

        Raises:
            ValueError: there is no such column.
        """
        raise ValueError(no_column(name, self.column_names, self.where))

    def value(self, name: str, index: int) -> Any:
        """Return one value of a column."""
        return self.column(name)[index]

    @property
    def default_label(self) -> str | None:
        """The column that holds the labels, where the collection has one."""
        return next((name for name in LABEL_COLUMNS if name in self.column_names), None)

    @property
    def where(self) -> str:
        """Name of the collection in errors."""
        return str(self.details.get("path", self.kind))

    @property
    def details(self) -> dict[str, Any]:
        """JSON values that identify the collection in a manifest."""
        return {}


def label_text(value: Any) -> str:
    """Return a label as text, which is empty for an image without a label.

    Tables say so with nothing, blank text, NaN or the class number -1.

    Args:
        value: A cell of a table.

    Examples:
        >>> vp.images.label_text("star"), vp.images.label_text(float("nan"))
        ('star', '')
    """
    if value is None or value != value or (isinstance(value, float) and value == -1):
        return ""
    text = str(value)
    return "" if text.strip() in ("", "-1") else text


def no_column(name: str, columns: Sequence[str], where: str) -> str:
    """Return the message for a column that does not exist."""
    have = f"it has {listed(columns)}" if columns else "it has none beside the image"
    return f"{where} has no column {name!r}: {have}"


def listed(names: Sequence[str], most: int = 20) -> str:
    """Return names with commas between them, the first few of very many."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most:,} more"


def hash_ids(ids: Sequence[str]) -> str:
    """Return the SHA-256 of the ids in order, in hexadecimal.

    Args:
        ids: Ids of images.

    Examples:
        >>> vp.images.hash_ids(["a.png", "b.png"])[:12]
        'ba6495104e93'
    """
    digest = hashlib.sha256()
    for id in ids:
        digest.update(id.encode("utf-8", "surrogateescape"))
        digest.update(b"\0")
    return digest.hexdigest()


def find_image_column(
    images: Sequence[str], columns: Sequence[str], wanted: str | None, where: str
) -> str:
    """Return the name of the column that holds the images.

    Args:
        images: Columns that hold images.
        columns: All columns.
        wanted: The column asked for, or None.
        where: Name of the collection in errors.

    Raises:
        ValueError: the column asked for does not exist, or none or several hold images.
    """
    if wanted is not None:
        if wanted not in columns:
            raise ValueError(no_column(wanted, columns, where))
        return wanted
    if len(images) == 1:
        return images[0]
    if not images:
        raise ValueError(
            f"{where} has no column with images among {listed(columns) or 'none'}: name the one "
            "to use with column= (image_column= in a configuration)"
        )
    raise ValueError(
        f"{where} has several columns with images, {listed(images)}: name the one to use "
        "with column= (image_column= in a configuration)"
    )
