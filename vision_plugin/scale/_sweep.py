"""Run the trials of a sweep, here or by Ray Tune."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vision_plugin.scale._cluster import ClusterError
from vision_plugin.scale._spread import Slot
from vision_plugin.scale._trials import Sweep, Trial
from vision_plugin.scale._versions import Home

logger = logging.getLogger(__name__)

RETRIES = 3
"""How often a trial begins again, from its last checkpoint, after its process died."""


@dataclass(frozen=True)
class TrialWork:
    """A trial, and what runs it: a function of flags that returns figures by name."""

    trial: Trial
    train: Callable[[Sequence[str]], Mapping[str, float]]
    home: Home


def sweep(
    config: Sweep,
    train: Callable[[Sequence[str]], Mapping[str, float]],
    *,
    n_trials: int | None = None,
    seed: int = 0,
    engine: Any = None,
) -> list[tuple[Trial, Mapping[str, Any]]]:
    """Run the trials of a sweep; return them with their figures, the best first.

    Run the same sweep again to continue it: the trials are the same, and a trial that is done
    returns its figures at once. ``WANDB_RUN_ID`` has the trial's id while it runs.

    Args:
        config: The sweep.
        train: Trains from flags of ``vision-plugin train`` and returns figures by name; it has to
            be importable on every machine.
        n_trials: Number of trials; None stands for all of a grid, and for 20 drawn ones.
        seed: Seed of the draws.
        engine: A connected engine, whose cluster runs the trials; None runs them here in turn.

    Raises:
        ValueError: the sweep cannot be drawn here, or a trial's flags are refused; trials that
            were begun go on to their ends first.
        ClusterError: a trial's processes died again and again.

    Examples:
        >>> config = vp.scale.Sweep("grid", "loss", False, {"k": {"values": [4, 8]}})
        >>> def train(flags):
        ...     return {"loss": float(flags[-1].removeprefix("--k="))}
        >>> found = vp.scale.sweep(config, train)
        >>> [(trial.parameters, figures["loss"]) for trial, figures in found]
        [({'k': 4}, 4.0), ({'k': 8}, 8.0)]
    """
    works = [TrialWork(trial, train, Home()) for trial in config.trials(n_trials, seed)]
    if config.method == "bayes":
        logger.info("bayes: the trials are drawn at random here, not searched for")
    if engine is None:
        found = [(work.trial, run_trial(work)) for work in works]
    else:
        device = works[0].trial.parameters.get("device", "cpu") if works else "cpu"
        found = _tuned(engine.ray, engine.slot(str(device)), works)
    sign = -1 if config.maximize else 1

    def rank(entry: tuple[Trial, Mapping[str, Any]]) -> float:
        value = entry[1].get(config.metric)
        return float("inf") if value is None or value != value else sign * float(value)

    return sorted(found, key=rank)


def run_trial(work: TrialWork) -> Mapping[str, float]:
    """Run a trial in this process; return its figures."""
    before = os.environ.get("WANDB_RUN_ID")
    os.environ["WANDB_RUN_ID"] = work.trial.id
    try:
        return work.train(work.trial.arguments)
    finally:
        if before is None:
            del os.environ["WANDB_RUN_ID"]
        else:
            os.environ["WANDB_RUN_ID"] = before


def _tuned(ray: Any, slot: Slot, works: list[TrialWork]) -> list[tuple[Trial, Mapping[str, Any]]]:
    """Let Ray Tune run the trials, each in a process of its own; no figure leaves its notes."""
    from ray import tune

    notes = tempfile.mkdtemp(prefix="vision-plugin-tune-")
    resources = {"CPU": slot.cores, **({"GPU": slot.gpus} if slot.gpus else {})}
    tuner = tune.Tuner(
        tune.with_resources(tune.with_parameters(_tune_trial, works=works), resources),
        param_space={"number": tune.grid_search(list(range(len(works))))},
        run_config=tune.RunConfig(
            storage_path=notes,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=RETRIES),
        ),
    )
    del ray
    try:
        results = tuner.fit()
    finally:
        shutil.rmtree(notes, ignore_errors=True)
    found = []
    for result in results:
        if result.error is not None:
            said = " ".join(str(result.error).split())[:300]
            raise ClusterError(f"a trial died {RETRIES + 1} times ({said}): run the sweep again")
        figures = result.metrics or {}
        if "refused" in figures:
            raise ValueError(str(figures["refused"]))
        found.append((works[result.config["number"]].trial, figures["figures"]))
    return found


def _tune_trial(config: Mapping[str, Any], works: Sequence[TrialWork]) -> None:
    from ray import tune

    work = works[config["number"]]
    work.home.settle()
    try:
        figures = dict(run_trial(work))
    except ValueError as error:  # to try again is no use
        tune.report({"refused": f"trial {work.trial}: {error}"})
        return
    tune.report({"figures": figures})
