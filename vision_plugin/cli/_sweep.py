"""``vision-plugin sweep``: the trials of a wandb sweep file, here or on a Ray cluster."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from vision_plugin.cli._console import console
from vision_plugin.cli._engine import EngineFlags, opened
from vision_plugin.cli._flags import parse


@dataclass(frozen=True)
class SweepFlags(EngineFlags):
    """A sweep and how much of it to run."""

    file: Annotated[str, tyro.conf.Positional] = ""
    """Sweep file as wandb reads it, such as those in ``benchmarks/sweeps``."""
    n_trials: int | None = None
    """Trials to run; by default all of a grid, and 20 that are drawn."""
    seed: int = 0
    """Seed of the draws: the same seed gives the same trials."""


def run(arguments: Sequence[str]) -> None:
    """Run a sweep from flags, and print its trials, the best first."""
    from vision_plugin.scale import Sweep, sweep

    flags = parse(
        SweepFlags,
        arguments,
        command="sweep",
        description="Run the trials of a wandb sweep file without wandb's server: in this process, "
        "or on a Ray cluster by Ray Tune. Every trial is a run of vision-plugin train, with "
        "WANDB_RUN_ID set to its name. Run the same line again to continue.",
    )
    if not flags.file:
        raise ValueError("name a sweep file: vision-plugin sweep benchmarks/sweeps/demo.yaml")
    config = Sweep.read(flags.file)
    with opened(flags) as engine:
        found = sweep(config, train_trial, n_trials=flags.n_trials, seed=flags.seed, engine=engine)
    out = console()
    varied = [name for name, spec in config.parameters.items() if "value" not in spec]
    out.print(f"{len(found)} trials by {config.metric}, the best first:")
    for trial, figures in found:
        told = ", ".join(f"{name} {_told(trial.parameters[name])}" for name in varied)
        out.print(f"{trial.id}: {_told(figures.get(config.metric, 'none'))} ({told})")


def train_trial(arguments: Sequence[str]) -> dict[str, float]:
    """Train from the flags of a trial, unless that is done; return its last figures by name."""
    from vision_plugin.cli._train import read_line, train_line

    cfg, team = read_line(arguments)
    log = None if cfg.output_path is None else Path(cfg.output_path) / "validation.jsonl"
    if log is None or not log.is_file():
        train_line(cfg, team)
    found: dict[str, Any] = {}
    if log is not None and log.is_file():
        with contextlib.suppress(ValueError, IndexError):
            found = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def _told(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
