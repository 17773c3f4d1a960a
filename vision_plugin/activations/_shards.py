"""Shards: safetensors files that are written whole and read in checked chunks."""

from __future__ import annotations

import mmap
import os
import stat
import struct
from collections.abc import Mapping, Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash
from torch import Tensor

from vision_plugin._disk import DTYPES, Written, tensor_bytes, tensors_header, write_tensors
from vision_plugin.activations._errors import ManifestError, ShardError
from vision_plugin.activations._files import open_regular, parse_json, to_json, whole_file
from vision_plugin.activations._plan import FORMAT, ShardTask, StorePlan
from vision_plugin.activations._records import (
    BadImage,
    ShardEntry,
    ShardRecord,
    read_marker,
    tensor_shapes,
)


class Remote(Protocol):
    """A place that has the files of a store."""

    def fetch(self, folder: Path, name: str) -> None:
        """Copy a file into a folder, whole or not at all, unless it is there."""


def header(plan: StorePlan, index: int, n_images: int) -> dict[str, Any]:
    """Return a shard's safetensors header: its tensors in file order, its plan and its number."""
    shapes = {n: (code, shape) for n, (code, shape, _) in tensor_shapes(plan, n_images).items()}
    return tensors_header(shapes, _metadata(plan, index))


def _metadata(plan: StorePlan, index: int) -> dict[str, str]:
    return {"format": FORMAT, "plan_sha256": plan.sha256, "shard": str(index)}


def write_shard(
    folder: Path, plan: StorePlan, task: ShardTask, tensors: Mapping[str, Tensor], n_images: int
) -> tuple[Written, dict[str, tuple[str, ...]]]:
    """Write a shard, whole or not at all; return its size and hash, and its chunks' checksums.

    Args:
        folder: Folder of the store.
        plan: Plan of the store.
        task: Shard to write.
        tensors: Contiguous tensors of the names and shapes in the plan.
        n_images: Images in the shard.

    Raises:
        StoreFullError: there is no room for the shard.
    """
    with whole_file(folder / task.file) as stream:
        written = write_tensors(stream, tensors, _metadata(plan, task.index))
    checksums = {
        name: tuple(
            checksum(tensor_bytes(tensor[first : first + plan.images_per_chunk]))
            for first in range(0, n_images, plan.images_per_chunk)
        )
        for name, tensor in tensors.items()
    }
    return written, checksums


def complete_shard(
    folder: Path,
    plan: StorePlan,
    task: ShardTask,
    tensors: Mapping[str, Tensor],
    *,
    ids: Sequence[str],
    labels: Sequence[str] | None,
    bad: Sequence[BadImage],
) -> ShardRecord:
    """Write a shard, then its marker.

    Args:
        folder: Folder of the store.
        plan: Plan of the store.
        task: Shard to write.
        tensors: Contiguous tensors of the names and shapes in the plan.
        ids: Names of the images in the shard.
        labels: Labels of the images in the shard, if there are labels.
        bad: Images of the task that could not be read.

    Raises:
        StoreFullError: there is no room for the shard.
    """
    written, checksums = write_shard(folder, plan, task, tensors, len(ids))
    record = ShardRecord(
        index=task.index,
        n_images=len(ids),
        bytes=written.bytes,
        sha256=written.sha256,
        ids=tuple(ids),
        labels=None if labels is None else tuple(labels),
        bad_images=tuple(bad),
        checksums=checksums,
    )
    with whole_file(folder / task.marker) as stream:
        stream.write(to_json(record.to_json(plan)))
    return record


