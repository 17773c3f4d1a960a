"""Local copies of Waterbirds and CelebA in their published layouts."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vision_plugin._paths import local_path
from vision_plugin._untrusted import read_regular
from vision_plugin.images import BadImageError, decode_image
from vision_plugin.tasks._group_data import GROUPS, GroupData, GroupSplit, check_sizes

MAX_TABLE_BYTES = 256 * 1024 * 1024
"""Larger tables are refused."""
SPLITS = ("train", "validation", "test")
OTHERS = ("Eyeglasses", "Smiling", "Young", "Wearing_Hat", "Pale_Skin")
"""CelebA's attributes whose answers should stay, as far as they are neither asked nor nuisance."""


@dataclass(frozen=True)
class _Listed:
    """An image of a table: its file, split, label, nuisance, and other attributes."""

    file: str
    split: int
    label: int
    nuisance: int
    others: tuple[int, ...] = ()


def read_waterbirds(
    model: Any, folder: str | Path, *, most: int | None = 2000, seed: int = 0
) -> GroupData:
    """Read Waterbirds: ``metadata.csv`` with img_filename, y, split and place beside the images.

    Args:
        model: A VisionBridge, which prepares the images.
        folder: The folder.
        most: Most images of a split: training images drawn at random, and as many of each group in
            validation and test as a quarter of it; None takes all.
        seed: Seed of the draw.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the table cannot be read, or a group has too few images.

    Examples:
        >>> from itertools import product
        >>> from pathlib import Path
        >>> folder = Path("waterbirds-copy")
        >>> folder.mkdir()
        >>> with (folder / "metadata.csv").open("w") as table:
        ...     print("img_filename,y,split,place", file=table)
        ...     for n, (split, y, place, image) in enumerate(
        ...         product(range(3), (0, 1), (0, 1), range(30))
        ...     ):
        ...         world.images[image % 8].save(folder / f"{n}.jpg")
        ...         print(f"{n}.jpg,{y},{split},{place}", file=table)
        >>> vp.tasks.read_waterbirds(model, folder).classes
        ('landbird', 'waterbird')
    """
    root = local_path(folder)
    table = _found(root, ("metadata.csv",), "Waterbirds")
    listed = []
    for where, row in _csv(table, ("img_filename", "y", "split", "place")):
        split, y, place = (
            _number(row, name, values, where)
            for name, values in (("split", (0, 1, 2)), ("y", (0, 1)), ("place", (0, 1)))
        )
        listed.append(_Listed(row["img_filename"], split, y, place))
    names = ("landbird", "waterbird"), ("land", "water")
    return _data(model, root, listed, "bird", "place", *names, others=(), most=most, seed=seed)


def read_celeba(
    model: Any,
    folder: str | Path,
    *,
    label: str = "Blond_Hair",
    nuisance: str = "Male",
    others: Sequence[str] = OTHERS,
    most: int | None = 2000,
    seed: int = 0,
) -> GroupData:
    """Read CelebA: ``list_attr_celeba`` and ``list_eval_partition`` (.txt or .csv) beside
    ``img_align_celeba``.

    Args:
        model: A VisionBridge, which prepares the images.
        folder: The folder.
        label: Attribute that is asked.
        nuisance: Attribute that goes along with it.
        others: Attributes whose answers should stay.
        most: As for :func:`read_waterbirds`.
        seed: Seed of the draw.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a table cannot be read, has no such attribute, or a group has too few images.

    Examples:
        >>> from itertools import product
        >>> from pathlib import Path
        >>> folder = Path("celeba")
        >>> (folder / "img_align_celeba").mkdir(parents=True)
        >>> attributes = (folder / "list_attr_celeba.csv").open("w")
        >>> splits = (folder / "list_eval_partition.csv").open("w")
        >>> print("image_id,Blond_Hair,Male", file=attributes)
        >>> print("image_id,partition", file=splits)
        >>> for n, (split, blond, male, image) in enumerate(
        ...     product(range(3), (-1, 1), (-1, 1), range(30))
        ... ):
        ...     world.images[image % 8].save(folder / "img_align_celeba" / f"{n:06}.jpg")
        ...     print(f"{n:06}.jpg,{blond},{male}", file=attributes)
        ...     print(f"{n:06}.jpg,{split}", file=splits)
        >>> attributes.close(), splits.close()
        (None, None)
        >>> vp.tasks.read_celeba(model, folder, others=()).classes
        ('not Blond_Hair', 'Blond_Hair')
    """
    root = local_path(folder)
    if label == nuisance:
        raise ValueError(f"label= and nuisance= are both {label!r}: name two attributes")
    attributes = _celeba(root, "list_attr_celeba", "image_id")
    partition = _celeba(root, "list_eval_partition", "image_id", header=("image_id", "partition"))
    split_of = {
        row["image_id"]: _number(row, "partition", (0, 1, 2), where) for where, row in partition
    }
    kept = tuple(name for name in others if name not in (label, nuisance))
    listed = []
    for where, row in attributes:
        missing = [name for name in (label, nuisance, *kept) if name not in row]
        if missing:
            known = ", ".join(name for name in row if name != "image_id")
            raise ValueError(f"{where} has no attribute {missing[0]!r}: use some of {known[:1500]}")
        if row["image_id"] not in split_of:
            raise ValueError(
                f"{where}: list_eval_partition has no line for {row['image_id']!r}: both tables "
                "must be of one copy of the data set"
            )
        y, a, *rest = (max(0, _number(row, n, (-1, 0, 1), where)) for n in (label, nuisance, *kept))
        listed.append(_Listed(row["image_id"], split_of[row["image_id"]], y, a, tuple(rest)))
    images = root / "img_align_celeba"
    if not images.is_dir():
        raise FileNotFoundError(
            f"{root} has no folder img_align_celeba: unpack img_align_celeba.zip there"
        )
    nested = images / "img_align_celeba"  # the copy of the data set on Kaggle
    images = nested if nested.is_dir() else images
    names = (f"not {label}", label), (f"not {nuisance}", nuisance)
    return _data(model, images, listed, label, nuisance, *names, others=kept, most=most, seed=seed)


