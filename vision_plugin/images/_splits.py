"""Splits of a source: what the names of files and folders say, and which one is meant."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import PurePosixPath

_WORDS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""The names that splits go by, each with what it stands for."""
_WORD = re.compile(rf"(?:^|(?<=[-_. ]))({'|'.join(_WORDS)})(?=[-_. 0-9]|$)", re.IGNORECASE)
_SHARD = re.compile(r"((?:[-_.]\d+(?:[-_]of[-_]\d+)?)*)(?:-[0-9a-f]{16})?$")
"""The number at the end of a file's name, ``-00000-of-00004``, with datasets' hash behind it."""


def choose_split(splits: Sequence[str], wanted: str | None, where: str) -> str | None:
    """Return the split to read; None where there are none and none is wanted.

    Args:
        splits: The splits that there are.
        wanted: The split asked for; None takes the only one.
        where: Name of the source in errors.

    Raises:
        ValueError: there is no such split, or there are several and none is asked for.
    """
    if wanted is None and len(splits) < 2:
        return splits[0] if splits else None
    if not splits:
        raise ValueError(f"{where} has no splits: leave out split=")
    if wanted not in splits:
        raise ValueError(f"{where} has the splits {', '.join(splits)}: name one with split=")
    return wanted


def splits_of_files(names: Sequence[str]) -> list[str | None]:
    """Return the split that each file belongs to, by the names that data sets use for shards.

    A folder named ``train``, ``validation`` or ``test``, or such a word in the file's own name,
    says it: ``data/train-00000-of-00004.parquet`` and ``imagenet-val-0001.tar``. What follows the
    word is part of the split's name: ``train_hard-0.parquet`` belongs to ``train_hard``. What
    precedes it is part of the name only where files differ in it.

    Args:
        names: Relative paths. All files have None where no name says anything.
    """
    bases = [_base(name) for name in names]
    words = [_WORD.search(base) for base in bases]
    folders = [_split_folder(name) for name in names]
    if not any(words) and not any(folders):
        # Shards that count `of` how many belong to sets, which have several names.
        sharded = all("of" in _shard(name)[1] for name in names)
        return list(bases) if sharded and len(set(bases)) > 1 else [None] * len(names)
    before = {base[: word.start()] for base, word in zip(bases, words, strict=True) if word}
    return [
        (base[word.start() :] if len(before) == 1 else base) if word else folder or base
        for base, word, folder in zip(bases, words, folders, strict=True)
    ]


def split_depth(names: Sequence[str]) -> int | None:
    """Return the level of folders that are splits; None where there is none.

    Two folders of one level are named for different splits there, such as ``train`` and ``test``:
    a class may have one of these names, but no two classes have two of them.

    Args:
        names: Relative paths of images.
    """
    stands_for: list[set[str]] = []
    for folder in {PurePosixPath(name).parent for name in names}:
        for depth, part in enumerate(folder.parts):
            if depth == len(stands_for):
                stands_for.append(set())
            if part.lower() in _WORDS:
                stands_for[depth].add(_WORDS[part.lower()])
    return next((depth for depth, found in enumerate(stands_for) if len(found) > 1), None)


def _split_folder(name: str) -> str | None:
    folders = PurePosixPath(name).parts[:-1]
    return next((part for part in reversed(folders) if part.lower() in _WORDS), None)


def _base(name: str) -> str:
    """Return what is before a file's number, or the name of its folder where there is nothing."""
    base = _shard(name)[0]
    return base if base.strip("0123456789") else PurePosixPath(name).parent.name or base


def _shard(name: str) -> tuple[str, str]:
    stem = PurePosixPath(name).stem
    number = _SHARD.search(stem)
    assert number is not None  # it matches nothing at all, at the end
    return stem[: number.start()], number.group(1)
