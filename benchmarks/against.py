"""A training step of this checkout beside that of another one, in turn, on a CPU.

    git worktree add ../before COMMIT
    python -m benchmarks.against ../before

Two processes, one of each checkout, wait for each other between steps, so that a machine whose
speed drifts slows both. Prints the median of the ratios, this checkout over the other, and writes
``benchmarks/results/against.json``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

from benchmarks._machine import machine

logger = logging.getLogger("benchmarks.against")

HERE = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
KINDS = ("topk", "batchtopk")
D_IN, D_SAE, K, BATCH = 768, 8192, 32, 1024
FIRST = 5
"""Rounds that are not counted."""


def main() -> None:
    """Measure, or serve one of the two processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, help="folder of the other checkout")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS / "against.json")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(arguments.threads)
    if arguments.serve:
        serve(arguments.other.resolve())
        return
    if not (arguments.other / "vision_plugin").is_dir():
        parser.error(f"{arguments.other} is no checkout: it has no folder vision_plugin")
    found = compare(arguments.other.resolve(), arguments.rounds, arguments.threads)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")


def compare(other: Path, rounds: int, threads: int) -> dict[str, Any]:
    """Ratios of the time of a step, this checkout over the other."""
    found_on = machine("sae-lens") | {"threads": threads}
    ours, theirs = _process(HERE, threads), _process(other, threads)
    seconds: dict[str, list[tuple[float, float]]] = {kind: [] for kind in KINDS}
    try:
        for number in range(rounds + FIRST):
            for kind in KINDS:
                order = [ours, theirs] if number % 2 else [theirs, ours]
                took = {id(process): _ask(process, kind) for process in order}
                seconds[kind].append((took[id(ours)], took[id(theirs)]))
    finally:
        for process in (ours, theirs):
            process.kill()
            process.wait()
    steps = {}
    for kind, pairs in seconds.items():
        ratios = [here / there for here, there in pairs[FIRST:]]
        lower, median, upper = statistics.quantiles(ratios, n=4)
        steps[kind] = {
            "ratio": median,
            "quartiles": [lower, upper],
            "milliseconds": 1e3 * statistics.median(here for here, _ in pairs[FIRST:]),
        }
        logger.info(
            "%s: %.2f of the other's time, quartiles %.2f and %.2f", kind, median, lower, upper
        )
    return {
        "machine": found_on,
        "other": _commit(other),
        "shape": {"d_in": D_IN, "d_sae": D_SAE, "k": K, "batch": BATCH},
        "rounds": rounds,
        "steps": steps,
    }


def _commit(checkout: Path) -> str:
    """The commit of a checkout."""
    line = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _process(checkout: Path, threads: int) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, __file__, str(checkout), "--serve", "--threads", str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    if process.stdout.readline().strip() != "ready":
        raise RuntimeError(f"the step of {checkout} does not run")
    return process


def _ask(process: subprocess.Popen[str], kind: str) -> float:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{kind}\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def serve(checkout: Path) -> None:
    """Take a step of the kind that each line of the input names; print its seconds."""
    sys.path.insert(0, str(checkout))
    step = {kind: _step(checkout, kind) for kind in KINDS}
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        take = step[line.strip()]
        take()  # what the other process pushed out of the caches comes back
        begun = time.perf_counter()
        for _ in range(2):
            take()
        sys.stdout.write(f"{(time.perf_counter() - begun) / 2}\n")
        sys.stdout.flush()


def _step(checkout: Path, kind: str) -> Callable[[], None]:
    """A forward and a backward pass of the checkout's SAE."""
    import vision_plugin

    assert Path(vision_plugin.__file__).is_relative_to(checkout), vision_plugin.__file__
    if "vision_plugin.hooks" not in sys.modules:  # beside the package in a checkout
        _import_from("vision_plugin.hooks", checkout / "hooks")
    from sae_lens.saes.sae import TrainStepInput

    from vision_plugin.sae import _sparse_training as classes

    name = {"topk": "SparseTopKTrainingSAE", "batchtopk": "SparseBatchTopKTrainingSAE"}[kind]
    torch.manual_seed(0)
    sae: Any = getattr(classes, name)(
        getattr(classes, f"{name}Config")(d_in=D_IN, d_sae=D_SAE, k=K)
    )
    batch = torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(0))
    given = TrainStepInput(
        sae_in=batch,
        coefficients={},
        dead_neuron_mask=None,
        n_training_steps=0,
        is_logging_step=False,
    )

    def take() -> None:
        sae.training_forward_pass(given).loss.backward()
        sae.zero_grad()

    return take


def _import_from(name: str, folder: Path) -> None:
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


if __name__ == "__main__":
    main()
