"""Images in Hugging Face datasets: from the hub, a saved folder, in memory, or streamed."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from vision_plugin._untrusted import open_regular, read_json
from vision_plugin.images._collection import ImageCollection, find_image_column, no_column
from vision_plugin.images._image import Raw
from vision_plugin.images._parquet import class_name, raw_of_cell
from vision_plugin.images._splits import choose_split

logger = logging.getLogger(__name__)

MAX_STREAMED = 100_000_000
"""Largest number of images in a stream."""
_BYTES = ("binary", "large_binary", "binary_view")


class DatasetImages(ImageCollection):
    """Rows of a ``datasets.Dataset``; an image's id is its row number."""

    kind = "dataset"

    def __init__(
        self, dataset: datasets.Dataset, *, name: str, split: str | None, column: str | None
    ) -> None:
        self._name, self._split = name, split
        self.image_column = _image_column(dataset, column, name)
        if len(dataset) == 0:
            raise ValueError(f"{name} holds no rows")
        dataset = dataset.with_format(None)
        self.dataset = dataset
        self._cells = _undecoded(dataset.select_columns([self.image_column]), self.image_column)
        self.ids = [str(row) for row in range(len(dataset))]

    def raw(self, index: int) -> Raw:
        """Return the bytes in the row, or the file that it names."""
        return raw_of_cell(self._cells[index][self.image_column], self.ids[index])

    @property
    def column_names(self) -> list[str]:
        """Every column except the image column."""
        return [name for name in self.dataset.column_names if name != self.image_column]

    def column(self, name: str) -> list[Any]:
        """Return a whole column, with the names of classes in place of their numbers."""
        if name not in self.column_names:
            raise ValueError(no_column(name, self.column_names, self._name))
        values = list(self.dataset.select_columns([name])[name])
        names = _class_names(self.dataset, name)
        return values if names is None else [class_name(value, names) for value in values]

    @property
    def details(self) -> dict[str, Any]:
        """Name, split and column."""
        return {"path": self._name, "split": self._split, "column": self.image_column}


class StreamedImages(ImageCollection):
    """The first rows of a ``datasets.IterableDataset``, read in order and never stored.

    Reading ahead skips rows, and reading back starts the stream again: both are slow.
    """

    kind = "stream"
    sequential = True

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        *,
        name: str,
        split: str | None,
        column: str | None,
        n_images: int | None,
    ) -> None:
        self._name, self._split = name, split
        if dataset.features is None:
            # As `map` leaves a stream: its first row is all that says what it has.
            first = next(iter(dataset), None)
            if first is None:
                raise ValueError(f"{name} holds no rows")
            columns = list(first)
            images = [key for key, value in first.items() if _holds_image(value)]
            self.image_column = find_image_column(images, columns, column, name)
        else:
            columns = list(dataset.features)
            self.image_column = _image_column(dataset, column, name)
        known = _announced_length(dataset, split)
        if n_images is None and known is None:
            raise ValueError(
                f"{name} is streamed and does not say how many rows it has: give n_images="
            )
        n_rows = min(n for n in (n_images, known) if n is not None)
        if n_rows > MAX_STREAMED:
            raise ValueError(
                f"{name} is said to have {n_rows:,} rows, above the limit of {MAX_STREAMED:,} for "
                "a stream: take fewer with n_images="
            )
        self.ids = [str(row) for row in range(n_rows)]
        self.dataset = _undecoded(dataset, self.image_column)
        self._names = {n: _class_names(dataset, n) for n in columns}
        self._rows: Iterator[dict[str, Any]] | None = None
        self._next = self._began = 0
        self._row: dict[str, Any] = {}

    def raw(self, index: int) -> Raw:
        """Return the bytes in the row."""
        return raw_of_cell(self._read(index)[self.image_column], self.ids[index])

    def _read(self, index: int) -> dict[str, Any]:
        if index == self._next - 1:
            return self._row
        if self._rows is None or index < self._next:
            self._rows, self._next, self._began = iter(self.dataset.skip(index)), index, index
        while self._next <= index:
            row = next(self._rows, None)
            if row is None:
                # Rows that were skipped need not have been there.
                n = self._next if self._next > self._began else sum(1 for _ in self.dataset)
                raise ValueError(
                    f"the stream {self._name} ends after {n} of the {len(self)} rows that were "
                    f"expected: use n_images={n}, which keeps the shards of an extraction"
                )
            self._row, self._next = row, self._next + 1
        return self._row

    @property
    def column_names(self) -> list[str]:
        """Every column except the image column."""
        return [name for name in self._names if name != self.image_column]

    def column(self, name: str) -> list[Any]:
        """Return a column by reading the whole stream."""
        if name not in self.column_names:
            raise ValueError(no_column(name, self.column_names, self._name))
        values = [row[name] for row in self.dataset.select_columns([name]).take(len(self))]
        names = self._names[name]
        return values if names is None else [class_name(value, names) for value in values]

    def value(self, name: str, index: int) -> Any:
        """Return one value; the row that was read last costs nothing."""
        names = self._names[name]
        value = self._read(index)[name]
        return value if names is None else class_name(value, names)

    @property
    def details(self) -> dict[str, Any]:
        """Name, split and column."""
        return {"path": self._name, "split": self._split, "column": self.image_column}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rows": None, "_next": 0, "_row": {}}


