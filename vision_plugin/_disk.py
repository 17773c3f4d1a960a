"""Folders that appear whole or not at all, and content that outlasts a power cut."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, a quota, and a limit on the size of files."""


def put_in_place(made: Path, folder: Path, *, aside: Path | None = None) -> None:
    """Rename a finished folder, and replace the folder that has the name.

    The replaced folder comes back if the renaming fails.

    Args:
        made: The finished folder, on the same file system.
        folder: Its final name. The parent folder must exist.
        aside: Where the replaced folder waits meanwhile; by default beside ``made``.
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
    """Yield an empty folder to fill, and rename it to ``folder`` once it is full.

    Nobody sees it half full, and it is deleted if the ``with`` block fails. A folder that has the
    name is replaced.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield made
        for path in made.iterdir():
            if path.is_file():  # some libraries write files that their owner alone can read
                path.chmod(0o666 & ~umask())
        sync_files(made)
        made.chmod(0o777 & ~umask())
        put_in_place(made, folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def write_whole(
    path: Path, content: bytes | Callable[[BinaryIO], object], *, prefix: str = ".unfinished-"
) -> None:
    """Write a file that is seen complete or not at all, and that outlasts a power cut.

    Args:
        path: File to write; an existing one is replaced.
        content: The bytes, or a function that writes them to a stream.
        prefix: Prefix of the file's name while it is written.

    Raises:
        OSError: there is no room (``error.errno in NO_ROOM``), or the system refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{prefix}{os.getpid()}-{path.name}")
    try:
        with unfinished.open("wb") as stream:
            if isinstance(content, bytes):
                stream.write(content)
            else:
                content(stream)
            stream.flush()
            os.fsync(stream.fileno())
        unfinished.replace(path)
        sync(path.parent)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
        raise


@contextmanager
def locked(path: Path, busy: Exception) -> Iterator[None]:
    """Hold a file's lock; the system releases it when the process ends for any reason.

    Args:
        path: The lock file; it is made if it does not exist.
        busy: Error to raise if another process holds the lock.
    """
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
        yield


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write strict JSON, whole or not at all."""
    write_whole(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def umask() -> int:
    """Return the mask that the system takes off the modes of new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
