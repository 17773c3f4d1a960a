"""Run shard tasks: images go through the model, and shards are written one after another."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vision_plugin._allocator import freed_memory_kept
from vision_plugin.activations._decoding import DecodedBatch, batch_tasks, decode
from vision_plugin.activations._making import by_rows, selected_rows
from vision_plugin.activations._plan import ShardTask, StorePlan
from vision_plugin.activations._records import TOKEN_ROWS, BadImage, ShardRecord, tensor_shapes
from vision_plugin.activations._shards import complete_shard
from vision_plugin.images import ImageSource
from vision_plugin.models import Harvester

logger = logging.getLogger(__name__)


class ShardRunner:
    """Runs shard tasks. What one run allocates serves the next, so runs take turns.

    Args:
        plan: Plan of the store.
        model: The bridge that the plan was made for.
        source: The images that the plan was made for.
        n_workers: Processes that decode images; 0 decodes in this process.
    """

    def __init__(
        self, plan: StorePlan, model: Any, source: ImageSource, *, n_workers: int = 0
    ) -> None:
        self.plan, self.model, self.source, self.n_workers = plan, model, source, n_workers
        self._shards = [_ShardBuffers(plan), _ShardBuffers(plan)]
        self._forward = _Forward(plan, model)

    def run(
        self, tasks: Iterable[ShardTask], folder: Path
    ) -> Generator[DecodedBatch | ShardRecord, None, None]:
        """Run shard tasks in the order given.

        Each task writes its shard and then its marker. Tasks do not depend on each other, on the
        order or on the process: a task that runs again gives the same bytes.

        Args:
            tasks: Shards to make.
            folder: Folder of the store.

        Yields:
            Each batch after its forward pass, and each shard's record when the shard is complete.

        Raises:
            StoreFullError: there is no room for a shard.
            ValueError: some activations are not finite.
        """
        pending, source = batch_tasks(tasks, self.plan.batch_size), self.source
        shards = self._shards
        for shard in shards:
            shard.clear()  # an earlier run may have failed
        writing: Future[ShardRecord] | None = None
        decoded = decode(
            source,
            self.model.image_processor,
            pending,
            self.n_workers,
            yielding=self.model.device.type == "cpu",
        )
        with (
            ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as writer,
            freed_memory_kept(),
        ):
            for batch in decoded:
                shards[0].add(batch, self._forward(batch, source))
                yield batch
                if batch.task.last:
                    if writing is not None:
                        yield writing.result()
                    writing = writer.submit(shards[0].write, folder, batch.task.shard, source.ids)
                    shards.reverse()
                    shards[0].clear()
            if writing is not None:
                yield writing.result()


class _Forward:
    """Harvests the selected tokens of a batch."""

    def __init__(self, plan: StorePlan, model: Any) -> None:
        self.plan, self.model = plan, model
        self.harvester = Harvester(model, [spec.name for spec in plan.hooks])
        self.layout = model.token_layout(plan.image_size)

    def __call__(self, batch: DecodedBatch, source: ImageSource) -> dict[str, Tensor]:
        """Return [good, rows, d_in] per hook, and the token rows where they are random."""
        if batch.pixels is None:
            return {}
        harvested = self.harvester(batch.pixels.to(self.model.device, self.model.dtype))
        rows = selected_rows(self.plan, self.layout, batch.indices)
        found = {TOKEN_ROWS: rows.to(torch.int32)} if self.plan.tokens.random else {}
        for spec in self.plan.hooks:
            activation = by_rows(harvested[spec.name])
            if spec.per_token and self.plan.tokens.selection != "all":
                picked = torch.arange(len(rows))[:, None]
                activation = activation[picked, rows.to(activation.device)]
            found[spec.name] = self._checked(activation, spec.name, batch, source)
        return found

    def _checked(
        self, activation: Tensor, name: str, batch: DecodedBatch, source: ImageSource
    ) -> Tensor:
        stored = activation.to(self.plan.torch_dtype)
        if bool(torch.isfinite(stored).all()):
            return stored
        broken = ~torch.isfinite(stored).flatten(1).all(dim=1)
        ids = [source.ids[batch.indices[i]] for i in broken.nonzero().flatten().tolist()]
        advice = (
            f"{self.plan.dtype} cannot hold them: use bfloat16 or float32"
            if bool(torch.isfinite(activation).all())
            else "Check the model's weights and dtype"
        )
        raise ValueError(
            f"{len(ids)} images ({', '.join(ids[:3])}, ...) have activations at {name} of "
            f"{self.plan.model.name} that are not finite. {advice}"
        )


class _ShardBuffers:
    """The shard that is being filled; its memory is reused for every shard."""

    def __init__(self, plan: StorePlan) -> None:
        self.plan = plan
        self._room = {}
        if plan.n_images:
            size = min(plan.images_per_shard, plan.n_images)
            dtypes = {TOKEN_ROWS: torch.int32}
            self._room = {
                name: torch.empty(shape, dtype=dtypes.get(name, plan.torch_dtype))
                for name, (_, shape, _) in tensor_shapes(plan, size).items()
            }
        self.clear()

    def clear(self) -> None:
        """Begin the next shard."""
        self._indices: list[int] = []
        self._labels: list[str] | None = None
        self._bad: list[BadImage] = []

    def add(self, batch: DecodedBatch, activations: dict[str, Tensor]) -> None:
        """Append a batch."""
        filled = len(self._indices)
        for name, tensor in activations.items():
            self._room[name][filled : filled + len(tensor)].copy_(tensor)
        self._indices += batch.indices
        self._bad += batch.bad
        if batch.labels is not None:
            self._labels = [*(self._labels or []), *batch.labels]

    def write(self, folder: Path, task: ShardTask, ids: list[str]) -> ShardRecord:
        """Write the shard, then its marker."""
        n_images = len(self._indices)
        return complete_shard(
            folder,
            self.plan,
            task,
            {name: tensor[:n_images] for name, tensor in self._room.items()},
            ids=[ids[index] for index in self._indices],
            labels=self._labels,
            bad=self._bad,
        )
