"""Scoring a wide SAE on sparse latents, beside the same metrics on dense ones.

    python -m benchmarks.evaluation             # 65,536 latents at ViT-B/32's width; minutes
    python -m benchmarks.evaluation --small     # a look at whether it works

Both ways run in turn in one process, on the same activations. What differs is the form in which
latents go from the SAE to the metrics. Writes ``benchmarks/results/evaluation.json``.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from sae_lens import TopKSAE, TopKSAEConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

from benchmarks._kernel_timing import interleaved
from benchmarks._machine import machine
from vision_plugin import metrics
from vision_plugin.evaluation import LazyBatch
from vision_plugin.models import TokenLatents, encode_tokens

logger = logging.getLogger("benchmarks.evaluation")

RESULTS = Path(__file__).parent / "results" / "evaluation.json"
METRICS = ("sparsity", "fvu", "monosemanticity", "top_images", "localization")
GRID = (7, 7)


def main() -> None:
    """Run both ways and write what they cost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a narrow SAE and few images")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
    d_sae, n_images = (1024, 16) if options.small else (65_536, 96)
    batches = make_batches(n_images)
    sae = make_sae(d_sae)
    found: dict[str, dict[str, float | int]] = {}

    def sparse() -> None:
        found["sparse"] = score(sae, batches, dense=False)

    def dense() -> None:
        found["dense"] = score(sae, batches, dense=True)

    times = interleaved(
        {"sparse": sparse, "dense": dense}, repetitions=options.repetitions, device="cpu"
    )
    apart = max(
        abs(found["sparse"][key] - value) / max(1.0, abs(value))
        for key, value in found["dense"].items()
    )
    result = {
        "machine": machine("sae-lens", "torchmetrics"),
        "setting": {
            "d_in": 768,
            "d_sae": d_sae,
            "k": 32,
            "images": n_images,
            "tokens_per_image": 50,
            "images_per_batch": len(batches[0]["source"]),
            "metrics": METRICS,
        },
        "ways": {name: asdict(timing) for name, timing in times.items()},
        "dense_over_sparse": {
            "time": times["dense"].median_ms / times["sparse"].median_ms,
            "peak": times["dense"].peak_mib / max(1.0, times["sparse"].peak_mib),
        },
        "largest_relative_difference": apart,
    }
    logger.info("%s", json.dumps(result, indent=1))
    out = options.out or (None if options.small else RESULTS)
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


def make_sae(d_sae: int) -> TopKSAE:
    """A TopK SAE of random weights."""
    torch.manual_seed(0)
    sae = TopKSAE(TopKSAEConfig(d_in=768, d_sae=d_sae, k=32))
    with torch.no_grad():
        sae.W_enc.normal_(std=768**-0.5)
        sae.W_dec.copy_(sae.W_enc.T)
    return sae


def make_batches(n_images: int, at_once: int = 32) -> list[dict[str, torch.Tensor]]:
    """Activations of 50 tokens an image, and an embedding of each image."""
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "source": torch.randn(min(at_once, n_images - start), 50, 768, generator=generator),
            "embeddings": torch.randn(min(at_once, n_images - start), 512, generator=generator),
        }
        for start in range(0, n_images, at_once)
    ]


@torch.no_grad()
def score(
    sae: TopKSAE, batches: list[dict[str, torch.Tensor]], *, dense: bool
) -> dict[str, float | int]:
    """Encode, decode, and feed every metric."""
    known: dict[str, Any] = {
        "n_features": int(sae.cfg.d_sae),
        "d_in": 768,
        "d_embed": 512,
        "grid_size": GRID,
        "token_kinds": ("cls", *["patch"] * 49),
    }
    scores = metrics.MetricSet(METRICS, known, options={"localization": {"min_active_patches": 1}})
    patches = torch.arange(1, 50)
    for batch in batches:
        if dense:
            acts = sae.encode(batch["source"])
            latents = TokenLatents(acts.flatten(0, 1), sae.decode(acts))
        else:
            latents = encode_tokens(sae, batch["source"])
        makers = latents.entries("max", patches)
        scores.update(
            LazyBatch(makers).plus(activations=batch["source"], embeddings=batch["embeddings"])
        )
    return {key: value for key, value in scores.scalars().items() if value == value}


if __name__ == "__main__":
    main()
