"""What makes shards in any process, on any machine: an opened model and opened images."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vision_plugin._disk import tensor_bytes, unfinished
from vision_plugin.activations._config import ExtractionConfig
from vision_plugin.activations._decoding import DecodedBatch, default_workers
from vision_plugin.activations._errors import StoreMismatchError
from vision_plugin.activations._files import TEMPORARY, sha256, whole_file
from vision_plugin.activations._making import make_plan
from vision_plugin.activations._plan import ShardTask, StorePlan
from vision_plugin.activations._records import ShardRecord, read_marker
from vision_plugin.activations._running import ShardRunner
from vision_plugin.images import ImageSource, open_images
from vision_plugin.models import Harvester


@dataclass(frozen=True)
class ShardJob:
    """What another process needs to make shards of a store.

    Attributes:
        config: What to extract.
        plan: The plan of the store.

    Examples:
        >>> from pathlib import Path
        >>> cfg = vp.activations.ExtractionConfig(
        ...     model_name="demo", images="demo:8", hook_names=[hook], output_path="acts-of-workers"
        ... )
        >>> maker = vp.activations.ShardMaker(cfg, model=model)
        >>> plan = maker.plan()
        >>> job = vp.activations.ShardJob(cfg, plan, maker.probe(plan), Path("acts-of-workers"))
        >>> job.plan.n_shards
        1
    """

    config: ExtractionConfig
    plan: StorePlan
    probe: str
    """What :meth:`ShardMaker.probe` returned where the plan was made."""
    folder: Path
    """Folder of the store."""
    sign: str = ""
    """Name of a file in the folder, which those who share the folder see."""


class ShardMaker:
    """Makes shards of a store; the shards do not depend on the process that makes them.

    Args:
        config: What to extract.
        model: A bridge to use instead of ``config.model_name``.
        images: Anything that ``open_images`` takes, to use instead of ``config.images``.

    Raises:
        ValueError: the model or the images cannot be loaded.

    Examples:
        >>> cfg = vp.activations.ExtractionConfig(
        ...     model_name="demo", images="demo:8", hook_names=[hook], output_path="acts-of-workers"
        ... )
        >>> plan = vp.activations.ShardMaker(cfg, model=model).plan()
        >>> plan.n_images, plan.n_shards
        (8, 1)
    """

    def __init__(self, config: ExtractionConfig, *, model: Any = None, images: Any = None) -> None:
        self.config = config
        self.source: ImageSource = open_images(
            config.images if images is None else images,
            column=config.image_column,
            split=config.split,
            label_column=config.label_column,
            n_images=config.n_images,
            streaming=config.streaming,
        )
        self.model = _load(config) if model is None else model
        self._kept: ShardRunner | None = None

    def plan(self) -> StorePlan:
        """Return the plan of the store.

        Raises:
            ValueError: the model lacks the tokens, a hook or its preprocessing.
        """
        return make_plan(self.config, self.model, self.source)

    def check(self, plan: StorePlan, probe: str) -> None:
        """Raise unless this process would make the shards that another one plans.

        Args:
            plan: Plan of the store.
            probe: What :meth:`probe` returned where the plan was made.

        Raises:
            StoreMismatchError: the model or the images are others here, or give other numbers.
        """
        differences = plan.differences(self.plan())
        sized = [text for text in differences if not text.startswith("images_per_shard: ")]
        if sized:
            raise StoreMismatchError(
                f"this machine has another model or other images than the one that planned the "
                f"store: {'; '.join(sized)}. Give all machines the same files and packages"
            )
        if self.probe(plan) != probe:
            raise StoreMismatchError(
                "this machine's activations of a probe image are not, bit for bit, those of the "
                "machine that planned the store: use machines with the same processor or GPU and "
                "the same packages for one store"
            )

    def probe(self, plan: StorePlan) -> str:
        """Return the SHA-256 of the activations of a batch of noise, in the stored type."""
        noise = np.random.default_rng(0).integers(0, 256, (150, 150, 3), dtype=np.uint8)
        image: Any = self.model.image_processor([Image.fromarray(noise)])
        rows = torch.cat([image.roll(n, dims=-1) for n in range(min(plan.batch_size, 64))])
        found = Harvester(self.model, [spec.name for spec in plan.hooks])(
            rows.to(self.model.device, self.model.dtype)
        )
        digest = hashlib.sha256()
        for spec in plan.hooks:
            digest.update(tensor_bytes(found[spec.name].to(plan.torch_dtype)))
        return digest.hexdigest()

    def events(
        self, plan: StorePlan, tasks: Iterable[ShardTask], folder: Path
    ) -> Generator[DecodedBatch | ShardRecord, None, None]:
        """Make shards in order; yield each batch, and each record when its shard is complete.

        Raises:
            StoreFullError: there is no room for a shard.
            ValueError: some activations are not finite.
        """
        return self._runner(plan).run(tasks, folder)

    def make(self, plan: StorePlan, task: ShardTask, folder: Path) -> ShardRecord:
        """Make one shard and its marker in a folder.

        Calls for one plan share memory: make one shard at a time with a maker.
        """
        if self._kept is None or self._kept.plan != plan:
            self._kept = self._runner(plan)
        events = self._kept.run([task], folder)
        records = [event for event in events if isinstance(event, ShardRecord)]
        assert len(records) == 1
        return records[0]

    def _runner(self, plan: StorePlan) -> ShardRunner:
        return ShardRunner(plan, self.model, self.source, n_workers=self._n_workers())

    def _n_workers(self) -> int:
        if self.config.n_workers is None:
            return default_workers(self.source, self.model.device.type != "cpu")
        return min(self.config.n_workers, 1) if self.source.sequential else self.config.n_workers


def _load(config: ExtractionConfig) -> Any:
    from vision_plugin.models import load_model

    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load_model(
        config.model_name, pretrained=config.pretrained, device=device, revision=config.revision
    )


@contextmanager
def signed(folder: Path) -> Iterator[str]:
    """Yield the name of an empty file in a store, by which others see that they share its folder.

    The name is that of an unfinished file, so that the next extraction removes one that is left.
    """
    path = unfinished(folder / "plan.json", prefix=TEMPORARY)
    path.touch()
    try:
        yield path.name
    finally:
        path.unlink(missing_ok=True)


def receive(
    folder: Path, plan: StorePlan, task: ShardTask, shard: bytes, marker: bytes
) -> ShardRecord:
    """Write a shard that another machine made, then its marker.

    Args:
        folder: Folder of the store.
        plan: The plan of the store.
        task: The shard's task.
        shard: Bytes of the shard.
        marker: Bytes of its marker.

    Raises:
        StoreFullError: there is no room for the shard.
        StoreMismatchError: the shard changed on its way.

    Examples:
        >>> from pathlib import Path
        >>> cfg = vp.activations.ExtractionConfig(
        ...     model_name="demo", images="demo:8", hook_names=[hook], output_path="acts-here"
        ... )
        >>> maker = vp.activations.ShardMaker(cfg, model=model)
        >>> plan = maker.plan()
        >>> there, here = Path("made-there"), Path("received-here")
        >>> for folder in (there, here):
        ...     folder.mkdir()
        >>> _ = maker.make(plan, plan.task(0), there)
        >>> files = (plan.task(0).file, plan.task(0).marker)
        >>> made = [(there / name).read_bytes() for name in files]
        >>> vp.activations.receive(here, plan, plan.task(0), *made).n_images
        8
    """
    with whole_file(folder / task.file) as stream:
        stream.write(shard)
    with whole_file(folder / task.marker) as stream:
        stream.write(marker)
    record = read_marker(folder, plan, task)
    if sha256(shard) != record.sha256:
        (folder / task.marker).unlink()
        raise StoreMismatchError(f"{task.file} changed on its way here: run the same command again")
    return record
