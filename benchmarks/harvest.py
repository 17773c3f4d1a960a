"""What harvesting activations costs, side by side with the native forward and the bridge.

    python -m benchmarks.harvest                    # ViT-B/32, batch 16
    python -m benchmarks.harvest --layers 4 --width 128 --repeats 3 --out /elsewhere   # a quick
look

Writes ``benchmarks/results/harvest.json``. All variants take turns in every round, so that what
else the machine does falls on all of them; figures are medians with minimum and quartiles. Peak
memory is what tensors made during one pass hold at once, weights not counted.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

import vision_plugin as vp
from benchmarks._machine import machine
from vision_plugin.models import Harvester

logger = logging.getLogger("benchmarks.harvest")

RESULTS = Path(__file__).parent / "results"
TARGET = 1.05
"""Harvesting one hook at the last layer may cost this much of the native forward."""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes that tensors made under it hold, and remembers the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator, then take its results in."""
        outputs = func(*args, **(kwargs or {}))
        for output in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
            if isinstance(output, Tensor):
                self._take(output)
        return outputs

    def _take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address in self._known or size == 0:
            return
        self._known.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size


def build(arguments: argparse.Namespace) -> Any:
    """A CLIP vision tower of the asked size, random weights, as a bridge."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=arguments.width,
        intermediate_size=4 * arguments.width,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64,
        image_size=224,
        patch_size=32,
    )
    return vp.wrap(CLIPVisionModel(config).eval().to(arguments.device), name="ViT-B/32")


def variants(model: Any, pixels: Tensor) -> dict[str, Callable[[], object]]:
    """What takes turns: every way through the model."""
    n_layers = int(model.cfg.n_layers)
    last = f"blocks.{n_layers - 1}.hook_resid_post"
    every = [f"blocks.{layer}.hook_resid_post" for layer in range(n_layers)]
    runs: dict[str, Callable[[], object]] = {
        "native": lambda: model.native(pixel_values=pixels),
        "harvest last layer": _harvest(model, [last], pixels),
        "harvest every layer": _harvest(model, every, pixels),
        "bridge": lambda: model(pixels),
        "bridge cache last layer": lambda: model.run_with_cache(pixels, names_filter=[last]),
        "bridge cache every layer": lambda: model.run_with_cache(pixels, names_filter=every),
        "bridge cache everything": lambda: model.run_with_cache(pixels),
    }
    for layer in range(n_layers - 1):
        runs[f"harvest layer {layer}"] = _harvest(model, [every[layer]], pixels)
    return runs


def _harvest(model: Any, names: list[str], pixels: Tensor) -> Callable[[], object]:
    harvester = Harvester(model, names)
    return lambda: harvester(pixels)


@torch.no_grad()
def measure(
    runs: dict[str, Callable[[], object]], repeats: int, device: str
) -> dict[str, dict[str, float]]:
    """Milliseconds of each run: median, minimum and quartiles over interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_number in range(repeats + 1):
        for name, run in runs.items():
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            if round_number > 0:  # the first round warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: _summary(values) for name, values in times.items()}


def _summary(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": middle, "min": min(values), "q1": low, "q3": high}


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


@torch.no_grad()
def peaks(runs: dict[str, Callable[[], object]]) -> dict[str, int]:
    """Peak bytes of the tensors that one pass makes."""
    found = {}
    for name, run in runs.items():
        with LiveBytes() as live:
            kept = run()
        found[name] = live.peak
        del kept
    return found


def report(model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """All the figures."""
    pixels = torch.randn(arguments.batch, 3, 224, 224, device=arguments.device)
    runs = variants(model, pixels)
    times = measure(runs, arguments.repeats, arguments.device)
    native = times["native"]["median"]
    n_layers = int(model.cfg.n_layers)
    curve = [times[f"harvest layer {layer}"]["median"] for layer in range(n_layers - 1)]
    curve.append(times["harvest last layer"]["median"])
    return {
        "setting": {
            **machine("transformers", "transformer-lens", device=arguments.device),
            "dtype": "float32",
            "layers": n_layers,
            "width": arguments.width,
            "batch": arguments.batch,
            "repeats": arguments.repeats,
        },
        "milliseconds": times,
        "over_native": {name: figure["median"] / native for name, figure in times.items()},
        "layer_share": [
            {"layer": layer, "measured": value / curve[-1], "expected": (layer + 1) / n_layers}
            for layer, value in enumerate(curve)
        ],
        "peak_bytes": peaks(runs),
        "target": {
            "harvest last layer over native": TARGET,
            "met": times["harvest last layer"]["median"] <= TARGET * native,
        },
    }


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    figures = report(build(arguments), arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "harvest.json").write_text(json.dumps(figures, indent=1) + "\n")
    for name, ratio in figures["over_native"].items():
        milliseconds = figures["milliseconds"][name]["median"]
        peak = figures["peak_bytes"][name] / 2**20
        logger.info("%-26s %8.1f ms  %5.2f of native  %7.1f MiB", name, milliseconds, ratio, peak)
    return 0


if __name__ == "__main__":
    sys.exit(main())
