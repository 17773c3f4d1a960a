"""The three layouts of a pickled checkpoint: torch's zip archive, torch's older stream, a pickle.

Every entry and storage is checked against the file's size before anything is allocated.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import torch

from vision_plugin._shown import shown
from vision_plugin.formats._errors import CorruptCheckpointError, RefusedCheckpointError
from vision_plugin.formats._inert import Budget
from vision_plugin.formats._unpickle import InertUnpickler, PickleBytes, Stream

MAX_PICKLE_BYTES = 16 << 20
_MAX_DIRECTORY_BYTES = 1 << 20
_END, _LOCATOR, _END_64 = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"
_END_BYTES, _LOCATOR_BYTES, _END_64_BYTES = 22, 20, 56
# torch's stream begins with three pickles: this number, a protocol, and facts of the machine.
_STREAM_MAGIC = 0x1950A86A20F9469CFC6C
_STREAM_PROTOCOL = 1001
_STREAM_MARK = _STREAM_MAGIC.to_bytes(10, "little")
_CHUNK = 8 << 20


def read_pickled(file: Stream, size: int) -> Any:
    """Return the tensors, plain containers and inert objects of a pickled checkpoint.

    Args:
        file: The file, at the checkpoint's first byte.
        size: Bytes from there to the end.
    """
    begin = file.tell()
    start = file.read(32)
    file.seek(begin)
    if start.startswith(b"PK\x03\x04"):
        return _zip_archive(file, size)
    if not start.startswith(b"\x80"):
        raise CorruptCheckpointError(
            f"it starts with {start[:8]!r}: neither a torch file, a pickle, gzip nor safetensors."
        )
    # An embedded storage counts twice: its bytes, and the numbers that they become.
    content = PickleBytes(file, size, Budget(2 * size))
    if _STREAM_MARK in start:
        return _stream(content, _embedded)
    return InertUnpickler(content, embedded=_embedded).load()


def _zip_archive(file: Stream, size: int) -> Any:
    """Return the content of a zip that `torch.save` wrote, after checks of each entry."""
    _check_directory(file)
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise CorruptCheckpointError("its archive holds two entries of one name.")
        if sum(entry.file_size for entry in entries.values()) > size:
            raise CorruptCheckpointError("its archive announces more bytes than it has.")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
            raise CorruptCheckpointError("its archive is compressed, which torch.save never does.")
        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CorruptCheckpointError("its archive was not written by torch.save.")
        folder = pickles[0].removesuffix("data.pkl")
        order = entries.get(f"{folder}byteorder")
        if order is not None and archive.read(order).strip() != b"little":
            raise RefusedCheckpointError("it was written on a big-endian machine.")
        if entries[pickles[0]].file_size > MAX_PICKLE_BYTES:
            raise CorruptCheckpointError("its data.pkl is too large for a checkpoint.")
        cache: dict[str, torch.Tensor] = {}

        def storage(key: str, dtype: torch.dtype, n_elements: int) -> torch.Tensor:
            entry = entries.get(f"{folder}data/{key}")
            if entry is None or entry.file_size != n_elements * dtype.itemsize:
                raise _not_held(key, n_elements, dtype)
            if n_elements == 0:
                return torch.empty(0, dtype=dtype)
            if key not in cache:
                with archive.open(entry) as stream:
                    cache[key] = _bytes(stream.read, entry.file_size)
            return cache[key].view(dtype)

        pickled = archive.read(pickles[0])
        content = PickleBytes(io.BytesIO(pickled), len(pickled), Budget(2 * size))
        return InertUnpickler(content, storage, _embedded).load()


def _check_directory(file: Stream) -> None:
    """Raise if the list of a zip's entries, which is read before any of them, is too long."""
    begin = file.tell()
    end = file.seek(0, io.SEEK_END)
    start = max(end - _END_BYTES - _LOCATOR_BYTES - _END_64_BYTES, begin)
    file.seek(start)
    tail = file.read(end - start)
    file.seek(begin)
    n_bytes = 0
    if tail[-_END_BYTES:].startswith(_END):
        n_bytes = struct.unpack_from("<L", tail, len(tail) - _END_BYTES + 12)[0]
        if tail[-_END_BYTES - _LOCATOR_BYTES :].startswith(_LOCATOR) and tail.startswith(_END_64):
            n_bytes = struct.unpack_from("<Q", tail, 40)[0]
    if not 0 < n_bytes <= _MAX_DIRECTORY_BYTES:
        raise CorruptCheckpointError(
            "its archive does not end as torch.save's do: it is truncated, or has far too many "
            "entries."
        )


def _stream(
    content: PickleBytes,
    embedded: Callable[[bytes, Budget], torch.Tensor] | None,
) -> Any:
    """Return the content of a file in torch's format before version 1.6.

    After the pickle of the content come the keys of its storages, and then their numbers.
    """
    storages: dict[str, torch.Tensor] = {}

    def storage(key: str, dtype: torch.dtype, n_elements: int) -> torch.Tensor:
        if key not in storages:
            if n_elements < 0:
                raise _not_held(key, n_elements, dtype)
            content.budget.take(n_elements * dtype.itemsize)
            storages[key] = torch.zeros(n_elements, dtype=dtype)
        if storages[key].dtype != dtype or storages[key].numel() != n_elements:
            raise _not_held(key, n_elements, dtype)
        return storages[key]

    def following(storages: Callable[..., torch.Tensor] | None = None) -> Any:
        return InertUnpickler(content, storages, embedded).load()

    magic, protocol, machine = following(), following(), following()
    if type(magic) is not int or magic != _STREAM_MAGIC:
        raise CorruptCheckpointError("it does not start as torch's files do.")
    if type(protocol) is not int or protocol != _STREAM_PROTOCOL:
        raise CorruptCheckpointError(f"its protocol is {shown(protocol)}, not {_STREAM_PROTOCOL}.")
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise RefusedCheckpointError("it was written on a big-endian machine.")
    found, keys = following(storage), following()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CorruptCheckpointError("its list of storages is damaged.")
    for key in keys:
        tensor = storages.pop(key, None)
        (n_elements,) = struct.unpack("<q", content.read(8))
        if tensor is None or n_elements != tensor.numel():
            raise CorruptCheckpointError(f"its storage {shown(key)} has another size.")
        if n_elements:
            tensor.copy_(_bytes(content.read, tensor.nbytes).view(tensor.dtype))
    if storages:
        raise CorruptCheckpointError(f"{len(storages)} of its storages are missing.")
    return found


def _embedded(blob: bytes, budget: Budget) -> torch.Tensor:
    found = _stream(PickleBytes(io.BytesIO(blob), len(blob), budget), None)
    if not isinstance(found, torch.Tensor):
        raise CorruptCheckpointError("an embedded storage holds something other than numbers.")
    return found


def _bytes(read: Callable[[int], bytes], n_bytes: int) -> torch.Tensor:
    """Return so many bytes as a tensor; the last read checks a zip's checksum."""
    made = torch.empty(n_bytes, dtype=torch.uint8)
    room = memoryview(made.numpy())  # type: ignore[arg-type]  # numpy arrays are buffers
    at = 0
    while at < n_bytes:
        chunk = read(min(_CHUNK, n_bytes - at))
        if not chunk:
            raise EOFError("it ends too early")
        room[at : at + len(chunk)] = chunk
        at += len(chunk)
    return made


def _not_held(key: str, n_elements: int, dtype: torch.dtype) -> CorruptCheckpointError:
    return CorruptCheckpointError(
        f"its storage {shown(key)} does not hold the expected {shown(n_elements)} {dtype} values."
    )