def checksum(content: bytes | memoryview) -> str:
    """Return the XXH3-64 in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(content)


class Shard:
    """A complete shard on disk. It opens at the first read, and every read checks its chunk."""

    def __init__(
        self,
        folder: Path,
        plan: StorePlan,
        task: ShardTask,
        *,
        entry: ShardEntry | None = None,
        record: ShardRecord | None = None,
    ) -> None:
        self.folder, self.plan, self.task = folder, plan, task
        self.remote: Remote | None = None
        """Where the file is copied from when it is read first; None for a file of the folder."""
        self._entry = entry
        if record is not None:
            self.record = record
        known = entry or self.record
        self.n_images, self.bytes, self.sha256 = known.n_images, known.bytes, known.sha256
        self._map: mmap.mmap | None = None
        self._checked: set[tuple[str, int]] = set()
        self._version: tuple[int, ...] = ()

    @cached_property
    def record(self) -> ShardRecord:
        """Ids, labels and checksums, from the marker."""
        return read_marker(self.folder, self.plan, self.task, self._entry)

    @property
    def n_chunks(self) -> int:
        """Number of chunks of images; the last chunk may be smaller."""
        return -(-self.n_images // self.plan.images_per_chunk)

    def chunk_images(self, chunk: int) -> range:
        """Return the shard's images that a chunk holds."""
        size = self.plan.images_per_chunk
        return range(chunk * size, min((chunk + 1) * size, self.n_images))

    def open(self) -> int:
        """Return a descriptor of the file after checking its size and header.

        Raises:
            ShardError: the file is missing, a link, of another size, or another shard.
        """
        descriptor = self._opened()
        try:
            self._check_header(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _opened(self) -> int:
        if self.remote is not None:
            self.remote.fetch(self.folder, self.task.file)
        descriptor = open_regular(self.folder, self.task.file)
        found = os.fstat(descriptor).st_size
        if found != self.bytes:
            os.close(descriptor)
            raise ShardError(
                self.task.file, f"expected {self.bytes:,} bytes, found {found:,}. {_REMEDY}"
            )
        return descriptor

    def _check_header(self, descriptor: int) -> None:
        expected = header(self.plan, self.task.index, self.n_images)
        room = self.bytes - max(e["data_offsets"][1] for n, e in expected.items() if n[0] != "_")
        start = os.pread(descriptor, room, 0) if 8 < room < 2**24 else b""
        length = struct.unpack("<Q", start[:8])[0] if start else -1
        if length + 8 != room:
            raise ShardError(
                self.task.file, f"expected a header of {room - 8} bytes, found {length}. {_REMEDY}"
            )
        try:
            found = parse_json(start[8:], self.folder / self.task.file)
        except ManifestError as error:
            raise ShardError(self.task.file, f"its header is damaged ({error})") from error
        for name in dict.fromkeys([*expected, *found]):
            if found.get(name) != expected.get(name):
                raise ShardError(
                    self.task.file,
                    f"header entry {name!r}: expected {expected.get(name)}, found "
                    f"{str(found.get(name))[:200]}. {_REMEDY}",
                )

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Place in the file where each tensor begins, in bytes."""
        entries = header(self.plan, self.task.index, self.n_images)
        ends = {n: e["data_offsets"] for n, e in entries.items() if n != "__metadata__"}
        start = self.bytes - max(end for _, end in ends.values())
        return {name: start + begin for name, (begin, _) in ends.items()}

    @cached_property
    def _image_bytes(self) -> dict[str, int]:
        shapes = tensor_shapes(self.plan, self.n_images)
        return {name: prod(shape[1:]) * size for name, (_, shape, size) in shapes.items()}

    def image_bytes(self, name: str) -> int:
        """Return how many bytes an image has in a tensor."""
        return self._image_bytes[name]

    def read_chunk(self, descriptor: int, name: str, chunk: int, out: memoryview) -> None:
        """Read a chunk of a tensor from an open descriptor, and check it.

        Args:
            descriptor: Descriptor from :meth:`open`.
            name: Hook name, or ``token_rows``.
            chunk: Number of the chunk.
            out: Receives the bytes; its length is that of the chunk's images.

        Raises:
            ShardError: the bytes are not the bytes that were written.
        """
        images = self.chunk_images(chunk)
        start = self.offsets[name] + images.start * self.image_bytes(name)
        done = 0
        while done < len(out):
            count = os.preadv(descriptor, [out[done:]], start + done)
            if count == 0:
                raise ShardError(self.task.file, f"ends within chunk {chunk} of {name}. {_REMEDY}")
            done += count
        self._check_chunk(name, chunk, out)

    def tensor(self, name: str, images: range) -> Tensor:
        """Return consecutive images of a tensor, mapped from the file without copying.

        The first access to a chunk checks it.

        Raises:
            ShardError: the file or a chunk is damaged.
        """
        mapped = self._mapped()
        code, shape, size = tensor_shapes(self.plan, self.n_images)[name]
        if not len(images):
            return torch.empty((0, *shape[1:]), dtype=DTYPES[code])
        step = self.plan.images_per_chunk
        for chunk in range(images.start // step, (images.stop - 1) // step + 1):
            self._check_mapped(mapped, name, chunk)
        return torch.frombuffer(
            mapped,
            dtype=DTYPES[code],
            count=len(images) * prod(shape[1:]),
            offset=self.offsets[name] + images.start * prod(shape[1:]) * size,
        ).view(len(images), *shape[1:])

    def _mapped(self) -> mmap.mmap:
        """Return the mapped file; one that was changed since is mapped, and checked, anew."""
        if self._map is not None and self._version == self._version_on_disk():
            return self._map
        descriptor = self.open()
        try:
            self._version = _version(os.fstat(descriptor))
            self._checked.clear()
            # A private mapping: a caller's writes to the tensor never reach the file.
            self._map = mmap.mmap(descriptor, self.bytes, access=mmap.ACCESS_COPY)
        finally:
            os.close(descriptor)
        return self._map

    def _version_on_disk(self) -> tuple[int, ...]:
        try:
            return _version((self.folder / self.task.file).lstat())
        except OSError:
            return ()

    def check_there(self) -> None:
        """Check that the file is there and of its size, without reading it.

        Raises:
            ShardError: it is missing, a link, or of another size.
        """
        if self.remote is not None:
            return  # it is fetched, and then checked, when it is read
        path = self.folder / self.task.file
        try:
            found = path.lstat()
        except FileNotFoundError:
            found = None
        if found is None or not stat.S_ISREG(found.st_mode) or found.st_size != self.bytes:
            os.close(self._opened())  # which says what is wrong

    def _check_mapped(self, mapped: mmap.mmap, name: str, chunk: int) -> None:
        if (name, chunk) in self._checked:
            return
        images, size = self.chunk_images(chunk), self.image_bytes(name)
        start = self.offsets[name] + images.start * size
        with memoryview(mapped) as view, view[start : start + len(images) * size] as part:
            self._check_chunk(name, chunk, part)
        self._checked.add((name, chunk))

    def _check_chunk(self, name: str, chunk: int, content: memoryview) -> None:
        expected, found = self.record.checksums[name][chunk], checksum(content)
        if found != expected:
            images = self.chunk_images(chunk)
            raise ShardError(
                self.task.file,
                f"{name}, images {images.start} to {images.stop - 1}: expected checksum "
                f"{expected}, found {found}. {_REMEDY}",
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_map": None, "_checked": set(), "_version": ()}


def _version(found: os.stat_result) -> tuple[int, ...]:
    """Return what changes when a file is written to or replaced."""
    return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev


_REMEDY = (
    "vision-plugin verify lists all that is damaged; delete this shard and its .json, and run the "
    "same extraction again to mend the store"
)
