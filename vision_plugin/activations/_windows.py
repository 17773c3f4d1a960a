"""Read random parts of a store into memory, in the order in which their rows are served."""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vision_plugin.activations._plan import HookSpec, StorePlan
from vision_plugin.activations._shards import Shard

MAX_OPEN_FILES = 200
"""Open files per reader: a window touches hundreds of a large store's shards."""
N_READERS = 2
"""Threads that read one window together."""


@dataclass(frozen=True)
class Window:
    """Chunks that are in memory together."""

    activations: dict[str, Tensor]
    """Activations by hook, [rows, d_in], in the order in which they are served."""
    images: Tensor
    """Numbers of the window's images in the store."""
    order: Tensor
    """Row of the window, counted image by image, that is served at each place."""
    reads: list[Future[None]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.order)

    def wait(self) -> None:
        """Wait until the window is read.

        Raises:
            ShardError: a shard is missing or damaged.
        """
        for read in self.reads:
            read.result()


@dataclass(frozen=True)
class _Piece:
    """A chunk of a window."""

    shard: int
    chunk: int
    images: range
    """Images within the shard."""
    row: int
    """First row of the chunk in the window, before shuffling."""


class ReadableStore(ABC):
    """The parts of a store that windows and batches use."""

    plan: StorePlan
    """Plan that the store was made with."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @property
    @abstractmethod
    def ids(self) -> Sequence[str]:
        """Ids of the images."""

    @property
    @abstractmethod
    def shards(self) -> Sequence[Shard]:
        """The shards, in order."""

    @property
    @abstractmethod
    def starts(self) -> list[int]:
        """Number of the first image of each shard, then the number of images."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash that identifies the store's contents."""

    @abstractmethod
    def spec(self, hook_name: str) -> HookSpec:
        """Return name and shape of a hook's activations."""


class WindowReader:
    """Reads windows in its own threads.

    It reads a chunk into a small buffer, checks it there, and writes its rows straight to the
    places where they are served, while the processor's cache still holds them.
    """

    def __init__(
        self,
        store: ReadableStore,
        hook_names: Sequence[str],
        *,
        rows_per_image: int,
        chunks_per_window: int,
        seed: int,
    ) -> None:
        self.store, self.hook_names, self.seed = store, hook_names, seed
        self.rows_per_image, self.chunks_per_window = rows_per_image, chunks_per_window
        self._shards = store.shards
        self._first_chunks = np.cumsum([0, *(shard.n_chunks for shard in self._shards)])
        self._order = (-1, np.empty(0, dtype=np.int64))
        self._closed = False
        self._memories = {name: _Memories() for name in hook_names}
        self._readers = [
            (ThreadPoolExecutor(1, thread_name_prefix="activation-reader"), _OpenShards())
            for _ in range(N_READERS)
        ]

    @property
    def n_windows(self) -> int:
        """Number of windows in an epoch."""
        return -(-int(self._first_chunks[-1]) // self.chunks_per_window)

    def begin(self, epoch: int, number: int) -> Window:
        """Start to read a window; :meth:`Window.wait` waits for the end."""
        pieces = self._pieces(epoch, number)
        n_images = sum(len(piece.images) for piece in pieces)
        random = np.random.default_rng([self.seed, epoch, number])
        order = random.permutation(n_images * self.rows_per_image)
        places = np.empty_like(order)
        places[order] = np.arange(len(order))
        window = Window(
            {name: self._room(name, len(order)) for name in self.hook_names},
            torch.from_numpy(np.concatenate([self._numbers(piece) for piece in pieces])),
            torch.from_numpy(order),
        )
        share = -(-len(pieces) // N_READERS)
        for number_of_reader, (reader, files) in enumerate(self._readers):
            part = pieces[number_of_reader * share : (number_of_reader + 1) * share]
            window.reads.append(reader.submit(self._fill, window, part, places, files))
        return window

    def _pieces(self, epoch: int, number: int) -> list[_Piece]:
        if self._order[0] != epoch:
            random = np.random.default_rng([self.seed, epoch])
            self._order = (epoch, random.permutation(int(self._first_chunks[-1])))
        size = self.chunks_per_window
        # The rows are shuffled anyway, so the chunks may be read in the order on the disk.
        chosen = np.sort(self._order[1][number * size : (number + 1) * size])
        shards = np.searchsorted(self._first_chunks, chosen, side="right") - 1
        chunks = chosen - self._first_chunks[shards]
        pieces, row = [], 0
        for shard, chunk in zip(shards.tolist(), chunks.tolist(), strict=True):
            images = self._shards[shard].chunk_images(chunk)
            pieces.append(_Piece(shard, chunk, images, row))
            row += len(images) * self.rows_per_image
        return pieces

    def _numbers(self, piece: _Piece) -> Any:
        start = self.store.starts[piece.shard]
        return np.arange(start + piece.images.start, start + piece.images.stop)

    def _room(self, name: str, n_rows: int) -> Tensor:
        """Return an empty [n_rows, d_in] of the stored type."""
        spec, plan = self.store.spec(name), self.store.plan
        row_bytes = spec.d_in * plan.torch_dtype.itemsize
        most_images = max(min(s.plan.images_per_chunk, s.n_images) for s in self._shards)
        most = self.chunks_per_window * most_images * self.rows_per_image * row_bytes
        room = self._memories[name].take(n_rows * row_bytes, most)
        return room.view(plan.torch_dtype).view(n_rows, spec.d_in)

    def _fill(self, window: Window, pieces: list[_Piece], places: Any, files: _OpenShards) -> None:
        """Read some of a window's chunks, in a reader's thread."""
        scratch: Any = np.empty(0, dtype=np.uint8)
        rooms = {name: _whole_rows(room) for name, room in window.activations.items()}
        for piece in pieces:
            if self._closed:
                return
            shard = self._shards[piece.shard]
            descriptor = files.descriptor(shard)
            for name, room in rooms.items():
                n_bytes = len(piece.images) * shard.image_bytes(name)
                if len(scratch) < n_bytes:
                    scratch = np.empty(n_bytes, dtype=np.uint8)
                content = scratch[:n_bytes]
                shard.read_chunk(descriptor, name, piece.chunk, memoryview(content))
                rows = content.view(room.dtype)
                # Unlike an assignment, this lets the other threads run.
                np.put(room, places[piece.row : piece.row + len(rows)], rows)

    def close(self) -> None:
        """Stop reading, even within a window, and close the files."""
        self._closed = True
        for reader, files in self._readers:
            reader.shutdown(wait=True, cancel_futures=True)
            files.close()


def _whole_rows(room: Tensor) -> Any:
    """Return a tensor's rows as an array of untyped values that shares its memory."""
    kind = np.dtype((np.void, room.shape[1] * room.itemsize))
    return room.view(torch.uint8).numpy().reshape(-1).view(kind)


class _Memories:
    """Memory that one window after another reuses, so that the system need not clear new pages.

    It is free again once no tensor uses it, and no batch that a caller holds.
    """

    def __init__(self) -> None:
        self._free: deque[Any] = deque(maxlen=2)

    def take(self, n_bytes: int, most: int) -> Tensor:
        """Return ``n_bytes`` of memory from a block with room for ``most``."""
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(most, dtype=np.uint8)
        held = memory[:n_bytes]
        weakref.finalize(held, self._free.append, memory).atexit = False
        return torch.from_numpy(held)


class _OpenShards:
    """Descriptors of the shards that were read last."""

    def __init__(self) -> None:
        self._open: OrderedDict[int, int] = OrderedDict()
        self.close = weakref.finalize(self, _close, self._open)

    def descriptor(self, shard: Shard) -> int:
        """Return the shard's descriptor; opening it checks its size and header."""
        key = id(shard)
        if key not in self._open:
            self._open[key] = shard.open()
            while len(self._open) > MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(key)
        return self._open[key]


def _close(descriptors: OrderedDict[int, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
