"""Folders that appear whole or not at all, and content that outlasts a power cut."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, a quota, and a limit on the size of files."""


def put_in_place(made: Path, folder: Path, *, aside: Path | None = None) -> None:
    """Give a finished folder its name, in place of what has it.

    What had the name comes back if that fails.

    Args:
        made: The finished folder, on the same file system.
        folder: Its name to be. Its parent exists.
        aside: Where what has the name goes meanwhile; by default beside ``made``.
    """
    sync(made)
    if folder.exists():
        aside = aside or made.with_name(f"{made.name}-replaced")
        folder.replace(aside)
        try:
            made.replace(folder)
        except BaseException:
            aside.replace(folder)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    else:
        made.replace(folder)
    sync(folder.parent)


def sync_files(folder: Path) -> None:
    """Wait until every file of a folder is on the disk."""
    for path in folder.iterdir():
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill, and put it in the place of ``folder`` once it is full.

    Nobody sees it half full, and it is gone if the ``with`` block fails. What had the name is
    replaced.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield made
        sync_files(made)
        made.chmod(0o777 & ~_umask())
        put_in_place(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is seen complete or not at all, and outlasts a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, unfinished = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(unfinished).chmod(0o666 & ~_umask())
        Path(unfinished).replace(path)
        sync(path.parent)
    finally:
        Path(unfinished).unlink(missing_ok=True)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write strict JSON, whole or not at all."""
    write_whole(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def _umask() -> int:
    """The mask that the system takes off the modes of new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
