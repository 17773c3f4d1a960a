"""Everything that needs a GPU, in one run of less than six minutes.

    python -m benchmarks.gpu                    # on a card; writes results/gpu.json
    python -m benchmarks.gpu --rehearse --out - # on a CPU, at small sizes: does the script run?

Tests, the training steps at two sizes beside their floor and the peers that are installed, the
encoder and the decoder alone, a profile, the bridge, and a whole job: extraction, training,
evaluation, steerability. A stage that fails is written down and the others go on; stages for which
no time is left are named.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

from benchmarks import _kernel_cases as cases
from benchmarks import bridge, kernel
from benchmarks._kernel_timing import interleaved
from benchmarks._machine import machine
from vision_plugin import kernels

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
SCHEMA = 1
FUSED = "VISION_PLUGIN_FUSED_ENCODER"
GOALS = {
    "49k": {"vp.train, no dead latents": 2.8, "graph of the own step": 1.9},
    "65k": {"vp.train, no dead latents": 5.5, "graph of the own step": 4.3},
}
"""Milliseconds to reach on an H100."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What a run does."""

    device: str
    rehearse: bool
    seconds: float
    repetitions: int

    @property
    def shapes(self) -> tuple[str, ...]:
        """Names of the sizes."""
        return ("tiny",) if self.rehearse else ("49k", "65k")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages, print what they found, and write it; 1 if a stage failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rehearse", action="store_true", help="small sizes, on the CPU")
    parser.add_argument("--seconds", type=float, default=340.0, help="when to begin no more stages")
    parser.add_argument("--only", nargs="*", help="names of stages; all by default")
    parser.add_argument("--out", default=str(RESULTS / "gpu.json"), help="JSON file, '-' for none")
    given = parser.parse_args(arguments)
    if not given.rehearse and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --rehearse runs small sizes on the CPU")
    cases.SHAPES["tiny"] = cases.Shape(16, 256, 4, 64)
    options = Options(
        "cpu" if given.rehearse else "cuda",
        given.rehearse,
        given.seconds,
        2 if given.rehearse else 20,
    )
    report = measure(options, given.only)
    text = json.dumps(report, indent=1, default=str)
    sys.stdout.write(text + "\n")
    if given.out != "-":
        Path(given.out).write_text(text + "\n")
    return 1 if report["failed"] else 0


