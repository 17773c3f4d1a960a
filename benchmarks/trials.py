"""Train one SAE by the defaults and others with one setting changed, and score them alike.

    python -m benchmarks.trials                         # every trial on three models; half an hour
    python -m benchmarks.trials --sets demo --tokens 50000

A trial is a BatchTopK SAE. What has run stays in ``benchmarks/results/trials.json`` and is not run
again; ``trials.md`` beside it is the table. The sets of vectors are those of ``quality.py``,
and the drawn images through the demo CLIP. The presets of these three models rest on it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

from benchmarks._machine import machine
from benchmarks._quality_score import DENSE_ABOVE, at_k, explained_variance
from benchmarks.quality import RESULTS, SETS, SHARED, VectorSet, scored_of, store_of
from vision_plugin import metrics
from vision_plugin.activations import ActivationStore, ExtractionConfig, extract
from vision_plugin.sae import (
    VisionSAERunnerConfig,
    VisionSAETrainingRunner,
    training_config_class,
)

logger = logging.getLogger("benchmarks.trials")

DEMO = VectorSet("demo", "demo:3000", "blocks.2.hook_resid_post", "all", "shape", 1024, 11, "demo")
TRIED = {"demo": DEMO, **{name: SETS[name] for name in ("emoji", "dinov2-s-11")}}
TRIALS: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "half the learning rate": {"lr_by": 0.5},
    "twice the learning rate": {"lr_by": 2.0},
    "encoder as fast as the decoder": {"encoder_lr_ratio": 1.0},
    "b_dec at the geometric median": {"b_dec_init_method": "geometric_median"},
    "b_dec at 0": {"b_dec_init_method": "zeros"},
    "directions from data": {"decoder_init_method": "data"},
    "decoder rows of norm 0.1": {"sae": {"decoder_init_norm": 0.1}},
    "activations not scaled": {"sae": {"normalize_activations": "none"}},
    "activations whitened": {"sae": {"normalize_activations": "covariance_whitening"}},
    "dead after a fifth of the run": {"window": 0.2},
    "no auxiliary loss": {"sae": {"aux_loss_coefficient": 0.0}},
    "auxiliary loss of 1/32 (Gao et al.)": {"sae": {"aux_loss_coefficient": 1 / 32}},
    "batches of 1,024": {"train_batch_size_tokens": 1024},
    "MonoLoss at 3e-4": {"mono_coefficient": 3e-4},
    "archetypal, 1,024 points": {"archetypal_points": 1024, "n_batches_in_buffer": 40},
    "archetypal, 4,096 points, relaxation 0.5": {
        **{"archetypal_points": 4096, "archetypal_relaxation": 0.5, "n_batches_in_buffer": 40},
    },
}
"""Changes to the defaults. ``lr_by`` and ``window`` are shares of what the defaults decide."""


def vectors(name: str, folder: Path) -> tuple[ActivationStore, Tensor]:
    """The store of a set, and the vectors that are scored."""
    if name != "demo":
        store = store_of(SETS[name], folder)
        return store, scored_of(name, store, folder).rows
    path = folder / "store-demo"
    extract(
        ExtractionConfig(
            model_name="demo",
            images=DEMO.images,
            hook_names=[DEMO.hook_name],
            tokens=DEMO.tokens,
            output_path=str(path),
            n_workers=0,
        )
    )
    store = ActivationStore(path)
    chosen = torch.arange(0, len(store), max(1, len(store) // 300))
    return store, store.activations(DEMO.hook_name, chosen).float().flatten(0, -2)


def config(
    wanted: VectorSet, changes: dict[str, Any], seed: int, tokens: int, store: ActivationStore
) -> VisionSAERunnerConfig:
    """The run of a trial; shares become numbers by the defaults' own decisions."""
    changes = dict(changes)
    of_sae, rate, window = (changes.pop(key, None) for key in ("sae", "lr_by", "window"))
    is_file = wanted.model != "demo"
    cfg = VisionSAERunnerConfig(
        model_name=str(SHARED / wanted.model) if is_file else wanted.model,
        images="",
        hook_name=wanted.hook_name,
        tokens=wanted.tokens,
        sae=training_config_class("batchtopk")(
            d_in=0, d_sae=wanted.d_sae, k=wanted.k, **(of_sae or {})
        ),
        explicit=tuple(of_sae or ()),
        training_tokens=tokens,
        seed=seed,
        output_path=None,
        **changes,
    )
    if rate is None and window is None:
        return cfg
    decided = VisionSAETrainingRunner(cfg, images=store).cfg
    if rate is not None:
        return dataclasses.replace(cfg, lr=rate * float(decided.lr))
    return dataclasses.replace(
        cfg, dead_feature_window=round(window * decided.total_training_steps)
    )


@torch.no_grad()
def score(sae: Any, rows: Tensor, k: int) -> dict[str, Any]:
    """Alive and dense latents, L0, and explained variance with exactly k latents a vector."""
    sparsity = metrics.Sparsity(n_features=sae.cfg.d_sae, dense_above=DENSE_ABOVE)
    for part in rows.split(2048):
        sparsity.update(sae.encode(part))
    fires = sparsity.compute()
    return {
        "alive": sae.cfg.d_sae - fires.n_dead,
        "dense": fires.n_dense,
        "l0": fires.l0,
        "explained_variance_at_k": explained_variance(rows, at_k(sae, rows, k)),
    }


def write_table(rows: list[dict[str, Any]], path: Path) -> None:
    """Write a table for each set, the best of each column in bold."""
    lines = [
        "# One setting at a time",
        "",
        "`python -m benchmarks.trials` makes this table: BatchTopK SAEs by the defaults, and with",
        "one setting changed. Scores are measured on vectors of some of the images. Explained",
        "variance is that with the threshold at which exactly k latents fire on a vector.",
    ]
    for name in dict.fromkeys(row["set"] for row in rows):
        some = [row for row in rows if row["set"] == name]
        wanted = TRIED[name]
        lines += [
            *("", f"## {name}", ""),
            f"{wanted.d_sae:,} latents, k {wanted.k}, {some[0]['tokens']:,} vectors drawn, "
            f"`{wanted.hook_name}`, seed {some[0]['seed']}",
            *("", "| settings | alive | dense | L0 | explained variance | CPU seconds |"),
            "|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['trial']} | {row['alive']} | {row['dense']} | {row['l0']:.1f} | "
            f"{row['explained_variance_at_k']:.4f} | {row['cpu_seconds']:.0f} |"
            for row in some
        ]
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sets", nargs="*", default=list(TRIED), choices=list(TRIED))
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"))
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    file = RESULTS / "trials.json"
    found = json.loads(file.read_text()) if file.is_file() else {"rows": []}
    found["environment"] = machine("sae-lens", "vision-plugin")
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in arguments.sets:
        wanted = TRIED[name]
        store, rows = vectors(name, arguments.folder)
        for trial, changes in TRIALS.items():
            key = {"set": name, "trial": trial, "tokens": arguments.tokens, "seed": arguments.seed}
            if any(key.items() <= row.items() for row in found["rows"]):
                continue
            runner = VisionSAETrainingRunner(
                config(wanted, changes, arguments.seed, arguments.tokens, store), images=store
            )
            begin = time.process_time()
            sae = runner.run()
            took = time.process_time() - begin
            row = {**key, **score(sae, rows, wanted.k), "cpu_seconds": took}
            found["rows"].append(row)
            file.write_text(json.dumps(found, indent=1) + "\n")
            logger.info("%s", row)
    write_table(found["rows"], file.with_suffix(".md"))


if __name__ == "__main__":
    sys.exit(main())
