"""What Ray adds to an extraction, what lanes add to training, and what follows for many GPUs.

    python -m benchmarks.scale                # all of it
    python -m benchmarks.scale extraction     # one part: extraction, lanes or model
    python -m benchmarks.scale --small        # little work, to see that it runs

Writes ``benchmarks/results/scale.json`` and ``scale.md``. Local extraction and Ray's, of few and of
many images, take turns in one process and on one core; what an image costs is the difference of the
two over the difference of their images, so that starts do not count. CPU is that of this process
and of all that it started, Ray's own processes too. ``model`` runs the simulator, which prints its
assumptions.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sae_lens import BatchTopKTrainingSAEConfig, LoggingConfig, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from transformers import CLIPImageProcessor

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

from benchmarks._machine import machine
from benchmarks._scale_model import Rates, table, with_measured
from vision_plugin.activations import ExtractionConfig, extract
from vision_plugin.images import open_images
from vision_plugin.scale import LaneTeam, RayEngine

logger = logging.getLogger("benchmarks.scale")

RESULTS = Path(__file__).parent / "results"
SHARED = Path(__file__).parents[2] / "shared"
PER_SHARD = 256
"""Images of a shard: about a second of work. Shards of the usual size are larger."""


def main() -> None:
    """Run what is asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=["extraction", "lanes", "model"])
    parser.add_argument("--small", action="store_true", help="little work, to see that it runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "scale.json")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    there = json.loads(arguments.output.read_text()) if arguments.output.is_file() else {}
    there["machine"] = machine("ray", "sae-lens", "transformers")
    if arguments.part in (None, "lanes"):  # before Ray's threads: this part forks
        there["lanes"] = timed(lanes, small=arguments.small)
    if arguments.part in (None, "extraction"):
        there["extraction"] = timed(extraction, small=arguments.small)
    if len(there) > 1:
        arguments.output.write_text(json.dumps(there, indent=1) + "\n")
    text = page(there)
    arguments.output.with_suffix(".md").write_text(text)
    logger.info("%s", text)


def timed(part: Callable[..., dict[str, Any]], *, small: bool) -> dict[str, Any]:
    """A part's results, with what it took and how busy the machine was."""
    load, begun, before = os.getloadavg()[0], time.monotonic(), _cpu_of_tree()
    found = part(small=small)
    return found | {
        "seconds": time.monotonic() - begun,
        "cpu_seconds_of_all": _cpu_of_tree() - before,
        "load_average": [load, os.getloadavg()[0]],
    }


# -------------------------------------------------------------------------------- extraction


def extraction(*, small: bool) -> dict[str, Any]:
    """CPU and seconds per image, here and on Ray with one slot, in turns."""
    few, many, rounds = (PER_SHARD, 2 * PER_SHARD, 1) if small else (PER_SHARD, 7 * PER_SHARD, 5)
    turns: dict[str, list[dict[str, float]]] = {"local": [], "ray": []}
    with (
        _one_core(),
        tempfile.TemporaryDirectory() as name,
        RayEngine(num_cpus=1, object_store_memory=150_000_000) as engine,
    ):
        for where, on in (("local", None), ("ray", engine)):
            _cost(Path(name) / f"{where}-first", few, on)  # imports, and caches: not counted
        for turn in range(rounds):
            for where, on in (("local", None), ("ray", engine)):
                found = [_cost(Path(name) / f"{where}-{turn}-{n}", n, on) for n in (few, many)]
                cost = {
                    key: (found[1][key] - found[0][key]) / (many - few) for key in ("cpu", "wall")
                }
                logger.info("%s: %s per image", where, cost)
                turns[where].append(cost)
        tasks = _tasks_per_second(engine, 20 if small else 400)
        decoded = _decoded_per_second(Path(name) / "photos", 8 if small else 64)
    cpu = [r["cpu"] / here["cpu"] for here, r in zip(turns["local"], turns["ray"], strict=True)]
    wall = [here["wall"] / r["wall"] for here, r in zip(turns["local"], turns["ray"], strict=True)]
    return {
        "model": Path(_model()[0]).name,
        "images": [few, many],
        "images_per_shard": PER_SHARD,
        "per_image": turns,
        "cpu_over_local": statistics.median(cpu),
        "cpu_over_local_by_turn": cpu,
        "speed_over_local": statistics.median(wall),
        "speed_over_local_by_turn": wall,
        "tasks_per_second": tasks,
        "decoded": decoded,
    }


@contextmanager
def _one_core() -> Iterator[None]:
    """Keep this process, and what it starts, on one core: a slot has one, and so has the other."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _model() -> tuple[str, str]:
    """The emoji CLIP and real pictures where they are, else the packaged model and drawn ones."""
    folder = SHARED / "models" / "emoji-clip"
    if folder.is_dir():
        return str(folder), str(SHARED / "data" / "noto.parquet")
    return "demo", "demo:4000@0"


def _cost(out: Path, n_images: int, engine: RayEngine | None) -> dict[str, float]:
    """CPU seconds and seconds of one extraction."""
    model, images = _model()
    config = ExtractionConfig(
        model_name=model,
        images=images,
        hook_names=("blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"),
        output_path=str(out),
        n_images=n_images,
        images_per_shard=PER_SHARD,
        n_workers=0,
        device="cpu",
    )
    cpu, begun = _cpu_of_tree(), time.monotonic()
    extract(config, engine=engine)
    return {"cpu": _cpu_of_tree() - cpu, "wall": time.monotonic() - begun}


def _cpu_of_tree() -> float:
    """CPU seconds of this process and of all that it started, those that ended included."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        process = int(path.parent.name)
        parents[process], ticks[process] = int(fields[1]), sum(map(int, fields[11:15]))
    found = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return sum(ticks[process] for process in found) / os.sysconf("SC_CLK_TCK")


def _tasks_per_second(engine: RayEngine, n: int) -> float:
    nothing = engine.ray.remote(num_cpus=1)(_nothing)
    engine.ray.get(nothing.remote())
    begun = time.monotonic()
    engine.ray.get([nothing.remote() for _ in range(n)])
    return n / (time.monotonic() - begun)


def _nothing() -> None:
    return None


def _decoded_per_second(folder: Path, n: int) -> dict[str, float]:
    """JPEG files that a core opens and makes ready for CLIP at 224 pixels, by its CPU seconds."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(n):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = (smooth + rng.integers(-24, 25, smooth.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:03d}.jpg", quality=88)
    source, ready = open_images(str(folder)), CLIPImageProcessor()
    before = time.process_time()
    for number in range(n):
        ready(source[number], return_tensors="pt")
    size = statistics.mean(path.stat().st_size for path in folder.iterdir())
    return {"images_per_second": n / (time.process_time() - before), "bytes": size}


# -------------------------------------------------------------------------------- lanes


def lanes(*, small: bool) -> dict[str, Any]:
    """CPU seconds of SAELens's trainer and of lanes, on one worker and on two."""
    steps, rounds = (3, 1) if small else (30, 3)
    turns: dict[str, list[float]] = {"stock": [], "1 worker": [], "2 workers": []}
    for _ in range(rounds):
        turns["stock"].append(_together(1, lambda: _fit(steps, shared=False)))
        turns["1 worker"].append(_together(1, lambda: _fit(steps, shared=True)))
        turns["2 workers"].append(_together(2, lambda: _fit(steps, shared=True)))
        logger.info("CPU seconds so far: %s", turns)
    over = [two / stock for two, stock in zip(turns["2 workers"], turns["stock"], strict=True)]
    return {
        "d_in": 256,
        "d_sae": 4096,
        "rows": 2048,
        "steps": steps,
        "cpu_seconds": turns,
        "cpu_of_two_over_stock": statistics.median(over),
        "cpu_of_two_over_stock_by_turn": over,
    }


def _fit(steps: int, *, shared: bool) -> None:
    torch.manual_seed(0)
    cfg = BatchTopKTrainingSAEConfig(d_in=256, d_sae=4096, k=32.0)
    settings = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=2048 * steps,
        device="cpu",
        autocast=False,
        lr=1e-3,
        lr_end=1e-4,
        lr_scheduler_name="constant",
        lr_warm_up_steps=0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=0,
        n_restart_cycles=1,
        train_batch_size_samples=2048,
        dead_feature_window=1000,
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
    )
    make: Any = LaneTeam(8).trainer if shared else SAETrainer
    make(cfg=settings, sae=TrainingSAE.from_dict(cfg.to_dict()), data_provider=_rows()).fit()


