"""Images in Parquet files, read a row group at a time."""

from __future__ import annotations

import bisect
import os
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vision_plugin._untrusted import open_regular, parse_json
from vision_plugin.images._collection import ImageCollection, find_image_column, no_column
from vision_plugin.images._image import BadImageError, Raw
from vision_plugin.images._pages import expanded_bytes

CACHE_BYTES = 128 * 1024 * 1024
"""Row groups read before stay in memory up to this size in bytes; at least one stays."""
MAX_EXPANSION = 20
"""A column may expand to so many times its compressed size: encoded images hardly compress."""
EXPANSION_FLOOR_BYTES = 256 * 1024 * 1024
"""A column that expands to no more than this is read in any case."""
ROWS_FLOOR = 1_000_000
"""A file that claims more rows than this, and more than it has bytes, is refused."""
_READ_BYTES = 1024 * 1024


class ParquetImages(ImageCollection):
    """Rows of one or several Parquet files with a column of encoded images.

    An image's id is its row number, counted through the files in order.
    """

    kind = "parquet"

    def __init__(
        self,
        files: Sequence[Path],
        *,
        where: str,
        column: str | None = None,
        split: str | None = None,
    ) -> None:
        self._where, self._split = where, split
        self.files = list(files)
        schema = None
        self._groups: list[tuple[int, int]] = []
        sizes: list[int] = []
        for number, file in enumerate(self.files):
            reader = _open(file)
            own = reader.schema_arrow
            classes = _class_names(own, file)
            if schema is None:
                schema, self._class_names = own, classes
            if own.names != schema.names or classes != self._class_names:
                what = "columns" if own.names != schema.names else "class names"
                raise ValueError(f"{file} has other {what} than {self.files[0]}: open it by itself")
            for group in range(reader.num_row_groups):
                self._groups.append((number, group))
                sizes.append(reader.metadata.row_group(group).num_rows)
        assert schema is not None
        images = [field.name for field in schema if is_image(field.type)]
        self.image_column = find_image_column(images, schema.names, column, where)
        self._starts = [0, *accumulate(sizes)]
        if self._starts[-1] == 0:
            raise ValueError(f"{where} holds no rows")
        self.ids = [str(row) for row in range(self._starts[-1])]
        self._columns = [name for name in schema.names if name != self.image_column]
        self._cache: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._broken: dict[int, str] = {}
        self._in_order = True
        self._process = os.getpid()
        self._readers: dict[int, pq.ParquetFile] = {}

    def raw(self, index: int) -> Raw:
        """Return the bytes in the row, or the file that it names."""
        group = bisect.bisect_right(self._starts, index) - 1
        if group in self._broken:
            raise BadImageError(self.ids[index], self._broken[group])
        try:
            value = self._row_group(group)[index - self._starts[group]].as_py()
        except (pa.ArrowException, OSError, ValueError) as error:
            file, number = self._groups[group]
            where = f"row group {number} of {self.files[file]}"
            self._broken[group] = f"{where} cannot be read: {_in_a_line(error)}"
            raise BadImageError(self.ids[index], self._broken[group]) from error
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
            values += read_column(file, name)
        names = self._class_names.get(name)
        return values if names is None else [class_name(value, names) for value in values]

    @property
    def details(self) -> dict[str, Any]:
        """Path, split, and the column that was read."""
        return {"path": self._where, "split": self._split, "column": self.image_column}

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
            self._readers = {file: _open(self.files[file], self.image_column)}
        check_expansion(self.files[file], self._readers[file], self.image_column, [number])
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
    """Return the bytes, the file or the image in a cell of an image column.

    Raises:
        BadImageError: the cell is empty or of another type.
    """
    if isinstance(value, dict):
        encoded = value.get("bytes")
        if isinstance(encoded, (bytes, bytearray, memoryview)):
            return bytes(encoded)
        if encoded is not None:  # bytes() of a number would be so many zeros
            raise BadImageError(id, f"its bytes are of type {type(encoded).__name__}")
        value = value.get("path")
    if isinstance(value, (bytes, Image.Image)):
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


def holds_images(file: Path, column: str | None = None) -> bool:
    """Return whether a Parquet file has a column that can hold images, or the one asked for.

    Raises:
        ValueError: it cannot be read as Parquet.
    """
    schema = _open(file).schema_arrow
    return column in schema.names or any(is_image(field.type) for field in schema)


