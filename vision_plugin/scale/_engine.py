"""The engine ``ray``: it runs the tasks of an extraction, a sweep or an evaluation on a cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any

from vision_plugin.activations import (
    ExtractionConfig,
    ShardJob,
    ShardRecord,
    ShardTask,
    StorePlan,
    receive,
)
from vision_plugin.evaluation import EvaluationConfig
from vision_plugin.sae import VisionSAERunnerConfig
from vision_plugin.scale._cluster import ClusterError, connected
from vision_plugin.scale._groups import train_groups
from vision_plugin.scale._ranges import RangeWork, score_range
from vision_plugin.scale._ray_train import TeamWork, train_workers
from vision_plugin.scale._shards import PlanWork, ShardWork, make_shard, plan_there
from vision_plugin.scale._spread import Slot, spread
from vision_plugin.scale._train import Split
from vision_plugin.scale._versions import Home


class RayEngine:
    """Runs tasks on a Ray cluster. Use it in a ``with`` block, which connects and disconnects.

    Args:
        address: ``HOST:PORT`` of the head of a running cluster; ``auto`` for the one on this
            machine or in ``RAY_ADDRESS``; None starts one of this machine alone.
        cores: Cores of a task on machines without GPUs. A task on a GPU takes a whole one.
        dashboard: Whether a cluster that is started here opens Ray's dashboard.
        **settings: Arguments of ``ray.init`` for a cluster that is started here, such as
            ``num_cpus`` and ``object_store_memory``.

    Raises:
        ClusterError: on entering: no cluster answers, or it refuses this process.
        ImportError: on entering: Ray is not installed.

    Examples:
        >>> cfg = vp.activations.ExtractionConfig(
        ...     model_name="demo", images="demo:8", hook_names=[hook], output_path="acts-by-ray"
        ... )
        >>> with vp.scale.RayEngine(num_cpus=1) as engine:
        ...     store = vp.extract(cfg, engine=engine)
        >>> len(store.ids)
        8
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        cores: int = 1,
        dashboard: bool = False,
        **settings: Any,
    ) -> None:
        if cores < 1:
            raise ValueError(f"cores={cores}: a task takes at least one core")
        self.address, self.cores, self.dashboard = address, cores, dashboard
        self.settings = settings
        self._stack = contextlib.ExitStack()
        self._ray: Any = None

    def __enter__(self) -> RayEngine:
        link = connected(self.address, dashboard=self.dashboard, **self.settings)
        self._ray = self._stack.enter_context(link)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ray = None
        self._stack.close()

    @property
    def ray(self) -> Any:
        """The connected module ``ray``.

        Raises:
            ClusterError: the engine is used outside its ``with`` block.
        """
        if self._ray is None:
            raise ClusterError("the engine is not connected: use it in a with block")
        return self._ray

    def plan(self, config: ExtractionConfig) -> tuple[StorePlan, str]:
        """Return the plan of an extraction and the hash of a probe, both made by a worker."""
        config, slot = self._placed(config)
        [(_, found)] = spread(self.ray, plan_there, [PlanWork(config, Home())], slot)
        plan, probe = found
        return plan, probe

    def shards(self, job: ShardJob, tasks: Sequence[ShardTask]) -> Iterator[ShardRecord]:
        """Make shards on the cluster; yield each record once the shard is in the store.

        Args:
            job: What the workers need to know.
            tasks: Shards to make.

        Raises:
            ClusterError: the cluster lost the work, or the versions on its machines differ.
            ValueError: what a worker raises.
        """
        config, slot = self._placed(job.config)
        job, home = replace(job, config=config), Home()
        works = [ShardWork(task.index, job, home, max(1, int(slot.cores))) for task in tasks]
        for work, made in spread(self.ray, make_shard, works, slot):
            if isinstance(made, ShardRecord):
                yield made
            else:
                yield receive(job.folder, job.plan, job.plan.task(work.index), *made)

    def evaluation(
        self, cfg: EvaluationConfig, ranges: Sequence[range], at_once: int
    ) -> Iterator[tuple[int, Any]]:
        """Score ranges of the images on the cluster; yield number and part of each, in any order.

        Args:
            cfg: What to score, and how.
            ranges: Places of the images of each range.
            at_once: Images per forward pass.
        """
        home = Home()
        works = [RangeWork(n, cfg, places, at_once, home) for n, places in enumerate(ranges)]
        for work, part in spread(self.ray, score_range, works, self.slot(cfg.device)):
            yield work.index, part

    def train_many(
        self, cfgs: Mapping[str, VisionSAERunnerConfig], output_path: str | None
    ) -> dict[str, Any]:
        """Train SAEs on the cluster, those that can share a pass over the images in one task.

        Args:
            cfgs: Configurations by the SAE's name.
            output_path: Folder for the SAEs' folders, on a disk that all machines share.

        Returns:
            The SAEs by name.

        Raises:
            ValueError: there is no folder, or what a worker raises.
        """
        device = next((cfg.device for cfg in cfgs.values()), "cpu")
        return train_groups(self.ray, self.slot(device), cfgs, output_path)

    def train(
        self,
        cfg: VisionSAERunnerConfig,
        *,
        n_workers: int = 1,
        least: int = 1,
        split: Split | None = None,
    ) -> str:
        """Train one SAE over workers of the cluster, by Ray Train's ``TorchTrainer``.

        After a worker or a machine died, the others begin again from the last checkpoint, and take
        new ones in once they are there.

        Args:
            cfg: Configuration of the run; ``output_path`` is on a disk that all machines share.
            n_workers: Number of workers that is wanted.
            least: Least number of workers to go on with; a split by latents needs all of them.
            split: How they divide the work; by default lanes.

        Returns:
            What the first worker says of the SAE's quality.

        Raises:
            ValueError: there is no folder, or the configuration does not fit.
            ClusterError: workers died again and again, or the cluster has no room for them.
        """
        split, slot = split or Split(), self.slot(cfg.device)
        if slot.count(self.ray) < least:
            raise ClusterError(
                f"the cluster has room for {slot.count(self.ray)} workers, and {least} are needed: "
                "add machines, or take fewer workers"
            )
        work = TeamWork(cfg, split, max(1, int(slot.cores)), Home())
        least = n_workers if split.by == "latents" else min(least, n_workers)
        return train_workers(self.ray, work, slot, (least, n_workers))

    def _placed(self, config: ExtractionConfig) -> tuple[ExtractionConfig, Slot]:
        """Return the configuration with a device, and what a task on it occupies."""
        slot = self.slot(config.device)
        return replace(config, device="cuda" if slot.gpus else config.device or "cpu"), slot

    def slot(self, device: str | None) -> Slot:
        """Return what a task occupies: a GPU with its share of the cores, or some cores.

        Args:
            device: Device of the model; None takes GPUs where the cluster has any.
        """
        if device is None:
            device = "cuda" if self.ray.cluster_resources().get("GPU") else "cpu"
        if not device.startswith("cuda"):
            return Slot(cores=self.cores)
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        shares = [int(has.get("CPU", 1) // has["GPU"]) for has in nodes if has.get("GPU")]
        return Slot(cores=max(1, min(shares, default=1)), gpus=1)