def _rows() -> Iterator[torch.Tensor]:
    make = torch.Generator().manual_seed(0)
    rows = torch.randn(8, 2048, 256, generator=make)
    while True:
        yield from rows


def _together(size: int, work: Callable[[], None]) -> float:
    """CPU seconds that so many processes take to do the same together, of work alone."""
    with tempfile.TemporaryDirectory() as name:
        folder, children = Path(name), []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                try:
                    _member(folder, rank, size, work)
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        if any(codes):
            raise RuntimeError(f"the workers ended with {codes}")
        return sum(float(path.read_text()) for path in folder.glob("cpu-*"))


def _member(folder: Path, rank: int, size: int, work: Callable[[], None]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if size > 1:
        meeting = (folder / "meeting").as_uri()
        torch.distributed.init_process_group(
            "gloo", init_method=meeting, rank=rank, world_size=size
        )
    before = resource.getrusage(resource.RUSAGE_SELF)
    work()
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    (folder / f"cpu-{rank}").write_text(str(cpu))


# -------------------------------------------------------------------------------- the page


def page(found: dict[str, Any]) -> str:
    """The results and the model's tables, as Markdown."""
    lines = ["# Past one machine", "", "`python -m benchmarks.scale`", ""]
    rates, measured = Rates(), {}
    if "extraction" in found:
        e = found["extraction"]
        lines += [
            f"Extraction by Ray against the same process alone, {e['model']}, one slot "
            f"on the same one core, shards of {e['images_per_shard']} images, after the start: "
            f"{e['cpu_over_local'] - 1:+.1%} CPU per image (aim: at most +10%), "
            f"{e['speed_over_local']:.1%} of its speed (aim: at least 90%). Ray gives out "
            f"{e['tasks_per_second']:.0f} empty tasks a second to one slot.",
            "",
        ]
        rates = with_measured(
            rates,
            task_overhead=max(0.0, e["cpu_over_local"] - 1),
            tasks_per_second=e["tasks_per_second"],
            core_images=e["decoded"]["images_per_second"],
        )
        size = f"measured here, 500 x 375 pixels, {e['decoded']['bytes'] / 1000:.0f} kB"
        measured = {
            "task_overhead": "measured here on CPUs",
            "tasks_per_second": "measured here, to one slot",
            "core_images": size,
        }
    if "lanes" in found:
        n = found["lanes"]
        lines += [
            f"A BatchTopK SAE of {n['d_in']} x {n['d_sae']:,}, batches of {n['rows']:,}, in lanes "
            f"on two workers: {n['cpu_of_two_over_stock'] - 1:+.1%} CPU against SAELens's trainer "
            "in one process (aim: at most +25%).",
            "",
        ]
    parts = [name for name in ("extraction", "lanes") if name in found]
    if parts:
        on = found["machine"]
        took = "; ".join(
            f"{name}: {p['seconds']:.0f} s, {p['cpu_seconds_of_all']:.0f} CPU seconds, load "
            f"{p['load_average'][0]:.1f} before and {p['load_average'][1]:.1f} after"
            for name, p in ((name, found[name]) for name in parts)
        )
        lines += [
            f"{on['device']}, {on['cores']} cores. {took}. Other work on the machine changes "
            "seconds more than CPU.",
            "",
        ]
    lines += [
        "## Many GPUs",
        "",
        "Nothing here was run on a GPU. The simulator gives shards to slots that start, straggle "
        "and die; its rates are",
        "",
        table(rates, measured),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
