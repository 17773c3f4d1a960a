"""Files and folders that appear whole or not at all, and outlast a power cut; safetensors."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from itertools import chain
from math import prod
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch
from torch import Tensor

from vision_plugin._ours import Kind, check_replaceable
from vision_plugin._paths import local_path

logger = logging.getLogger(__name__)

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, a quota, and a limit on the size of files."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes by their safetensors codes."""
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PART, _LOCK, _NEW, _REPLACED = ".part-", "lock", "new", "replaced"
_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD of fcntl.h, and a flag of renameat2
_UNFINISHED = ".unfinished-"
WRITER = r"([0-9A-Za-z]+-)?[0-9]+-([0-9a-f]{8}-)?"
"""Pattern of what follows the prefix of an unfinished file: host, process, something random."""


@contextmanager
def whole_folder(
    folder: Path, *, replaces: Kind | None = None, flush: bool = True
) -> Iterator[Path]:
    """Yield an empty folder to fill, and give it the name ``folder`` when the block ends.

    Nobody sees it half full. If the block fails, it is deleted and ``folder`` stays as it is. A
    folder of the kind ``replaces`` that has the name is replaced, in one step where the system
    exchanges names. Elsewhere two renamings do it: the replaced folder comes back if the second
    fails, or at the next call for the same ``folder`` if the process was killed between them.
    Of two processes that make one folder, the one that ends last replaces the other's.

    Args:
        folder: Folder to make. A link stays a link: the folder that it names is replaced.
        replaces: Kind of folder that may be replaced; None replaces an empty one at most.
        flush: Whether to wait until every file is on the disk. A report has tens of thousands of
            small files and can be made again, so it does not wait.

    Raises:
        FileExistsError: something else has the name; it is left alone.
        OSError: there is no room (``error.errno in NO_ROOM``), or the system refuses.
    """
    folder = local_path(folder).resolve()
    check_replaceable(folder, replaces)
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder.parent, folder.name)
    check_replaceable(folder, replaces)
    with _room_for(folder), _staging(folder) as staging:
        try:
            made = staging / _NEW
            made.mkdir()
            yield made
            if flush:
                _flush(made)
            sync(made)
            with _alone_in(folder.parent):
                check_replaceable(folder, replaces)
                if not folder.exists():
                    made.replace(folder)
                elif not exchange(made, folder):
                    folder.replace(staging / _REPLACED)
                    made.replace(folder)
            sync(folder.parent)
        finally:
            _remove(staging, folder)


@contextmanager
def _room_for(place: Path) -> Iterator[None]:
    """Say what a full disk has no room for, and what to do."""
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _number_told(error)
        if number not in NO_ROOM or "no room" in str(error):
            raise
        reason = f"no room to write {place.name} ({os.strerror(number)}): free some room and run "
        raise OSError(number, f"{reason}the same command again", str(place)) from error


def _number_told(error: Exception) -> int:
    """Return the system's error number, which libraries in Rust give in words; 0 for none."""
    told = re.search(r"\(os error ([0-9]+)\)", str(error))
    return int(told.group(1)) if told else 0


