"""One SAE over the workers of a cluster: Ray Train runs the function that ``torchrun`` runs."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vision_plugin._paths import local_path
from vision_plugin.scale._cluster import ClusterError
from vision_plugin.scale._spread import Slot
from vision_plugin.scale._versions import Home

RETRIES = 3
"""How often the workers begin again, from the last checkpoint, after one of them died."""

STARTS = 10
"""How often the workers may fail to start: after a machine died, Ray Train waits for it in vain."""

_SIGN = "shared"
"""File in the folder of Ray Train's notes, by which a worker sees that it shares the folder."""


@dataclass(frozen=True)
class Outcome:
    """How the work of a group ended, as its first worker tells it."""

    said: str = ""
    """What there is to say of the SAE's quality."""
    refused: str = ""
    """Why the configuration does not fit."""
    unshared: bool = False
    """Whether a worker does not see the folder."""


@dataclass(frozen=True)
class TeamWork:
    """What each worker of a group does."""

    cfg: Any
    split: Any
    threads: int
    home: Home


def train_workers(ray: Any, work: TeamWork, slot: Slot, workers: tuple[int, int]) -> str:
    """Train one SAE over workers of a cluster; return what the first of them says of the result.

    Args:
        ray: The connected module.
        work: What each worker does.
        slot: What a worker occupies.
        workers: The least number of workers to go on with, and the number that is wanted.

    Raises:
        ValueError: there is no folder, or the configuration does not fit.
        ClusterError: workers died again and again.
    """
    if work.cfg.output_path is None:
        raise ValueError("an SAE trained on a cluster needs a folder: set output_path=")
    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"  # read when ray.train is imported
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    out = local_path(work.cfg.output_path).resolve()
    notes = out.with_name(f".{out.name}.ray-train")
    notes.mkdir(parents=True, exist_ok=True)
    (notes / _SIGN).touch()
    least, wanted = workers
    trainer = TorchTrainer(
        _work,
        train_loop_config={"work": work, "notes": str(notes)},
        torch_config=TorchConfig(backend="nccl" if slot.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=wanted if least == wanted else (least, wanted),
            use_gpu=bool(slot.gpus),
            resources_per_worker={"CPU": slot.cores, **({"GPU": 1} if slot.gpus else {})},
        ),
        run_config=RunConfig(
            name="run",
            storage_path=str(notes),
            failure_config=FailureConfig(max_failures=RETRIES, controller_failure_limit=STARTS),
            # Some are read when torch is imported, which Ray Train does before it calls us.
            worker_runtime_env={"env_vars": work.home.variables},
        ),
    )
    try:
        outcome: Outcome = trainer.fit().return_value
    except TrainingFailedError as error:
        raise _told(error) from error
    finally:
        shutil.rmtree(notes, ignore_errors=True)
    del ray
    if outcome.unshared:
        raise ClusterError(
            f"the machines do not share the folder of {out}: put output_path= on a disk that all "
            "of them see"
        )
    if outcome.refused:
        raise ValueError(outcome.refused)
    return outcome.said


def _work(settings: Mapping[str, Any]) -> Outcome:
    """Train as one worker of a group."""
    work: TeamWork = settings["work"]
    work.home.settle()
    import torch

    from vision_plugin.scale._train import shared_runner

    torch.set_num_threads(work.threads)
    if not all(_of_each((Path(settings["notes"]) / _SIGN).is_file())):
        return Outcome(unshared=True)
    with contextlib.ExitStack() as stack:
        refused = ""
        try:
            runner = stack.enter_context(shared_runner(work.cfg, work.split))
        except (ValueError, OSError) as error:  # to try again is no use
            refused = str(error)
        refusals = list(filter(None, _of_each(refused)))
        if refusals:
            return Outcome(refused=refusals[0])
        runner.run()
        quality = runner.quality
    return Outcome(said="" if quality is None else quality.sentence())


def _of_each(found: Any) -> list[Any]:
    """Return what each worker found: they go on or stop together, since none goes on alone."""
    from torch import distributed as dist

    if not dist.is_initialized():
        return [found]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return everyone


def _told(error: Any) -> Exception:
    failures = getattr(error, "worker_failures", {}) or {}
    for failure in failures.values():
        if isinstance(failure, ValueError | ClusterError):
            return failure
    said = " ".join(next((str(failure) for failure in failures.values()), str(error)).split())
    what = f"died {RETRIES + 1} times" if failures else "did not start"
    return ClusterError(
        f"the workers that train the SAE {what} ({said[:300]}): run the same command again, which "
        "continues from the last checkpoint"
    )