def load_named(name: str, split: str | None, *, streaming: bool) -> tuple[Any, str | None]:
    """Load a dataset by name from the hub or its cache.

    Returns:
        The dataset, and the split that was loaded.

    Raises:
        FileNotFoundError: nothing is found under that name.
        ValueError: the split does not exist, or must be named.
    """
    try:
        loaded = datasets.load_dataset(name, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError) as error:
        if split is not None and re.search(r"split", str(error), re.IGNORECASE):
            raise ValueError(f"{name}: {_first_line(error)}") from error
        raise FileNotFoundError(
            f"{name!r} is neither a file or folder here nor a dataset that the hub provides "
            f"({_first_line(error)})"
        ) from error
    return pick_split(loaded, name, split) if isinstance(loaded, dict) else (loaded, split)


def load_saved(folder: Path, split: str | None) -> tuple[Any, str | None]:
    """Load a dataset that ``save_to_disk`` wrote.

    Raises:
        ValueError: the folder cannot be read, or the split must be named.
    """
    try:
        _check_saved(folder)
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # descriptions of any form make the library raise nearly anything
        raise ValueError(
            f"{folder} looks like a saved dataset but cannot be read ({_first_line(error)}): save "
            "it again, or fetch it again"
        ) from error
    return pick_split(loaded, str(folder), split)


def is_saved(folder: Path) -> bool:
    """Return whether ``save_to_disk`` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def pick_split(loaded: Any, name: str, split: str | None) -> tuple[Any, str | None]:
    """Return a data set's split asked for, by default its only one, and that split's name.

    Raises:
        ValueError: there is no such split, or it must be named.
    """
    if isinstance(loaded, dict):
        chosen = choose_split([str(one) for one in loaded], split, name)
        if chosen is None:
            raise ValueError(f"{name} holds no splits, and so no images")
        return loaded[chosen], chosen
    own = None if loaded.split is None else str(loaded.split)
    return loaded, choose_split([] if own is None else [own], split, name)


def _check_saved(folder: Path) -> None:
    """Raise unless the files that describe a saved data set, and those they name, are files."""
    for name in ("dataset_dict.json", "state.json", "dataset_info.json"):
        if not (folder / name).exists():
            continue
        about = read_json(folder / name)
        if not isinstance(about, dict):
            raise ValueError(f"{name} holds a {type(about).__name__}, not an object")
        for part in about.get("splits", ()) if name == "dataset_dict.json" else ():
            _check_saved(folder / _plain_name(part))
        for file in about.get("_data_files", ()) if name == "state.json" else ():
            open_regular(folder / _plain_name(file["filename"])).close()


def _plain_name(name: Any) -> str:
    if not isinstance(name, str) or name in ("", "..") or Path(name).name != name:
        raise ValueError(f"it names {name!r}, which is no file or folder in it")
    return name


def _image_column(dataset: Any, wanted: str | None, where: str) -> str:
    features = dataset.features or {}
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    encoded = [name for name, kind in features.items() if getattr(kind, "dtype", "") in _BYTES]
    return find_image_column(images or encoded, list(features), wanted, where)


def _holds_image(value: Any) -> bool:
    is_encoded = isinstance(value, dict) and value.keys() == {"bytes", "path"}
    return is_encoded or isinstance(value, (bytes, Image.Image))


def _undecoded(dataset: Any, column: str) -> Any:
    """Return the dataset with encoded images, so that a broken image fails where we count it."""
    if isinstance((dataset.features or {}).get(column), datasets.Image):
        return dataset.cast_column(column, datasets.Image(decode=False))
    return dataset


def _class_names(dataset: Any, name: str) -> list[str] | None:
    kind = (dataset.features or {}).get(name)
    return list(kind.names) if isinstance(kind, datasets.ClassLabel) else None


def _announced_length(dataset: Any, split: str | None) -> int | None:
    splits = dataset.info.splits or {}
    found = splits.get(split) if split in splits else None
    return None if found is None else int(found.num_examples) or None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