@contextmanager
def _alone_in(parent: Path) -> Iterator[None]:
    """Wait until no other process renames folders in a folder: two renamings are not one."""
    descriptor = os.open(parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems lock no folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def exchange(one: Path, other: Path) -> bool:
    """Give each of two folders the other's name in one step; False where the system cannot.

    Linux can on most local file systems (``renameat2``), and not on NFS.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system, or an old C library
        return False
    done = renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _RENAME_EXCHANGE)
    return bool(done == 0)


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """Yield a new folder beside ``folder``, and hold the lock in it."""
    with ExitStack() as held:
        while True:
            staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}{_PART}", dir=folder.parent))
            try:
                held.enter_context(locked(staging / _LOCK, BlockingIOError()))
            except (BlockingIOError, FileNotFoundError):
                continue  # another process took the folder without a lock for a killed one's
            if (staging / _LOCK).exists():
                break
        yield staging


def remove_unfinished(parent: Path, name: str | None = None) -> None:
    """Remove what killed calls of :func:`whole_folder` left; put replaced folders back.

    Folders that a running process fills stay: it holds a lock on them.

    Args:
        parent: Folder to look in.
        name: Name of the folder that was to be made; by default any.
    """
    for staging in sorted(parent.iterdir()):
        made_for, part, _ = staging.name.rpartition(_PART)
        if not part or not made_for.startswith(".") or name not in (None, made_for[1:]):
            continue
        lock = staging / _LOCK
        if staging.is_symlink() or not staging.is_dir():
            continue
        if not lock.is_file():
            with suppress(OSError):
                staging.rmdir()  # the process was killed before it made the lock
            continue
        with suppress(BlockingIOError, FileNotFoundError), locked(lock, BlockingIOError()):
            if not {path.name for path in staging.iterdir()} <= {_LOCK, _NEW, _REPLACED}:
                continue  # somebody's own
            logger.info("removing %s, which a killed process left", staging)
            _remove(staging, parent / made_for[1:])


def _remove(staging: Path, folder: Path) -> None:
    """Remove a staging folder; the folder that it was to replace comes back if it has to."""
    replaced = staging / _REPLACED
    if replaced.exists() and not folder.exists():
        replaced.replace(folder)
    for name in (_NEW, _REPLACED):  # the lock last: without it nobody would remove the rest
        shutil.rmtree(staging / name, ignore_errors=True)
    shutil.rmtree(staging, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Wait until all that a folder holds is on the disk, readable as the umask allows.

    Some libraries write files that their owner alone can read.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(0o666 & ~_umask())
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def unfinished(path: Path, *, prefix: str = _UNFINISHED) -> Path:
    """Return a new name for a file while it is written, which no other host or process takes."""
    host = re.sub(r"[^0-9A-Za-z]", "", socket.gethostname())[:32] or "host"
    return path.with_name(f"{prefix}{host}-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


@contextmanager
def whole_file(path: Path, *, prefix: str = _UNFINISHED) -> Iterator[BinaryIO]:
    """Yield a stream to write to, and give what was written the name ``path`` when the block ends.

    The file is seen complete or not at all, and outlasts a power cut. If the block fails, the
    file that has the name stays as it is.

    Args:
        path: File to write; an existing one is replaced.
        prefix: Prefix of the file's name while it is written.

    Raises:
        OSError: there is no room (``error.errno in NO_ROOM``), or the system refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = unfinished(path, prefix=prefix)
    try:
        with part.open("wb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)  # says that a process is at it
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
        sync(path.parent)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def _remove_unfinished_files(path: Path) -> None:
    """Remove unfinished files of a name; those that a running process writes are locked."""
    if not path.parent.is_dir():
        return
    name = re.compile(rf"{re.escape(_UNFINISHED)}{WRITER}{re.escape(path.name)}")
    for left in sorted(path.parent.iterdir()):
        if name.fullmatch(left.name) and left.is_file() and not left.is_symlink():
            with suppress(OSError), left.open("r+b") as stream:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()


@contextmanager
def locked(path: Path, busy: Exception) -> Iterator[None]:
    """Hold a file's lock; the system releases it when the process ends for any reason.

    Processes that are forked meanwhile do not hold it: they may live on when this one is killed.

    Args:
        path: The lock file; it is made if it does not exist.
        busy: Error to raise if another process holds the lock.
    """
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
        _locks.add(stream)
        try:
            yield
        finally:
            _locks.discard(stream)


_locks: set[IO[str]] = set()
"""Files whose locks this process holds."""


def _let_go() -> None:
    for stream in _locks:
        stream.close()
    _locks.clear()


os.register_at_fork(after_in_child=_let_go)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write strict JSON, whole or not at all; remove what killed processes left of the file.

    Raises:
        OSError: there is no room (``error.errno in NO_ROOM``), or the system refuses.
    """
    _remove_unfinished_files(path)
    with _room_for(path), whole_file(path) as stream:
        stream.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


@dataclass(frozen=True)
class Written:
    """Size in bytes and SHA-256, in hexadecimal, of what was written."""

    bytes: int
    sha256: str


def write_tensors(
    stream: BinaryIO | BytesIO,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> Written:
    """Write tensors in the safetensors format, one after the other, and hash what is written.

    The library's own writer hides the system's error number, which tells a full disk from others.

    Args:
        stream: Receives the bytes.
        tensors: Tensors by name; they are written in this order.
        metadata: Texts for the header.

    Raises:
        OSError: there is no room (``error.errno in NO_ROOM``), or the system refuses.
    """
    shapes = {name: (_CODES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    head = json.dumps(tensors_header(shapes, metadata), separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    start: list[bytes | memoryview] = [struct.pack("<Q", len(head)), head]
    digest, n_bytes = hashlib.sha256(), 0
    for part in chain(start, map(tensor_bytes, tensors.values())):
        stream.write(part)
        digest.update(part)
        n_bytes += len(part)
    return Written(n_bytes, digest.hexdigest())


def tensors_header(
    shapes: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return a safetensors header.

    Args:
        shapes: Dtype code (see ``DTYPES``) and shape by name, in the order of the file.
        metadata: Texts for the header.
    """
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name, (code, shape) in shapes.items():
        begin, end = end, end + prod(shape) * DTYPES[code].itemsize
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    return entries


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a tensor's bytes in row-major order, without a copy where it lies so on the CPU."""
    values: Any = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(values)


def _umask() -> int:
    """Return the mask that the system takes off the modes of new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
