"""Images in Parquet files, read a row group at a time."""

from __future__ import annotations

import bisect
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vision_plugin.images._collection import ImageCollection, find_image_column, no_column
from vision_plugin.images._image import BadImageError, Raw

CACHE_BYTES = 128 * 1024 * 1024
"""Row groups read before stay in memory up to this size in bytes; at least one stays."""
_READ_BYTES = 1024 * 1024


class ParquetImages(ImageCollection):
    """Rows of one or several Parquet files with a column of encoded images.

    An image's id is its row number, counted through the files in order.
    """

    kind = "parquet"

    def __init__(self, files: Sequence[Path], *, where: str, column: str | None = None) -> None:
        self._where = where
        self.files = [Path(file) for file in files]
        readers = [_open(file) for file in self.files]
        schema = readers[0].schema_arrow
        for file, reader in zip(self.files, readers, strict=True):
            if reader.schema_arrow.names != schema.names:
                raise ValueError(f"{file} has other columns than {self.files[0]}")
        images = [field.name for field in schema if _is_image(field)]
        self.image_column = find_image_column(images, schema.names, column, where)
        self._class_names = _class_names(schema)
        self._groups = [
            (file, group)
            for file, reader in enumerate(readers)
            for group in range(reader.num_row_groups)
        ]
        sizes = [readers[file].metadata.row_group(group).num_rows for file, group in self._groups]
        self._starts = [0, *accumulate(sizes)]
        if self._starts[-1] == 0:
            raise ValueError(f"{where} holds no rows")
        self.ids = [str(row) for row in range(self._starts[-1])]
        self._columns = [name for name in schema.names if name != self.image_column]
        self._cache: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._in_order = True
        self._process = os.getpid()
        self._readers: dict[int, pq.ParquetFile] = {}

    def raw(self, index: int) -> Raw:
        """Return the bytes in the row, or the file that it names."""
        group = bisect.bisect_right(self._starts, index) - 1
        value = self._row_group(group)[index - self._starts[group]].as_py()
        return raw_of_cell(value, self.ids[index], self.files[self._groups[group][0]].parent)

    @property
    def column_names(self) -> list[str]:
        """Every column except the image column."""
        return self._columns

    def column(self, name: str) -> list[Any]:
        """Return a whole column, with the names of classes in place of their numbers."""
        if name not in self._columns:
            raise ValueError(no_column(name, self._columns, self._where))
        values: list[Any] = []
        for file in self.files:
            values += pq.read_table(file, columns=[name]).column(name).to_pylist()
        names = self._class_names.get(name)
        return values if names is None else [class_name(value, names) for value in values]

    @property
    def details(self) -> dict[str, Any]:
        """Path, and the column that was read."""
        return {"path": self._where, "column": self.image_column}

    def _row_group(self, group: int) -> pa.ChunkedArray:
        if self._process != os.getpid():
            # A file handle that crosses a fork shares its position with the parent's handle.
            self._process, self._readers = os.getpid(), {}
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        if self._cache and group < next(reversed(self._cache)):
            self._in_order = False
        if self._in_order:
            self._cache.clear()  # a first pass from front to back needs no group twice
        file, number = self._groups[group]
        if file not in self._readers:
            self._readers = {file: _open(self.files[file])}
        table = self._readers[file].read_row_group(
            number, columns=[self.image_column], use_threads=False
        )
        self._cache[group] = table.column(self.image_column)
        while len(self._cache) > 1 and self._cached_bytes > CACHE_BYTES:
            self._cache.popitem(last=False)
        return self._cache[group]

    @property
    def _cached_bytes(self) -> int:
        return sum(int(values.nbytes) for values in self._cache.values())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict(), "_readers": {}, "_process": -1}


def raw_of_cell(value: Any, id: str, folder: Path | None = None) -> Raw:
    """Return the bytes or the file in a cell of an image column.

    Raises:
        BadImageError: the cell is empty or of another type.
    """
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return bytes(value["bytes"])
        value = value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and value:
        path = Path(value)
        return path if path.is_absolute() or folder is None else folder / path
    raise BadImageError(id, f"the cell holds {type(value).__name__}, not an image")


def class_name(value: Any, names: Sequence[str]) -> Any:
    """Return the name of a class number; None and -1 stand for no label."""
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    return names[value] if 0 <= value < len(names) else None


def _open(file: Path) -> pq.ParquetFile:
    try:
        # Not mapped: the pages that were read would count as this process's memory.
        return pq.ParquetFile(file, buffer_size=_READ_BYTES)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read as Parquet: {error}") from error


def _is_image(field: pa.Field) -> bool:
    kind = field.type
    if pa.types.is_struct(kind):
        return {"bytes", "path"} == {kind.field(i).name for i in range(kind.num_fields)}
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the class names of each ClassLabel column, from the metadata that datasets writes."""
    try:
        stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = stored.get("info", {}).get("features", {})
    except (ValueError, AttributeError):
        return {}
    return {
        name: list(feature["names"])
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }
