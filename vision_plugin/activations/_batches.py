"""Endless shuffled batches from a store, with bounded memory and a place that can be saved."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin.activations._errors import StoreMismatchError

if TYPE_CHECKING:
    from vision_plugin.activations._shards import Shard
    from vision_plugin.activations._store import ActivationStore

MAX_OPEN_FILES = 64


@dataclass(frozen=True)
class Batch:
    """Vectors with where each comes from."""

    activations: dict[str, Float[Tensor, "batch d_in"]]
    """By hook name."""
    images: Int[Tensor, "batch"]
    """Number of the picture in the store: ``store.ids[i]``, ``store.labels[i]``."""
    rows: Int[Tensor, "batch"]
    """Number of the row within the picture: ``store.token_rows(i)[0, row]`` is its token."""


@dataclass
class _Window:
    """Chunks that are in memory together, and the order in which their rows are served."""

    activations: dict[str, Tensor]
    images: Tensor
    order: Tensor


class ShuffledBatches:
    """An iterator over batches; made by ``ActivationStore.batches``.

    The chunks of the store (a few consecutive pictures each) are put into a random order every
    epoch. Half a buffer of them is read at a time, and its rows are served in a random order,
    while the other half is being read. A batch that begins in one half ends in the next.
    """

    def __init__(
        self,
        store: ActivationStore,
        hook_names: str | Sequence[str],
        batch_size: int,
        *,
        seed: int,
        n_batches_in_buffer: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.store = store
        self._single = hook_names if isinstance(hook_names, str) else None
        self.hook_names = [hook_names] if isinstance(hook_names, str) else list(hook_names)
        self.batch_size, self.seed = batch_size, seed
        self.dtype, self.device = dtype, device
        self._rows = self._rows_per_image()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: use a whole number from 1 up")
        if n_batches_in_buffer < 2:
            raise ValueError(f"n_batches_in_buffer={n_batches_in_buffer}: at least 2 are needed")
        if len(store) == 0:
            raise ValueError(f"{store!r} holds no activations to make batches of")
        self._chunks = [
            (number, chunk)
            for number, shard in enumerate(store.shards)
            for chunk in range(shard.n_chunks)
        ]
        chunk_rows = max(s.plan.images_per_chunk for s in store.shards) * self._rows
        room = n_batches_in_buffer * batch_size // 2
        self._chunks_per_window = max(1, min(room // chunk_rows, len(self._chunks)))
        self._epoch = self._number = self._offset = 0
        self._window: _Window | None = None
        self._ahead: tuple[tuple[int, int], Future[_Window]] | None = None
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="activation-reader")
        self._files = _OpenShards()

    def _rows_per_image(self) -> int:
        if not self.hook_names:
            raise ValueError("name at least one hook")
        rows = {name: self.store.spec(name).rows_per_image for name in self.hook_names}
        if len(set(rows.values())) != 1:
            raise ValueError(f"these hooks differ in rows per picture: {rows}. Read them apart")
        return next(iter(rows.values()))

    # ------------------------------------------------------------------ serving

    def __iter__(self) -> Iterator[Tensor | dict[str, Tensor]]:
        return self

    def __next__(self) -> Tensor | dict[str, Tensor]:
        """The next batch: [batch_size, d_in], or a dictionary of such by hook name."""
        found = self.next_batch().activations
        return found if self._single is None else found[self._single]

    def next_batch(self) -> Batch:
        """The next batch with its pictures and rows; there always is one.

        Raises:
            ShardError: a shard is missing or damaged.
        """
        parts: list[tuple[_Window, Tensor]] = []
        missing = self.batch_size
        while missing:
            window = self._current()
            rows = window.order[self._offset : self._offset + missing]
            parts.append((window, rows))
            missing -= len(rows)
            self._offset += len(rows)
            if self._offset == len(window.order):
                self._turn()
        images = torch.cat([window.images[rows // self._rows] for window, rows in parts])
        return Batch(
            activations={
                name: self._gathered([(w.activations[name], rows) for w, rows in parts])
                for name in self.hook_names
            },
            images=images,
            rows=torch.cat([rows % self._rows for _, rows in parts]),
        )

    def _gathered(self, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        if len(parts) == 1:
            batch = parts[0][0].index_select(0, parts[0][1])
        else:
            batch = torch.cat([rows.index_select(0, chosen) for rows, chosen in parts])
        return batch.to(device=self.device, dtype=self.dtype)

    def _current(self) -> _Window:
        if self._window is None:
            place = (self._epoch, self._number)
            if self._ahead is not None and self._ahead[0] == place:
                self._window = self._ahead[1].result()
            else:
                self._window = self._reader.submit(self._read, *place).result()
            following = self._following()
            self._ahead = (following, self._reader.submit(self._read, *following))
        return self._window

    def _turn(self) -> None:
        self._epoch, self._number = self._following()
        self._offset, self._window = 0, None

    def _following(self) -> tuple[int, int]:
        n_windows = -(-len(self._chunks) // self._chunks_per_window)
        if self._number + 1 < n_windows:
            return self._epoch, self._number + 1
        return self._epoch + 1, 0

    # ------------------------------------------------------------------ reading

    def _read(self, epoch: int, number: int) -> _Window:
        """Read one window; only ever in the reader's thread."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self._chunks))
        size = self._chunks_per_window
        chosen = [self._chunks[i] for i in order[number * size : (number + 1) * size]]
        chosen.sort()  # the rows are shuffled below, so the disk may be read in its own order
        shards = self.store.shards
        images = [shards[shard].chunk_images(chunk) for shard, chunk in chosen]
        n_images = sum(map(len, images))
        activations = {}
        for name in self.hook_names:
            spec = self.store.spec(name)
            room = torch.empty(
                (n_images, spec.rows_per_image, spec.d_in), dtype=self.store.plan.torch_dtype
            )
            filled = 0
            for (shard, chunk), held in zip(chosen, images, strict=True):
                part = room[filled : filled + len(held)]
                descriptor = self._files.descriptor(shards[shard])
                shards[shard].read_chunk(descriptor, name, chunk, part)
                filled += len(held)
            activations[name] = room.flatten(0, 1)
        starts = self.store._starts
        numbers = [
            starts[shard] + image
            for (shard, _), held in zip(chosen, images, strict=True)
            for image in held
        ]
        rows = np.random.default_rng([self.seed, epoch, number]).permutation(n_images * self._rows)
        return _Window(activations, torch.tensor(numbers), torch.from_numpy(rows))

    # ------------------------------------------------------------------ the place

    def state_dict(self) -> dict[str, Any]:
        """The place of the next batch, as JSON values."""
        return {
            **self._identity(),
            "epoch": self._epoch,
            "window": self._number,
            "row": self._offset,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place that :meth:`state_dict` gave; the batches from there on are the same.

        Raises:
            StoreMismatchError: it belongs to another store, seed, batch or buffer size.
        """
        wrong = [
            f"{name}: {state.get(name)!r} saved, {value!r} here"
            for name, value in self._identity().items()
            if state.get(name) != value
        ]
        if wrong:
            raise StoreMismatchError(f"the saved place is of other batches: {'; '.join(wrong)}")
        self._epoch, self._number = int(state["epoch"]), int(state["window"])
        self._offset, self._window = int(state["row"]), None

    def _identity(self) -> dict[str, Any]:
        return {
            "store": self.store.fingerprint,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "chunks_per_window": self._chunks_per_window,
        }

    def close(self) -> None:
        """Stop reading ahead and close the files."""
        self._reader.shutdown(wait=True, cancel_futures=True)
        self._files.close()


class _OpenShards:
    """Descriptors of the shards that were read last."""

    def __init__(self) -> None:
        self._open: OrderedDict[int, int] = OrderedDict()

    def descriptor(self, shard: Shard) -> int:
        """The shard's descriptor; opening it checks its size and header."""
        key = id(shard)
        if key not in self._open:
            self._open[key] = shard.open()
            while len(self._open) > MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        self._open.move_to_end(key)
        return self._open[key]

    def close(self) -> None:
        """Close all."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __del__(self) -> None:
        self.close()
