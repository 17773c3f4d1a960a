"""Write a store's files whole or not at all; read them with a size limit, within the folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from vision_plugin import _disk
from vision_plugin._untrusted import MAX_JSON_BYTES
from vision_plugin._untrusted import parse_json as parse_bounded
from vision_plugin.activations._errors import (
    ManifestError,
    ShardError,
    StoreFullError,
    StoreLockedError,
)

TEMPORARY = ".partial-"
"""Prefix of the name of a file that is being written."""
LOCK = ".lock"
STORE_FILE = re.compile(
    rf"{re.escape(LOCK)}|({re.escape(TEMPORARY)}{_disk.WRITER})?"
    r"(plan\.json|manifest\.json|shard-[0-9]{5,7}\.(json|safetensors))"
)
"""Names of all files that an extraction writes."""


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a stream for a file of the store, which is seen complete or not at all.

    Args:
        path: File to write; an existing one is replaced.

    Raises:
        StoreFullError: the disk is full, or a quota or a limit on file sizes is reached.
    """
    try:
        with _disk.whole_file(path, prefix=TEMPORARY) as stream:
            yield stream
    except OSError as error:
        if error.errno in _disk.NO_ROOM:
            raise _no_room(path, error) from error
        raise


def _no_room(path: Path, error: OSError) -> StoreFullError:
    return StoreFullError(
        error.errno,
        f"no room to write {path.name} ({os.strerror(error.errno or 0)}). The finished shards are "
        "kept: free some room and run the same command again to continue",
        str(path.parent),
    )


def remove_partial(folder: Path) -> None:
    """Remove unfinished files of a killed extraction; hold the lock when calling this."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if STORE_FILE.fullmatch(path.name):
            path.unlink(missing_ok=True)


def locked(folder: Path) -> AbstractContextManager[None]:
    """Hold the folder's lock; the system releases it when the process ends for any reason.

    Raises:
        StoreLockedError: another process holds the lock.
    """
    message = f"another extraction is writing into {folder}. Wait for it, or name another folder"
    return _disk.locked(folder / LOCK, StoreLockedError(message))


def open_regular(folder: Path, name: str) -> int:
    """Return a file descriptor of a plain file directly in a folder.

    Raises:
        ShardError: it is missing, a link, a folder or a device, or its name contains a folder.
    """
    if not name or "/" in name or "\\" in name or "\0" in name or name in (".", ".."):
        raise ShardError(repr(name), "expected a plain file name, without a folder")
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise ShardError(name, f"expected in {folder}, but it is missing") from error
    except OSError as error:
        found = "a symbolic link" if error.errno == errno.ELOOP else os.strerror(error.errno or 0)
        raise ShardError(name, f"expected a plain file in {folder}, found {found}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ShardError(name, f"expected a plain file in {folder}, found something else")
    return descriptor


def read_capped(folder: Path, name: str) -> bytes:
    """Return the bytes of a JSON file.

    Raises:
        ShardError: it is not a plain file in the folder, see :func:`open_regular`.
        ManifestError: it is larger than the limit.
    """
    with os.fdopen(open_regular(folder, name), "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if size > MAX_JSON_BYTES:
            raise ManifestError(
                f"{folder / name}: expected at most {MAX_JSON_BYTES:,} bytes, found {size:,}"
            )
        return stream.read(size)


def parse_json(content: bytes, where: Path) -> dict[str, Any]:
    """Return a JSON object, after checks for NaN, infinities and repeated keys.

    Raises:
        ManifestError: the content is not such an object.
    """
    try:
        document = parse_bounded(content, where, strict=True)
    except ValueError as error:
        raise ManifestError(f"{where}: expected JSON, found something else ({error})") from error
    if not isinstance(document, dict):
        raise ManifestError(
            f"{where}: expected a JSON object, found a {type(document).__name__} at the top"
        )
    return document


def to_json(document: dict[str, Any]) -> bytes:
    """Return a document's bytes as stored; equal documents have equal bytes."""
    return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode()


def sha256(content: bytes) -> str:
    """Return the SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
