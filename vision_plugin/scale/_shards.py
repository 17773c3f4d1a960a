"""What a worker does for an extraction: it makes one shard. The model stays for the next."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vision_plugin._allocator import freed_memory_kept
from vision_plugin.scale._versions import Home

_kept: dict[str, Any] = {}
"""The maker of this process, by its plan: the model is loaded once in a process."""
_open = ExitStack()
"""What stays open between the tasks of one plan."""


@dataclass(frozen=True)
class ShardWork:
    """One shard of a job. Its name is its number: two of one number are the same work."""

    index: int
    job: Any
    home: Home
    cores: int

    def __hash__(self) -> int:
        return hash(self.index)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ShardWork) and other.index == self.index

    def __str__(self) -> str:
        return f"shard {self.index}"


@dataclass(frozen=True)
class PlanWork:
    """An extraction to plan."""

    config: Any
    home: Home

    def __hash__(self) -> int:
        return 0

    def __str__(self) -> str:
        return "of the plan"


def plan_there(work: PlanWork) -> tuple[Any, str]:
    """Return the plan of an extraction, and the hash of a probe, as a worker makes them.

    Raises:
        ValueError: the images are a stream, or the model or the images cannot be loaded.
    """
    work.home.settle()
    from vision_plugin.activations import ShardMaker

    config = work.config
    maker = ShardMaker(config)
    if maker.source.sequential:
        raise ValueError(
            f"{config.images} is a stream, which has to be read from its front: an engine needs "
            "images that every machine can open anywhere, without streaming="
        )
    plan = maker.plan()
    return plan, maker.probe(plan)


def make_shard(work: ShardWork) -> Any:
    """Make a shard in the store's place, or return its bytes where the folder is not shared.

    Returns:
        The record where the shard is in its place; else the bytes of the shard and its marker.
    """
    work.home.settle()
    from vision_plugin.activations import RemoteFolder, is_url

    job = work.job
    maker = _maker(work)
    task = job.plan.task(work.index)
    if not is_url(job.config.output_path) and (Path(job.folder) / job.sign).is_file():
        return maker.make(job.plan, task, Path(job.folder))
    with tempfile.TemporaryDirectory(prefix="vision-plugin-shard-") as name:
        folder = Path(name)
        record = maker.make(job.plan, task, folder)
        if is_url(job.config.output_path):
            RemoteFolder(job.config.output_path).publish(folder, task)
            return record
        return (folder / task.file).read_bytes(), (folder / task.marker).read_bytes()


def _maker(work: ShardWork) -> Any:
    from vision_plugin.activations import ShardMaker

    plan = work.job.plan
    if plan.sha256 not in _kept:
        import torch

        torch.set_num_threads(work.cores)
        config = work.job.config
        if config.n_workers is None:  # a slot has a core for the model, and decodes on it too
            config = replace(config, n_workers=0 if work.cores == 1 else work.cores)
        maker = ShardMaker(config)
        maker.check(plan, work.job.probe)
        _kept.clear()
        _kept[plan.sha256] = maker
        _open.close()
        _open.enter_context(freed_memory_kept())
    return _kept[plan.sha256]
