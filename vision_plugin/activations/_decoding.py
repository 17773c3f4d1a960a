"""Decode images to pixels, batch by batch, in worker processes."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vision_plugin.activations._plan import ShardTask
from vision_plugin.activations._records import BadImage
from vision_plugin.images import BadImageError, ImageSource

_WATCH_SECONDS = 1.0
_LONGEST_TEMPORARY_FOLDER = 70
"""Bytes in the path of the temporary folder that leave room for a socket's name (of 104 in all)."""


@dataclass(frozen=True)
class BatchTask:
    """The images of one forward pass, all from one shard."""

    shard: ShardTask
    start: int
    stop: int

    @property
    def last(self) -> bool:
        """Whether this is the shard's last batch."""
        return self.stop == self.shard.stop


@dataclass(frozen=True)
class DecodedBatch:
    """Pixels of the readable images, and the reasons why others cannot be read."""

    task: BatchTask
    pixels: Float[Tensor, "good channels height width"] | None
    indices: list[int]
    labels: list[str] | None
    bad: list[BadImage]


class PixelBatches(Dataset[DecodedBatch | Exception]):
    """Decoded batches for worker processes; a batch depends on its number alone."""

    def __init__(
        self, source: ImageSource, image_processor: Any, tasks: Sequence[BatchTask]
    ) -> None:
        self.source, self.image_processor, self.tasks = source, image_processor, tasks

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, number: int) -> DecodedBatch | Exception:
        """Return a batch or its error; an error that a worker raises would lose its type."""
        try:
            return self._decoded(self.tasks[number])
        except Exception as error:
            return error

    def _decoded(self, task: BatchTask) -> DecodedBatch:
        images, indices, bad = [], [], []
        labels: list[str] | None = None if self.source.label_column is None else []
        for index in range(task.start, task.stop):
            try:
                images.append(self.source[index])
            except BadImageError as error:
                bad.append(BadImage(index, error.id, error.reason))
                continue
            indices.append(index)
            if labels is not None:
                labels.append(self.source.label(index) or "")
        pixels = self.image_processor(images) if images else None
        return DecodedBatch(task, pixels, indices, labels, bad)


def batch_tasks(shards: Iterable[ShardTask], batch_size: int) -> list[BatchTask]:
    """Return the batches of shards; no batch spans two shards."""
    return [
        BatchTask(shard, start, min(start + batch_size, shard.stop))
        for shard in shards
        for start in range(shard.start, shard.stop, batch_size)
    ]


def decode(
    source: ImageSource,
    image_processor: Any,
    tasks: Sequence[BatchTask],
    n_workers: int,
    *,
    yielding: bool = False,
) -> Iterator[DecodedBatch]:
    """Decode batches in order, ahead of their use.

    Args:
        source: Images to decode.
        image_processor: Turns images into pixels.
        tasks: Batches to decode.
        n_workers: Processes that decode; 0 decodes in this process.
        yielding: Give workers only the time that this process leaves over. A model on the same
            cores splits each operation over all of them and waits for the slowest.

    Raises:
        ValueError: the images or the preprocessing raise it.
    """
    for batch in _batches(PixelBatches(source, image_processor, tasks), n_workers, yielding):
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _batches(
    batches: PixelBatches, n_workers: int, yielding: bool
) -> Iterable[DecodedBatch | Exception]:
    if n_workers == 0 or len(batches) == 0 or not _workers_can_send():
        return (batches[number] for number in range(len(batches)))
    if not batches.source.sequential:
        batches.source.labels  # noqa: B018  # read once here, not once per worker
    # Forked workers start at once and need no importable main module.
    start = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=min(n_workers, len(batches)),
        prefetch_factor=2,
        multiprocessing_context=start,
        worker_init_fn=partial(_begin, os.getpid(), yielding),
    )


def _workers_can_send() -> bool:
    """Whether workers can pass tensors on; where not, this warns.

    They do it over a socket in the temporary folder. Where its path is too long for a socket,
    Python drops the tensor with a message on stderr, and whoever waits for it waits for ever.
    """
    folder = tempfile.gettempdir()
    fits = len(os.fsencode(folder)) <= _LONGEST_TEMPORARY_FOLDER
    if not fits:
        warnings.warn(
            f"Images are decoded without worker processes, which is slower: the path of the "
            f"temporary folder, {folder}, is too long for them. Set the environment variable "
            "TMPDIR to a folder with a shorter path.",
            RuntimeWarning,
            stacklevel=2,
        )
    return fits


def _begin(parent: int, yielding: bool, worker: int) -> None:
    """Set up a worker process."""
    del worker
    end_with(parent)
    if yielding and hasattr(os, "nice"):
        os.nice(19)


def end_with(parent: int) -> None:
    """End this worker process soon after its parent ends, even if that happened before.

    PyTorch's own watch takes the process's parent at its start. A worker whose parent died just
    before that would wait for work for ever.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def default_workers(source: ImageSource, on_gpu: bool) -> int:
    """Return how many processes keep the model busy: few beside a CPU model, many beside a GPU."""
    if source.sequential:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    # Beside a model on the CPU they run while it waits for them, so they may use all cores.
    wanted = cores - 1 if on_gpu else max(cores // 2, min(2, cores))
    return max(1, min(16, wanted))


def probe_pixels(image_processor: Any) -> Float[Tensor, "1 channels height width"]:
    """Return the pixels of an empty image, which show the shape."""
    from PIL import Image

    pixels: Tensor = image_processor([Image.new("RGB", (64, 64))])
    return pixels.to(torch.float32)
