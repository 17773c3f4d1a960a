"""A sweep as wandb writes it down, and the trials that follow from it."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vision_plugin._paths import local_path

METHODS = ("grid", "random", "bayes")
_LARGEST_FILE = 2**20


@dataclass(frozen=True)
class Trial:
    """One training run of a sweep.

    Attributes:
        parameters: Value by flag.

    Examples:
        >>> config = vp.scale.Sweep("grid", "loss", False, {"k": {"values": [4, 8]}})
        >>> config.trials(None, seed=0)[0].arguments
        ['--k=4']
    """

    id: str
    """Eight hexadecimal digits that follow from the parameters: the same ones, the same trial."""
    parameters: Mapping[str, Any]

    @property
    def arguments(self) -> list[str]:
        """Flags of ``vision-plugin train``, as ``wandb agent`` writes them."""
        return [f"--{name}={value}" for name, value in self.parameters.items()]

    def __hash__(self) -> int:
        return hash(self.id)

    def __str__(self) -> str:
        return self.id


@dataclass(frozen=True)
class Sweep:
    """A sweep file of wandb: what varies, how, and the figure that decides.

    Attributes:
        maximize: Whether the largest is the best.
        parameters: What each flag may be.

    Examples:
        >>> config = vp.scale.Sweep("grid", "loss", False, {"k": {"values": [4, 8]}})
        >>> [trial.parameters for trial in config.trials(None, seed=0)]
        [{'k': 4}, {'k': 8}]
    """

    method: str
    """``grid``, ``random`` or ``bayes``; here ``bayes`` draws at random."""
    metric: str
    """Name of the figure, such as ``validation/monosemanticity``."""
    maximize: bool
    parameters: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, path: str | Path) -> Sweep:
        """Read a sweep file; the part for ``wandb agent`` alone is left aside.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no sweep, or one that only wandb can run.
        """
        import yaml

        file = local_path(path)
        if file.stat().st_size > _LARGEST_FILE:
            raise ValueError(f"{path} is larger than {_LARGEST_FILE:,} bytes, which no sweep is")
        try:
            found = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"{path} is no YAML ({' '.join(str(error).split())[:200]})") from None
        if not isinstance(found, dict) or not isinstance(found.get("parameters"), dict):
            raise ValueError(f"{path} is no sweep of wandb: it has no parameters")
        method, metric = found.get("method"), found.get("metric") or {}
        if method not in METHODS:
            raise ValueError(f"{path}: method is {method!r}: use {', '.join(METHODS)}")
        if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
            raise ValueError(f"{path}: it names no metric: write metric: {{name: ..., goal: ...}}")
        for name, spec in found["parameters"].items():
            if not isinstance(spec, dict):
                raise ValueError(f"{path}: write {name}: {{value: {spec!r}}}")
        goal = metric.get("goal", "minimize")
        return cls(method, metric["name"], goal == "maximize", found["parameters"])

    def trials(self, n_trials: int | None, seed: int) -> list[Trial]:
        """Return the trials: all of a grid, or so many drawn ones.

        Args:
            n_trials: Number of trials; None stands for all of a grid, and for 20 drawn ones.
            seed: Seed of the draws: the same seed gives the same trials.

        Raises:
            ValueError: a parameter has no values, or a distribution that is unknown here; or the
                trials are none or too many.
        """
        if n_trials is not None and not 1 <= n_trials <= MAX_TRIALS:
            raise ValueError(f"n_trials={n_trials}: use a whole number from 1 to {MAX_TRIALS:,}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed={seed}: use a whole number from 0 up, below 2 to the 63")
        chosen = self._grid() if self.method == "grid" else self._drawn(n_trials or 20, seed)
        several = list(itertools.islice(chosen, n_trials or MAX_TRIALS + 1))
        if len(several) > MAX_TRIALS:
            raise ValueError(f"the grid has more than {MAX_TRIALS:,} trials: name fewer values")
        return list({trial.id: trial for trial in map(_trial, several)}.values())

    def _grid(self) -> Iterator[dict[str, Any]]:
        choices = []
        for name, spec in self.parameters.items():
            if "value" not in spec and "values" not in spec:
                raise ValueError(f"{name} has no values, which a grid needs: write values: [...]")
            choices.append(spec["values"] if "values" in spec else [spec["value"]])
        for values in itertools.product(*choices):
            yield dict(zip(self.parameters, values, strict=True))

    def _drawn(self, n_trials: int, seed: int) -> Iterator[dict[str, Any]]:
        rng = np.random.default_rng(seed)
        for _ in range(n_trials):
            yield {name: _draw(name, spec, rng) for name, spec in self.parameters.items()}


def _trial(parameters: dict[str, Any]) -> Trial:
    text = json.dumps(parameters, sort_keys=True)
    return Trial(hashlib.sha256(text.encode()).hexdigest()[:8], parameters)


MAX_TRIALS = 10_000
"""Most trials of a sweep."""

_DRAWS: dict[str, Callable[[np.random.Generator, float, float], float]] = {
    "uniform": lambda rng, low, high: rng.uniform(low, high),
    "int_uniform": lambda rng, low, high: int(rng.integers(int(low), int(high) + 1)),
    "log_uniform": lambda rng, low, high: math.exp(rng.uniform(low, high)),
    "log_uniform_values": lambda rng, low, high: math.exp(
        rng.uniform(math.log(low), math.log(high))
    ),
}
"""How wandb's distributions between ``min`` and ``max`` are drawn."""


def _draw(name: str, spec: Mapping[str, Any], rng: np.random.Generator) -> Any:
    if "value" in spec:
        return spec["value"]
    if "values" in spec:
        return spec["values"][int(rng.choice(len(spec["values"]), p=spec.get("probabilities")))]
    low, high = spec.get("min"), spec.get("max")
    if low is None or high is None:
        raise ValueError(f"{name} says nothing to draw from: write value, values, or min and max")
    whole = isinstance(low, int) and isinstance(high, int)
    kind = spec.get("distribution", "int_uniform" if whole else "uniform")
    quantum = spec.get("q", 1) if kind.startswith("q_") else None
    draw = _DRAWS.get(kind.removeprefix("q_"))
    if draw is None:
        raise ValueError(
            f"{name}: the distribution {kind!r} is not drawn here: use {', '.join(_DRAWS)}, or run "
            "the file with wandb"
        )
    found = draw(rng, low, high)
    return found if quantum is None else round(found / quantum) * quantum