def is_image(kind: pa.DataType) -> bool:
    """Return whether a type can hold encoded images, themselves or in a dictionary."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        return {"bytes", "path"} == {kind.field(i).name for i in range(kind.num_fields)}
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def check_expansion(file: Path, reader: pq.ParquetFile, name: str, groups: Sequence[int]) -> None:
    """Raise a ``ValueError`` if a column is far larger than what the file holds of it."""
    stored = expanded = 0
    leaves = _leaves(reader, name)
    with open_regular(file) as stream:
        for group in groups:
            about = reader.metadata.row_group(group)
            for place in leaves:
                column = about.column(place)
                first, size = column.data_page_offset, column.total_compressed_size
                if column.has_dictionary_page:
                    first = min(first, column.dictionary_page_offset)
                stored += size
                expanded += max(
                    column.total_uncompressed_size, expanded_bytes(stream.fileno(), first, size)
                )
    if expanded > max(EXPANSION_FLOOR_BYTES, MAX_EXPANSION * stored):
        raise ValueError(
            f"{stored:,} bytes of its column {name!r} expand to {expanded:,}, above the limits of "
            f"{EXPANSION_FLOOR_BYTES:,} bytes and {MAX_EXPANSION} times the size: write it again "
            "with smaller row groups, or without what is not needed"
        )


def _open(file: Path, column: str | None = None) -> pq.ParquetFile:
    """Open a file; repeated texts or bytes of ``column`` are then held once, as they are stored."""
    with open_regular(file) as stream:
        size = os.fstat(stream.fileno()).st_size
    try:
        # Not mapped: the pages that were read would count as this process's memory.
        reader = pq.ParquetFile(file, buffer_size=_READ_BYTES)
        n_rows = reader.metadata.num_rows
        groups = range(reader.num_row_groups)
        rows = [reader.metadata.row_group(group).num_rows for group in groups]
        repeated = [
            reader.schema.column(place).path
            for place in (_leaves(reader, column) if column is not None else ())
            if reader.schema.column(place).physical_type == "BYTE_ARRAY"
        ]
        if repeated:
            reader = pq.ParquetFile(
                file,
                metadata=reader.metadata,
                buffer_size=_READ_BYTES,
                read_dictionary=repeated,
            )
        reader.schema_arrow  # noqa: B018  # it is read on first use, and may be damaged
    except (pa.ArrowException, OSError, ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} cannot be read as Parquet: {_in_a_line(error)}") from error
    if min(rows, default=0) < 0 or sum(rows) != n_rows or n_rows > max(ROWS_FLOOR, size):
        raise ValueError(
            f"{file} has {size:,} bytes and claims {n_rows:,} rows, {sum(rows):,} in its row "
            "groups: fetch or write it again"
        )
    return reader


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def _leaves(reader: pq.ParquetFile, name: str) -> list[int]:
    """Return the places of the stored columns that make up a column of the table."""
    paths = [reader.schema.column(place).path for place in range(len(reader.schema))]
    return [i for i, path in enumerate(paths) if path == name or path.startswith(f"{name}.")]


def read_names(file: Path) -> list[str]:
    """Return the names of a file's columns.

    Raises:
        ValueError: it cannot be read as Parquet.
    """
    return list(_open(file).schema_arrow.names)


def read_column(file: Path, name: str) -> list[Any]:
    """Return a column of a file; equal texts are one object.

    Raises:
        ValueError: it cannot be read, or expands too much.
    """
    reader = _open(file, name)
    try:
        check_expansion(file, reader, name, range(reader.num_row_groups))
        chunks = reader.read(columns=[name]).column(name).chunks
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read: {_in_a_line(error)}") from error
    found: list[Any] = []
    for chunk in chunks:
        if not pa.types.is_dictionary(chunk.type):
            found += chunk.to_pylist()
            continue
        words = chunk.dictionary.to_pylist()
        found += [None if i is None else words[i] for i in chunk.indices.to_pylist()]
    return found


def _class_names(schema: pa.Schema, file: Path) -> dict[str, list[str]]:
    """Return the class names of each ClassLabel column, from the metadata that datasets writes."""
    stored = (schema.metadata or {}).get(b"huggingface")
    if stored is None:
        return {}
    where = f"the Hugging Face metadata in {file}"
    features: Any = parse_json(stored, where)
    for step in ("info", "features"):
        features = (features.get(step) or {}) if isinstance(features, dict) else None
    described = features if isinstance(features, dict) else {}
    found: dict[str, Any] = {
        name: feature.get("names")
        for name, feature in described.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
    }
    if described is not features or not all(map(_are_texts, found.values())):
        raise ValueError(
            f"{where} does not say what its columns are: write the file again with datasets, or "
            "drop it with pyarrow's table.replace_schema_metadata(None)"
        )
    return found


def _are_texts(names: Any) -> bool:
    return isinstance(names, list) and all(isinstance(name, str) for name in names)
