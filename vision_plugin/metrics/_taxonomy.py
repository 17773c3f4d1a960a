"""Taxonomies: one path per image, from the broadest group to the narrowest."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from vision_plugin._paths import local_path
from vision_plugin._untrusted import read_json, read_regular

__all__ = ["TaxonomyPaths", "read_taxonomy", "taxonomy_from_columns"]

T = TypeVar("T")
TaxonomyPaths = Sequence[Sequence[str]]
"""A path per image, the broadest step first; lengths may differ.

Examples:
    >>> paths: vp.metrics.TaxonomyPaths = [("bird", "owl"), ("fish",)]
    >>> taxonomy = vp.metrics.hierarchy(torch.tensor([[0, 1]]), paths)
    >>> taxonomy.depth.tolist()
    [0.0]
"""

MAX_BYTES = 2**28
"""Larger files are refused."""
MAX_VALUES = 10_000_000
"""JSON with more groups and names is refused."""


def taxonomy_from_columns(
    table: Mapping[str, Sequence[object]], columns: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """Join columns of a table into one path per row, such as ``["group", "subgroup", "name"]``.

    A row's path ends at its first empty or missing entry.

    Args:
        table: entries by column.
        columns: levels, broadest first.

    Raises:
        ValueError: a column is missing, or the columns differ in length.

    Examples:
        >>> table = {"group": ["bird", "fish"], "name": ["owl", ""]}
        >>> vp.metrics.taxonomy_from_columns(table, ["group", "name"])
        (('bird', 'owl'), ('fish',))
    """
    missing = [column for column in columns if column not in table]
    if missing or not columns:
        raise ValueError(f"taxonomy columns {missing or '(none)'} are not among {sorted(table)}")
    lengths = {column: len(table[column]) for column in columns}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"taxonomy columns differ in length: {lengths}")
    return tuple(_path(row) for row in zip(*(table[name] for name in columns), strict=True))


def read_taxonomy(
    path: str | Path,
    *,
    columns: Sequence[str] | None = None,
    image_ids: Sequence[str] | None = None,
) -> tuple[tuple[str, ...], ...]:
    """Read a taxonomy from a JSON or CSV file.

    JSON holds a list with one path per image, or an object from image id to path. CSV has a header
    and one image per line; ``columns`` names the levels, by default all but the first, which is the
    image id.

    Args:
        path: file to read, ``.json`` or ``.csv``.
        columns: levels of a CSV file, broadest first.
        image_ids: ids of the images to look up, in order; required for a JSON object. For a CSV
            file they select lines by their first column.

    Raises:
        ValueError: the file is neither JSON nor CSV, too large, or lacks an image or a column.

    Examples:
        >>> import json
        >>> from pathlib import Path
        >>> _ = Path("paths.json").write_text(
        ...     json.dumps({"a.png": ["bird", "owl"], "b.png": ["fish"]})
        ... )
        >>> vp.metrics.read_taxonomy("paths.json", image_ids=["b.png", "a.png"])
        (('fish',), ('bird', 'owl'))
    """
    path = local_path(path)
    if path.suffix == ".json":
        return _from_json(path, image_ids)
    if path.suffix == ".csv":
        return _from_csv(path, columns, image_ids)
    raise ValueError(f"{path} is neither .json nor .csv")


def prefix_numbers(paths: TaxonomyPaths) -> Tensor:
    """Number the nodes of each level: ``[n_images, depth]``, -1 below the end of a path.

    Two images share a number at level ``l`` exactly when the first ``l + 1`` steps of their paths
    are the same.
    """
    if isinstance(paths, str) or any(isinstance(path, str) for path in paths):
        raise ValueError(
            "each image needs a path, such as ('animal', 'dog', 'beagle'), but one of them is a "
            "bare string"
        )
    depth = max((len(path) for path in paths), default=0)
    numbers = np.full((len(paths), depth), -1, dtype=np.int64)
    nodes: dict[tuple[str, ...], int] = {}
    for image, path in enumerate(paths):
        steps = tuple(path)
        for level in range(len(steps)):
            numbers[image, level] = nodes.setdefault(steps[: level + 1], len(nodes))
    return torch.from_numpy(numbers)


def _path(entries: Sequence[object]) -> tuple[str, ...]:
    steps = []
    for entry in entries:
        if entry is None or entry == "":
            break
        steps.append(str(entry))
    return tuple(steps)


def _from_json(path: Path, image_ids: Sequence[str] | None) -> tuple[tuple[str, ...], ...]:
    content = read_json(path, limit=MAX_BYTES, max_values=MAX_VALUES)
    if isinstance(content, dict):
        if image_ids is None:
            raise ValueError(f"{path} maps image ids to paths; pass image_ids= to order them")
        content = _look_up(content, image_ids, path)
    if not isinstance(content, list) or not all(isinstance(entry, list) for entry in content):
        raise ValueError(f"{path} must hold a list of paths, or an object from image id to path")
    if image_ids is not None and len(content) != len(image_ids):
        raise ValueError(
            f"{path} lists {len(content):,} paths, but there are {len(image_ids):,} images: write "
            "one path for each image, or an object from image id to path"
        )
    return tuple(_path(entry) for entry in content)


def _from_csv(
    path: Path, columns: Sequence[str] | None, image_ids: Sequence[str] | None
) -> tuple[tuple[str, ...], ...]:
    try:
        text = read_regular(path, MAX_BYTES).decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""))
        names = list(reader.fieldnames or [])
        lines = list(reader)
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not CSV in UTF-8 ({error}): write it again") from error
    if not names:
        raise ValueError(f"{path} has no header line")
    if image_ids is not None:
        lines = _look_up({line[names[0]]: line for line in lines}, image_ids, path)
    table = {name: [line[name] for line in lines] for name in names}
    try:
        return taxonomy_from_columns(table, columns or names[1:])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _look_up(table: Mapping[str, T], image_ids: Sequence[str], path: Path) -> list[T]:
    missing = [image for image in image_ids if image not in table]
    if missing:
        raise ValueError(f"{path} has no entry for {len(missing)} images, such as {missing[0]!r}")
    return [table[image] for image in image_ids]
