"""Endless shuffled batches from a store, with bounded memory and a position that can be saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin.activations._errors import StoreMismatchError
from vision_plugin.activations._windows import ReadableStore, Window, WindowReader


@dataclass(frozen=True)
class Batch:
    """Activation vectors, with the image and the row that each comes from.

    Examples:
        >>> batch = store.batches(hook, 16).next_batch()
        >>> batch.activations[hook].shape, batch.images.shape, batch.rows.shape
        (torch.Size([16, 128]), torch.Size([16]), torch.Size([16]))
    """

    activations: dict[str, Float[Tensor, "batch d_in"]]
    """Vectors by hook name."""
    images: Int[Tensor, "batch"]
    """Number of the image in the store: ``store.ids[i]``, ``store.labels[i]``."""
    rows: Int[Tensor, "batch"]
    """Number of the row within the image: ``store.token_rows(i)[0, row]`` is its token."""


class ShuffledBatches:
    """An iterator over batches; ``ActivationStore.batches`` makes it.

    It puts the chunks of the store (a few consecutive images each) into a random order every
    epoch. It reads half a buffer of them at a time, and serves its rows in a random order
    while the other half is being read. A batch that begins in one half ends in the next.

    A batch of the stored type is a part of its half, not a copy: while you hold it, its values
    stay and the memory of that half is in use. Clone a batch that you keep.

    Args:
        store: What is read.
        hook_names: Hooks whose activations a batch has.
        batch_size: Vectors per batch.
        seed: Seed of the orders.
        n_batches_in_buffer: Batches that the buffer holds.
        dtype: Type of the batches.
        device: Device of the batches.

    Examples:
        >>> batches = store.batches(hook, 16, seed=0)
        >>> place = batches.state_dict()
        >>> first = batches.next_batch().activations[hook]
        >>> batches.load_state_dict(place)
        >>> torch.equal(batches.next_batch().activations[hook], first)
        True
        >>> batches.close()
    """

    def __init__(
        self,
        store: ReadableStore,
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
            raise ValueError(f"n_batches_in_buffer={n_batches_in_buffer}: use 2 or more")
        for shard in store.shards:
            shard.check_there()
        if len(store) == 0:
            raise ValueError(f"{store!r} holds no activations to make batches of")
        chunk_rows = max(s.plan.images_per_chunk for s in store.shards) * self._rows
        room = n_batches_in_buffer * batch_size // 2
        n_chunks = sum(shard.n_chunks for shard in store.shards)
        self._chunks_per_window = max(1, min(room // chunk_rows, n_chunks))
        self._epoch = self._number = self._offset = 0
        self._window: Window | None = None
        self._ahead: tuple[tuple[int, int], Window] | None = None
        self._reader = WindowReader(
            store,
            self.hook_names,
            rows_per_image=self._rows,
            chunks_per_window=self._chunks_per_window,
            seed=seed,
        )

    def _rows_per_image(self) -> int:
        if not self.hook_names:
            raise ValueError("name at least one hook")
        rows = {name: self.store.spec(name).rows_per_image for name in self.hook_names}
        if len(set(rows.values())) != 1:
            raise ValueError(f"these hooks differ in rows per image: {rows}. Read them apart")
        return next(iter(rows.values()))

    # ------------------------------------------------------------------ serving

    def __iter__(self) -> Iterator[Tensor | dict[str, Tensor]]:
        return self

    def __next__(self) -> Tensor | dict[str, Tensor]:
        """Return the next batch: [batch_size, d_in], or a dictionary of these by hook name."""
        found = self._vectors(self._next_parts())
        return found if self._single is None else found[self._single]

    def next_batch(self) -> Batch:
        """Return the next batch with its images and rows; batches never end.

        Raises:
            ShardError: a shard is missing or damaged.
        """
        parts = self._next_parts()
        return Batch(
            activations=self._vectors(parts),
            images=_joined([w.images[w.order[part] // self._rows] for w, part in parts]),
            rows=_joined([w.order[part] % self._rows for w, part in parts]),
        )

    def _vectors(self, parts: list[tuple[Window, slice]]) -> dict[str, Tensor]:
        return {
            name: _joined([window.activations[name][part] for window, part in parts]).to(
                device=self.device, dtype=self.dtype
            )
            for name in self.hook_names
        }

    def _next_parts(self) -> list[tuple[Window, slice]]:
        """Return the windows that hold the next batch, and the rows to take from each."""
        place = (self._epoch, self._number, self._offset, self._window)
        try:
            return self._take()
        except BaseException:
            self._epoch, self._number, self._offset, self._window = place
            raise

    def _take(self) -> list[tuple[Window, slice]]:
        if self._offset:
            # Only now: the last half's memory is free once its last batch is released.
            self._read_ahead()
        parts: list[tuple[Window, slice]] = []
        missing = self.batch_size
        while missing:
            window = self._current()
            part = slice(self._offset, min(self._offset + missing, len(window)))
            parts.append((window, part))
            missing -= part.stop - part.start
            self._offset = part.stop
            if self._offset == len(window):
                self._turn()
        return parts

    def _current(self) -> Window:
        if self._window is None:
            place = (self._epoch, self._number)
            ahead, self._ahead = self._ahead, None
            if ahead is None or ahead[0] != place:
                ahead = (place, self._reader.begin(*place))
            ahead[1].wait()
            self._window = ahead[1]
            if len(self._window) < 2 * self.batch_size:
                self._read_ahead()
        return self._window

    def _read_ahead(self) -> None:
        following = self._following()
        if self._ahead is None or self._ahead[0] != following:
            self._ahead = (following, self._reader.begin(*following))

    def _turn(self) -> None:
        self._epoch, self._number = self._following()
        self._offset, self._window = 0, None

    def _following(self) -> tuple[int, int]:
        if self._number + 1 < self._reader.n_windows:
            return self._epoch, self._number + 1
        return self._epoch + 1, 0

    # ------------------------------------------------------------------ the position

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch, as JSON values."""
        return {
            **self._identity(),
            "epoch": self._epoch,
            "window": self._number,
            "row": self._offset,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position from :meth:`state_dict`; the batches from there on are the same.

        Raises:
            StoreMismatchError: the position belongs to another store, seed, batch or buffer size.
        """
        wrong = [
            f"{name}: {state.get(name)!r} saved, {value!r} here"
            for name, value in self._identity().items()
            if state.get(name) != value
        ]
        if wrong:
            raise StoreMismatchError(f"the saved position is of other batches: {'; '.join(wrong)}")
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
        self._reader.close()


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
