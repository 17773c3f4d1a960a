"""Tables about the images of a folder.

They are JSON lines, CSV or Parquet, with the path of an image as ``file_name`` in each row.
"""

from __future__ import annotations

import csv
import logging
import posixpath
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from vision_plugin._untrusted import open_regular, parse_json, unreadable

logger = logging.getLogger(__name__)

FILE_NAME = "file_name"
"""Column with the path of the image, from the folder that the table is in."""
MAX_LINE_BYTES = 4 * 1024 * 1024
"""Tables with longer lines are refused."""
MAX_COLUMNS = 1000
"""Tables with more columns are refused."""


def read_metadata(root: Path, tables: Sequence[str], ids: Sequence[str]) -> dict[str, list[Any]]:
    """Return the columns of tables, in the order of the images; None where a row is missing.

    Rows without an image and images without a row are counted in a warning.

    Args:
        root: The folder with the images.
        tables: Relative paths of the tables.
        ids: Relative paths of the images.

    Raises:
        ValueError: a table cannot be read, or none of its rows is about one of the images.
    """
    folders = [posixpath.dirname(table) for table in tables]
    if len(set(folders)) < len(folders):
        raise ValueError(
            f"{root} has several metadata files in one folder, {', '.join(tables)}: leave one"
        )
    place = {id: number for number, id in enumerate(ids)}
    columns: dict[str, list[Any]] = {}
    described: set[int] = set()
    for folder, table in zip(folders, tables, strict=True):
        path = root / table
        n_rows, unused = 0, ""
        before = len(described)
        for where, row in _rows(path):
            n_rows += 1
            name = row.pop(FILE_NAME, None)
            if not isinstance(name, str):
                raise ValueError(_no_name(where, list(row), path))
            number = place.get(posixpath.normpath(posixpath.join(folder, name)))
            if number is None or number in described:
                unused = unused or name
                continue
            described.add(number)
            for column, value in row.items():
                if column not in columns:
                    _check_columns(where, len(columns) + 1)
                    columns[column] = [None] * len(ids)
                columns[column][number] = value
        n_used = len(described) - before
        if n_rows and not n_used:
            raise ValueError(
                f"none of the {n_rows:,} rows of {path} is about an image that is read: the first "
                f"has the {FILE_NAME} {unused!r}, and images are {ids[0]!r} and the like. Write "
                f"paths from {path.parent} on"
            )
        if n_used < n_rows:
            logger.warning(
                "%s: %d of %d rows are not used, the first is for %s: there is no such image, or "
                "an earlier row is about it",
                *(path, n_rows - n_used, n_rows, unused),
            )
    if tables and len(described) < len(ids):
        without = next(id for number, id in enumerate(ids) if number not in described)
        logger.warning(
            "%s: %d of %d images have no row in %s, the first is %s",
            *(root, len(ids) - len(described), len(ids), " and ".join(tables), without),
        )
    return columns


def _no_name(where: str, names: Sequence[Any], path: Path) -> str:
    have = ", ".join(str(name) for name in names[:20])[:200].replace("\0", "") or "nothing"
    return (
        f"{where} has no {FILE_NAME}, but {have}: name the column with the paths of the images, "
        f"from {path.parent} on, {FILE_NAME}"
    )


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a table, each with its name in errors."""
    read = {".jsonl": _json_rows, ".csv": _csv_rows, ".parquet": _parquet_rows}[path.suffix]
    return read(path)


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        where = f"the metadata file {path}, line {number}"
        row = parse_json(line, where)
        if not isinstance(row, dict):
            raise ValueError(
                f"{where} holds a {type(row).__name__}, not an object: write "
                f'{{"{FILE_NAME}": ...}} on each line'
            )
        yield where, row


def _csv_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader(_decoded(path))
    header: list[str] = []
    try:
        for cells in reader:
            if not cells:
                continue
            where = f"the metadata file {path}, line {reader.line_num}"
            if not header:
                header = cells
                _check_columns(where, len(header))
                if len(set(header)) < len(header):
                    raise ValueError(f"{where} names a column twice: rename one of them")
                if FILE_NAME not in header:
                    raise ValueError(_no_name(where, header, path))
                continue
            if len(cells) > len(header):
                raise ValueError(
                    f"{where} has {len(cells)} fields, and the header has {len(header)}: put "
                    "fields with commas in double quotes"
                )
            yield where, dict(zip(header, cells, strict=False))
    except csv.Error as error:
        raise ValueError(
            f"the metadata file {path}, line {reader.line_num} is not CSV ({error}): shorten the "
            "field, or close its quotes"
        ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    from vision_plugin.images._parquet import read_column, read_names

    names = read_names(path)
    _check_columns(f"the metadata file {path}", len(names))
    table = {name: read_column(path, name) for name in names}
    for number, cells in enumerate(zip(*table.values(), strict=True)):
        yield f"the metadata file {path}, row {number}", dict(zip(names, cells, strict=True))


def _decoded(path: Path) -> Iterator[str]:
    for number, line in enumerate(_lines(path), 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"the metadata file {path}, line {number} is not UTF-8 ({error}): convert it"
            ) from error


def _lines(path: Path) -> Iterator[bytes]:
    with open_regular(path) as stream:
        read = partial(stream.readline, MAX_LINE_BYTES + 1)
        try:
            for number, line in enumerate(iter(read, b""), 1):
                if len(line) > MAX_LINE_BYTES:
                    raise ValueError(
                        f"the metadata file {path}, line {number} has more than "
                        f"{MAX_LINE_BYTES:,} bytes: shorten it"
                    )
                yield line
        except OSError as error:
            raise unreadable(path, error) from error


def _check_columns(where: str, n_columns: int) -> None:
    if n_columns > MAX_COLUMNS:
        raise ValueError(
            f"{where} has column {n_columns:,}, above the limit of {MAX_COLUMNS:,}: leave out what "
            "is not needed"
        )