def _data(
    model: Any,
    root: Path,
    listed: Sequence[_Listed],
    kind: str,
    nuisance: str,
    classes: tuple[str, str],
    values: tuple[str, str],
    *,
    others: Sequence[str],
    most: int | None,
    seed: int,
) -> GroupData:
    if most is not None and most < len(GROUPS):
        raise ValueError(f"most={most} must be at least {len(GROUPS)}, an image of each group")
    generator = torch.Generator().manual_seed(seed)
    names = tuple(f"{classes[y]}, {values[a]}" for y, a in GROUPS)
    chosen = []
    for number, split in enumerate(SPLITS):
        rows = [one for one in listed if one.split == number]
        each = [[o for o in rows if (o.label, o.nuisance) == group] for group in GROUPS]
        check_sizes([len(of) for of in each], names, split)
        if most is not None and len(rows) > most:
            share = [most / len(rows)] * len(GROUPS)
            if split != "train":
                share = [most / len(GROUPS) / len(of) for of in each]
            counts = [max(1, min(len(of), round(s * len(of)))) for of, s in
                      zip(each, share, strict=True)]  # fmt: skip
            each = [_draw(of, n, generator) for of, n in zip(each, counts, strict=True)]
            check_sizes([len(of) for of in each], names, split)
        chosen.append([one for of in each for one in of])
    train, validation, test = (_split(model, root, rows, others) for rows in chosen)
    return GroupData(kind, nuisance, classes, values, train, validation, test)


def _draw(rows: Sequence[_Listed], n: int, generator: torch.Generator) -> list[_Listed]:
    return [rows[i] for i in torch.randperm(len(rows), generator=generator)[:n].sort().values]


def _split(model: Any, root: Path, rows: Sequence[_Listed], others: Sequence[str]) -> GroupSplit:
    parts = []
    for start in range(0, len(rows), 64):
        images = [_image(root, one.file) for one in rows[start : start + 64]]
        parts.append(model.preprocess(images))
    return GroupSplit(
        torch.cat(parts),
        torch.tensor([one.label for one in rows]),
        torch.tensor([one.nuisance for one in rows]),
        {name: torch.tensor([one.others[i] for one in rows]) for i, name in enumerate(others)},
    )


def _image(root: Path, name: str) -> Any:
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{name!r} leads out of {root}: name files inside it")
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist, but the table lists it: give a whole copy of the data set"
        )
    try:
        return decode_image(path, name)
    except BadImageError as error:
        raise ValueError(f"{path} cannot be read ({error}): replace it") from error


# ------------------------------------------------------------------ tables


def _found(root: Path, names: Sequence[str], data: str) -> Path:
    for name in names:
        if (root / name).is_file():
            return root / name
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a folder that exists")
    raise FileNotFoundError(
        f"{root} has no {' or '.join(names)}, which {data} has: give the folder that it is in"
    )


def _celeba(
    root: Path, stem: str, key: str, header: Sequence[str] | None = None
) -> list[tuple[str, dict[str, str]]]:
    """Return the rows of one of CelebA's tables: CSV, or the text files as they were published."""
    path = _found(root, (f"{stem}.txt", f"{stem}.csv"), "CelebA")
    if path.suffix == ".csv":
        return list(_csv(path, header or (key,)))
    lines = _text(path).splitlines()
    first = 0
    if header is None:  # the number of images, the attributes' names, then the rows
        if len(lines) < 2:
            raise ValueError(f"{path} ends before its first image: copy the whole file")
        header, first = (key, *lines[1].split()), 2
    rows = []
    for number, line in enumerate(lines[first:], first + 1):
        cells = line.split()
        if not cells:
            continue
        if len(cells) != len(header):
            raise ValueError(
                f"{path}, line {number} has {len(cells)} fields for {len(header)} columns: copy "
                "the file again"
            )
        rows.append((f"{path}, line {number}", dict(zip(header, cells, strict=True))))
    return rows


def _csv(path: Path, needs: Sequence[str]) -> Iterator[tuple[str, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(_text(path)))
    missing = [name for name in needs if name not in (reader.fieldnames or ())]
    if missing:
        raise ValueError(
            f"{path} has no column {missing[0]!r}, so it says no groups: use the data set's own "
            f"table, with {', '.join(needs)}"
        )
    try:
        for row in reader:
            if None in row or None in row.values():
                raise ValueError(
                    f"{path}, line {reader.line_num} has not as many fields as the header: copy "
                    "the file again"
                )
            yield f"{path}, line {reader.line_num}", row
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is not CSV ({error})") from error


def _text(path: Path) -> str:
    try:
        return read_regular(path, MAX_TABLE_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error}): convert it") from error


def _number(row: dict[str, str], name: str, allowed: Sequence[int], where: str) -> int:
    """Return a cell that is one of a few numbers."""
    known = {str(value): value for value in allowed}
    text = row[name].strip()
    if text not in known:
        raise ValueError(
            f"{where}: {name} is {text[:40]!r}, not one of {', '.join(known)}: use the data set's "
            "own table"
        )
    return known[text]