def measure(options: Options, only: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the stages in turn; what failed and what there was no time for is in the report."""
    began = time.perf_counter()
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "rehearsal": options.rehearse,
        "environment": machine("triton", "sae-lens", "transformers", device=options.device),
        "goals_ms": GOALS,
        "stages": {},
        "seconds": {},
        "failed": [],
        "no_time_for": [],
    }
    for name, stage in stages(options).items():
        if only is not None and name not in only:
            continue
        if time.perf_counter() - began > options.seconds:
            report["no_time_for"].append(name)
            continue
        start = time.perf_counter()
        try:
            report["stages"][name] = stage(options)
        except Exception as error:  # a figure that is missing must not cost the others
            report["failed"].append(name)
            report["stages"][name] = {
                "error": f"{type(error).__name__}: {error}",
                "where": traceback.format_exc().splitlines()[-6:],
            }
        _free(options)
        report["seconds"][name] = round(time.perf_counter() - start, 1)
    report["seconds"]["all"] = round(time.perf_counter() - began, 1)
    return report


def stages(options: Options) -> dict[str, Callable[[Options], dict[str, Any]]]:
    """Return the stages in the order in which they matter."""
    found: dict[str, Callable[[Options], dict[str, Any]]] = {}
    for shape in options.shapes:
        found[f"steps, {shape}"] = lambda options, shape=shape: _steps(options, shape)
        found[f"encoder, {shape}"] = lambda options, shape=shape: _encoder(options, shape)
        found[f"decoder, {shape}"] = lambda options, shape=shape: _decoder(options, shape)
    return found | {
        "captured and eager": _captured_and_eager,
        "host": lambda options: kernel.host_times(options.device, options.repetitions),
        "profile": _profile,
        "bridge": _bridge,
        "job": _job,
        "tests": _tests,
    }


def _steps(options: Options, shape: str) -> dict[str, Any]:
    """Whole training steps, in milliseconds, times the floor, and MiB above what was held."""
    from benchmarks import _kernel_host as host

    size, device = cases.SHAPES[shape], options.device
    variants = kernel._own_steps(size, device, 0, kernels.choose(device))
    sparse = variants["sparse kernel"]
    if device == "cuda":
        variants["graph of the own step"] = _graph(sparse)
    for dead, name in ((0.0, "no dead latents"), (0.2, "20% dead")):
        of_trainers = host.trainer_steps(size, device, dead, autocast=device == "cuda")
        wanted = of_trainers if dead == 0 else {"vp.train": of_trainers["vp.train"]}
        variants |= {f"{key}, {name}": step for key, step in wanted.items()}
    times = interleaved(variants, repetitions=options.repetitions, device=device)
    floor = times[kernel.FLOOR].median_ms
    return {
        "shape": dataclasses.asdict(size),
        "ms": {name: timing.median_ms for name, timing in times.items()},
        "min_ms": {name: timing.min_ms for name, timing in times.items()},
        "over_floor": {name: timing.median_ms / floor for name, timing in times.items()},
        "peak_mib": {name: timing.peak_mib for name, timing in times.items()},
    }


def _graph(step: Callable[[], object]) -> Callable[[], object]:
    """Return a replay of a step that was captured in a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def _encoder(options: Options, shape: str) -> dict[str, Any]:
    """The dense product with the selection behind it, and the tiled product, in bfloat16."""
    size, device = cases.SHAPES[shape], options.device
    p = cases.parameters(size, device, 0, dtype=torch.float32)
    kind = torch.bfloat16 if device == "cuda" else torch.float32
    W, b = p["W_enc"].detach().to(kind), p["b_enc"].detach()
    x = torch.randn(size.batch, size.d_in, device=device).to(kind)
    total = size.k * size.batch

    def topk() -> Any:
        return kernels.topk_encode(x, W, b, size.k)

    def batch_topk() -> Any:
        return kernels.batch_topk_encode(x, W, b, size.k, padded=True)

    with torch.no_grad():
        variants: dict[str, Callable[[], object]] = {"product alone": lambda: x @ W}
        for fused, name in (("0", "dense"), ("1", "tiled")):
            variants[f"{name} product, TopK"] = _with_fused(fused, topk)
            variants[f"{name} product, BatchTopK"] = _with_fused(fused, batch_topk)
        times = interleaved(variants, repetitions=options.repetitions, device=device)
        dense, tiled = (_with_fused(fused, topk)() for fused in "01")
        expected = (x.double() @ W.double() + b).topk(size.k, dim=1).indices.sort(dim=1).values
    return {
        "ms": {name: timing.median_ms for name, timing in times.items()},
        "peak_mib": {name: timing.peak_mib for name, timing in times.items()},
        "rows_where_dense_and_tiled_choose_the_same": _same_rows(dense[1], tiled[1]),
        "rows_where_dense_chooses_as_float64": _same_rows(dense[1], expected),
        "rows_where_tiled_chooses_as_float64": _same_rows(tiled[1], expected),
        "entries_of_batch_topk": total,
    }


def _same_rows(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first.long() == second.long()).all(dim=1).float().mean())


