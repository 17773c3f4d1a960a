"""One SAE over the workers of a cluster: Ray Train runs the function that ``torchrun`` runs."""

from __future__ import annotations

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

_SIGN = "shared"
"""File in the folder of Ray Train's notes, by which a worker sees that it shares the folder."""


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
            failure_config=FailureConfig(max_failures=RETRIES, controller_failure_limit=0),
        ),
    )
    try:
        found = trainer.fit().metrics or {}
    except TrainingFailedError as error:
        raise _told(error) from error
    finally:
        shutil.rmtree(notes, ignore_errors=True)
    del ray
    if "unshared" in found:
        raise ClusterError(
            f"the machines do not share the folder of {out}: put output_path= on a disk that all "
            "of them see"
        )
    if "refused" in found:
        raise ValueError(str(found["refused"]))
    return str(found.get("said", ""))


def _work(settings: Mapping[str, Any]) -> None:
    """Train as one worker of a group."""
    work: TeamWork = settings["work"]
    work.home.settle()
    import torch
    from ray import train

    from vision_plugin.scale._train import shared_runner

    torch.set_num_threads(work.threads)
    if not (Path(settings["notes"]) / _SIGN).is_file():
        train.report({"unshared": work.cfg.output_path})
        return
    try:
        entered = shared_runner(work.cfg, work.split)
        runner = entered.__enter__()
    except (ValueError, OSError) as error:  # every worker finds the same: to try again is no use
        train.report({"refused": str(error)})
        return
    runner.run()
    entered.__exit__(None, None, None)
    quality = runner.quality
    train.report({"said": "" if quality is None else quality.sentence()})


def _told(error: Any) -> Exception:
    failures = getattr(error, "worker_failures", {}) or {}
    for failure in failures.values():
        if isinstance(failure, ValueError | ClusterError):
            return failure
    said = next((str(failure) for failure in failures.values()), str(error))
    return ClusterError(
        f"the workers that train the SAE died {RETRIES + 1} times ({' '.join(said.split())[:300]}):"
        " run the same command again, which continues from the last checkpoint"
    )
