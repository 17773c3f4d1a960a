"""Folders that appear whole or not at all, and content that outlasts a power cut."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

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