def _with_fused(value: str, work: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with _environment(FUSED, value):
            return work()

    return run


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _decoder(options: Options, shape: str) -> dict[str, Any]:
    """Decoding alone, as called: float32 and bfloat16 weights, and torch's embedding_bag."""
    size, device = cases.SHAPES[shape], options.device
    p = cases.parameters(size, device, 0, dtype=torch.float32)
    W, b = p["W_dec"].detach(), p["b_dec"].detach()
    half = W.bfloat16()
    values, indices = cases.latents(size, device, 0, "zipf")
    with torch.no_grad():
        times = interleaved(
            {
                "float32": lambda: kernels.sparse_decode(values, indices, W, b),
                "bfloat16 weights": lambda: kernels.sparse_decode(values, indices, half, b),
                "embedding_bag and bias": lambda: (
                    torch.nn.functional.embedding_bag(
                        indices, W, per_sample_weights=values, mode="sum"
                    )
                    + b
                ),
            },
            repetitions=options.repetitions,
            device=device,
        )
    read = 4e-6 * size.batch * size.k * size.d_in
    return {
        "ms": {name: timing.median_ms for name, timing in times.items()},
        "GBps_of_float32_rows": {name: read / t.median_ms for name, t in times.items()},
    }


def _captured_and_eager(options: Options) -> dict[str, Any]:
    """Whether a captured step leaves the bits of the step itself, for each architecture."""
    from tests.sae import test_device_step as runs
    from vision_plugin.sae import SteppedTrainer

    found: dict[str, Any] = {}
    for architecture in runs.SETTINGS:
        trained = []
        for capture in (options.device == "cuda", False):
            sae = runs._sae(architecture, options.device)
            trainer = runs._trainer(SteppedTrainer, sae, options.device)
            trainer.device_step.capture = capture
            trainer.fit()
            trained.append(trainer)
        runs._assert_same_bits(*trained)
        found[architecture] = {"same_bits": True, "graphs": len(trained[0].device_step._graphs)}
    return found


def _profile(options: Options) -> dict[str, Any]:
    """What takes the time of a step of ``vp.train``."""
    from torch.profiler import ProfilerActivity, profile

    from benchmarks import _kernel_host as host

    size, device = cases.SHAPES[options.shapes[0]], options.device
    step = host.trainer_steps(size, device, 0.0, autocast=device == "cuda")["vp.train"]
    on_gpu = device == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=kinds) as found:
        for _ in range(5):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, time_of))
    return {event.key[:90]: round(getattr(event, time_of) / 5e3, 4) for event in events[:20]}


def _bridge(options: Options) -> dict[str, Any]:
    size, batch = ("small", 2) if options.rehearse else ("large", 64)
    return bridge.measure(options.device, size, batch, options.repetitions)


def _job(options: Options) -> dict[str, Any]:
    """A whole job on drawn images: extraction, training, evaluation, steerability; seconds."""
    import sae_lens

    import vision_plugin as vp
    from vision_plugin.activations import ExtractionConfig, extract

    n = 24 if options.rehearse else 512
    seconds, scores = {}, {}
    hook = "blocks.2.hook_resid_post"
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        model = vp.load_model("demo", device=options.device)
        images = vp.open_images(f"demo:{n}")
        wanted = ExtractionConfig(
            model_name="demo", images=f"demo:{n}", hook_names=[hook], output_path=f"{folder}/store"
        )
        extract(wanted, model=model)
        seconds["extraction"] = time.perf_counter() - start
        start = time.perf_counter()
        cfg = vp.VisionSAERunnerConfig(
            model_name="demo", images=f"{folder}/store", hook_name=hook, tokens="all",
            sae=sae_lens.BatchTopKTrainingSAEConfig(d_in=128, d_sae=1024, k=8.0),
            training_tokens=100 * 512 if options.rehearse else 500 * 4096,
            train_batch_size_tokens=512 if options.rehearse else 4096,
            output_path=f"{folder}/sae", device=options.device, autocast=options.device == "cuda",
        )  # fmt: skip
        sae = vp.train(cfg, model=model)
        seconds["training"] = time.perf_counter() - start
        start = time.perf_counter()
        found = vp.evaluate(sae, model, images, metrics=["monosemanticity", "fvu"])
        seconds["evaluation"] = time.perf_counter() - start
        scores["evaluation"] = found.summaries()
        start = time.perf_counter()
        found = vp.evaluate(
            sae,
            model,
            images,
            metrics=["steerability"],
            steering_images=2 if options.rehearse else 8,
            concepts=["a red circle", "a blue square", "a green star", "stripes", "dots"],
        )
        seconds["steerability"] = time.perf_counter() - start
        scores["steerability"] = found.summaries()
    return {"seconds": seconds, "scores": scores}


def _tests(options: Options) -> dict[str, Any]:
    """The tests on the device; in a rehearsal, a few on the CPU."""
    chosen = ["tests/kernels", "tests/sae/test_device_step.py", "tests/models/test_gpu.py"]
    if options.rehearse:
        chosen = [
            "tests/kernels/test_backends.py::test_an_unknown_name_fails_and_lists_the_known_ones"
        ]
    command = [sys.executable, "-m", "pytest", "-q", "--device", options.device, *chosen]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=150
    )
    lines = done.stdout.strip().splitlines()
    found = {
        "status": done.returncode,
        "last_line": lines[-1] if lines else "",
        "tail": lines[-15:],
    }
    if done.returncode:
        raise RuntimeError("\n".join(lines[-25:] or done.stderr.splitlines()[-10:]))
    return found


def _free(options: Options) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
