"""Images to pixels, batch by batch, in worker processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
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


@dataclass(frozen=True)
class BatchTask:
    """The images of one forward pass: some of a shard's."""

    shard: ShardTask
    start: int
    stop: int

    @property
    def last(self) -> bool:
        """Whether the shard ends with it."""
        return self.stop == self.shard.stop


@dataclass(frozen=True)
class DecodedBatch:
    """Pixels of the images that could be read, and the others with the reason."""

    task: BatchTask
    pixels: Float[Tensor, "good channels height width"] | None
    indices: list[int]
    labels: list[str] | None
    bad: list[BadImage]


class PixelBatches(Dataset[DecodedBatch | Exception]):
    """What workers do: decode and preprocess a batch. It depends on nothing but its numbers."""

    def __init__(self, source: ImageSource, processor: Any, tasks: Sequence[BatchTask]) -> None:
        self.source, self.processor, self.tasks = source, processor, tasks

    def __len__(self) -> int:
        return len(self.tasks)

    def __getitem__(self, number: int) -> DecodedBatch | Exception:
        """Pixels of one batch, or what went wrong: an error that a worker raises loses its type."""
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
        pixels = self.processor(images) if images else None
        return DecodedBatch(task, pixels, indices, labels, bad)


def batch_tasks(shards: Iterable[ShardTask], batch_size: int) -> list[BatchTask]:
    """Batches of shards: they never cross from one into the next."""
    return [
        BatchTask(shard, start, min(start + batch_size, shard.stop))
        for shard in shards
        for start in range(shard.start, shard.stop, batch_size)
    ]


def decode(
    source: ImageSource,
    processor: Any,
    tasks: Sequence[BatchTask],
    n_workers: int,
    *,
    yielding: bool = False,
) -> Iterator[DecodedBatch]:
    """Decode batches in order, ahead of their use.

    Args:
        source: The images.
        processor: Makes pixels of them.
        tasks: Which batches.
        n_workers: Processes that decode; none is this one.
        yielding: Let them have only the time that this process leaves. A model that shares the
            cores with them splits each of its operations over all cores and waits for the last one.

    Raises:
        ValueError: whatever the images or the preprocessing raise.
    """
    for batch in _batches(PixelBatches(source, processor, tasks), n_workers, yielding):
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _batches(
    batches: PixelBatches, n_workers: int, yielding: bool
) -> Iterable[DecodedBatch | Exception]:
    if n_workers == 0 or len(batches) == 0:
        return (batches[number] for number in range(len(batches)))
    if not batches.source.sequential:
        batches.source.labels  # noqa: B018  # read once here, not once per worker
    # Workers that are forked start at once and need no importable main module.
    start = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    return DataLoader(
        batches,
        batch_size=None,
        num_workers=min(n_workers, len(batches)),
        prefetch_factor=2,
        multiprocessing_context=start,
        worker_init_fn=partial(_begin, os.getpid(), yielding),
    )


def _begin(parent: int, yielding: bool, worker: int) -> None:
    """Set a worker process up."""
    del worker
    end_with(parent)
    if yielding and hasattr(os, "nice"):
        os.nice(19)


def end_with(parent: int) -> None:
    """End this worker process soon after its parent, however early that was killed.

    PyTorch's own watch takes whoever is the parent when it begins for the parent: a worker whose
    parent died just before would wait for work for ever.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def default_workers(source: ImageSource, on_gpu: bool) -> int:
    """Processes that keep the model fed: few beside a model on the CPU, many beside a GPU."""
    if source.sequential:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cores = cores or 1
    # Beside a model on the CPU they run when it waits for them: then all cores are theirs.
    wanted = cores - 1 if on_gpu else max(cores // 2, min(2, cores))
    return max(1, min(16, wanted))


def probe_pixels(processor: Any) -> Float[Tensor, "1 channels height width"]:
    """Pixels of an empty image, to see their shape."""
    from PIL import Image

    pixels: Tensor = processor([Image.new("RGB", (64, 64))])
    return pixels.to(torch.float32)
