"""What decides whether trained latents score above random directions in monosemanticity.

    python -m benchmarks.monosemanticity           # half an hour on two cores
    python -m benchmarks.monosemanticity --small   # a minute, to see that it works

The model is the DINOv2-S backbone beside the checkout, the images are the clip art beside it. One
BatchTopK SAE per layer is trained on some of the images. SAE, random directions as sparse and
neurons are then scored on those images and on others, with latents pooled over tokens in three
ways, by three judges of which images are alike: the model itself, another model, and the folders
that people put the images into. ``--cache`` keeps activations and latents for another run.

A table goes to ``benchmarks/results/monosemanticity.md``, every number to ``monosemanticity.json``.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

from benchmarks._machine import machine
from benchmarks._monosemanticity_data import (
    Config,
    Data,
    kept,
    look_at,
    train,
    training_rows,
)
from vision_plugin import metrics
from vision_plugin.metrics import to_json

logger = logging.getLogger("benchmarks.monosemanticity")

RESULTS = Path(__file__).parent / "results"
SCHEMA = "vision_plugin.benchmarks.monosemanticity/1"
POOLING = ("max", "mean", "class token")
N_GROUPS = 10
"""Groups of images that are left out in turn to see how much the images matter."""


@dataclass(frozen=True)
class Row:
    """One comparison at equal firing."""

    layer: int
    trained_on: str
    """``all tokens`` or ``class token``."""
    pooling: str
    judge: str
    centred: bool
    """Whether the mean embedding is subtracted."""
    random: str
    """``as they are``, or ``centred``: directions in activations minus their mean."""
    images: str
    """``held out`` or ``trained on``."""
    n_images: int
    mean_similarity: float
    sae: float
    """Mean over the SAE's latents."""
    control: float
    """Mean over random directions."""
    neurons: float
    """Mean over neurons."""
    difference: float
    """Of SAE and random directions at equal firing."""
    low: float
    high: float
    standard_error: float
    error_over_images: float
    """Standard error of the difference when groups of images are left out; NaN where not asked."""
    n_latents: int
    n_left_out: int


@torch.no_grad()
def pool(
    dictionary: Any, activations: np.ndarray, chosen: range
) -> tuple[dict[str, Tensor], float]:
    """Latents of images by pooling, and how many are active per token."""
    parts: dict[str, list[Tensor]] = {how: [] for how in POOLING}
    active = 0
    for start in range(chosen.start, chosen.stop, 16):
        rows = activations[start : min(start + 16, chosen.stop)].astype(np.float32)
        latents = dictionary.encode(torch.from_numpy(rows))
        active += int((latents != 0).sum())
        pooled = (latents.amax(1), latents.mean(1), latents[:, 0])
        for how, found in zip(POOLING, pooled, strict=True):
            parts[how].append(found)
    n_tokens = len(chosen) * activations.shape[1]
    return {how: torch.cat(found) for how, found in parts.items()}, active / n_tokens


def compare(
    latents: Mapping[str, Tensor], embeddings: Tensor, *, groups: int = 0
) -> dict[str, Any]:
    """The SAE's scores beside the controls', and the comparison at equal firing."""
    found = {name: metrics.monosemanticity(part, embeddings) for name, part in latents.items()}
    result = metrics.compare_at_equal_firing(found["sae"], found["random"])
    means = {name: part.summary()["mean_score"] for name, part in found.items()}
    return {
        "mean_similarity": found["sae"].mean_similarity,
        "sae": means["sae"],
        "control": means["random"],
        "neurons": means["neurons"],
        "difference": result.difference,
        "low": result.low,
        "high": result.high,
        "standard_error": result.standard_error,
        "error_over_images": jackknife(latents, embeddings, groups) if groups else math.nan,
        "n_latents": result.n_latents,
        "n_left_out": result.n_left_out,
    }


def jackknife(latents: Mapping[str, Tensor], embeddings: Tensor, groups: int) -> float:
    """Standard error of the difference over images: leave out one group of them at a time."""
    place = torch.arange(len(embeddings)) % groups
    differences = []
    for group in range(groups):
        kept = place != group
        found = [
            metrics.monosemanticity(latents[name][kept], embeddings[kept])
            for name in ("sae", "random")
        ]
        differences.append(metrics.compare_at_equal_firing(*found).difference)
    spread = torch.tensor(differences, dtype=torch.float64)
    return math.sqrt((groups - 1) / groups * float((spread - spread.mean()).square().sum()))


def centre(embeddings: Tensor) -> Tensor:
    """Embeddings of norm 1 without their mean."""
    unit = F.normalize(embeddings.double(), dim=1)
    return unit - unit.mean(0)


def study(cfg: Config, data: Data, layer: int, kind: str) -> tuple[dict[str, Any], list[Row]]:
    """Train an SAE of all tokens or of the class token at one layer, and compare it.

    Returns:
        How good the SAE is on held-out images, and every comparison.
    """
    activations, n_vectors = data.activations[layer], cfg.training_tokens
    if kind == "class token":  # of which an image has one
        activations, n_vectors = activations[:, :1], max(cfg.batch, n_vectors // 4)
    parts = {
        "trained on": range(min(cfg.n_trained, cfg.n_scored)),
        "held out": range(cfg.n_trained, cfg.n_trained + cfg.n_scored),
    }
    name = f"latents-{layer}-{kind.replace(' ', '-')}"
    pooled = kept(cfg, name, lambda: train_and_pool(cfg, activations, n_vectors, parts))
    rows: list[Row] = []
    for images, chosen in parts.items():
        fixed = {"layer": layer, "trained_on": kind, "images": images}
        last = layer == max(cfg.layers)
        rows += compare_all(cfg, data, pooled["latents"][images], chosen, fixed, last=last)
    return {"layer": layer, "trained_on": kind, "n_vectors": n_vectors, **pooled["facts"]}, rows


def train_and_pool(
    cfg: Config, activations: np.ndarray, n_vectors: int, parts: Mapping[str, range]
) -> dict[str, Any]:
    """Train an SAE, and pool its latents and its controls' over the tokens of each image."""
    trained_on = training_rows(cfg, activations, cfg.n_trained)
    sae = train(cfg, trained_on, n_vectors)
    found = {
        images: pool_all(cfg, sae, trained_on.mean(0), activations, chosen)
        for images, chosen in parts.items()
    }
    return {
        "latents": {images: latents for images, (latents, _) in found.items()},
        "facts": {**found["held out"][1], **fidelity(sae, activations, parts["held out"])},
    }


def pool_all(
    cfg: Config, sae: Any, mean: Tensor, activations: np.ndarray, chosen: range
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Image-level latents of the SAE and its controls by pooling, and the SAE's sparsity."""
    d_in = activations.shape[2]
    found, l0 = pool(sae, activations, chosen)
    drawn = metrics.random_dictionary(d_in, cfg.d_sae, k=max(1, round(l0)), seed=cfg.seed)
    controls = {
        "random": drawn,
        "moved": metrics.ControlDictionary("centred", drawn.W_dec, mean, k=drawn.k),
        "neurons": metrics.neuron_dictionary(d_in),
    }
    latents = {name: pool(each, activations, chosen)[0] for name, each in controls.items()}
    alive = int((found["max"] > 0).any(0).sum())
    return {"sae": found, **latents}, {"l0": l0, "alive": alive}


@torch.no_grad()
def fidelity(sae: Any, activations: np.ndarray, chosen: range) -> dict[str, Any]:
    """Explained variance on a few images."""
    few = activations[chosen.start : chosen.start + min(200, len(chosen))]
    rows = torch.from_numpy(few.astype(np.float32)).flatten(0, 1)
    metric = metrics.FVU(d_in=rows.shape[1])
    for part in rows.split(4096):
        metric.update(part, sae.decode(sae.encode(part)))
    return {"explained_variance": metric.compute().explained_variance}


def compare_all(
    cfg: Config,
    data: Data,
    latents: Mapping[str, Mapping[str, Tensor]],
    chosen: range,
    fixed: dict[str, Any],
    *,
    last: bool,
) -> Iterator[Row]:
    """Every pooling and judge; at the last layer fewer images and the effect of the images too."""
    of_class_token = fixed["trained_on"] == "class token"
    more = last and fixed["images"] == "held out" and not of_class_token
    for pooling in ("class token",) if of_class_token else POOLING:
        three = {name: latents[name][pooling] for name in ("sae", "random", "neurons")}
        moved = {**three, "random": latents["moved"][pooling]}
        for judge, embeddings in data.judges.items():
            here = embeddings[chosen.start : chosen.stop]
            named = {**fixed, "pooling": pooling, "judge": judge}
            kinds = [(three, False, "as they are"), (three, True, "as they are")]
            kinds += [(moved, False, "centred"), (moved, True, "centred")]
            for dictionaries, centred, random in kinds:
                found = compare(
                    dictionaries,
                    centre(here) if centred else here,
                    groups=N_GROUPS if more and dictionaries is three and not centred else 0,
                )
                yield Row(**named, centred=centred, random=random, n_images=len(chosen), **found)
            for n in cfg.fewer if more else ():
                found = compare({name: part[:n] for name, part in three.items()}, here[:n])
                yield Row(**named, centred=False, random="as they are", n_images=n, **found)


def table(cfg: Config, rows: list[Row]) -> str:
    """The main comparisons as Markdown."""
    judges = list(dict.fromkeys(row.judge for row in rows))
    lines = [
        "Mean monosemanticity of SAE latents minus that of random directions at equal firing, with "
        f"its 95% interval. BatchTopK, {cfg.d_sae} latents, k {cfg.k}, "
        f"{cfg.training_tokens:,} vectors of {cfg.n_trained:,} images; embeddings as they are.",
        "",
        f"| layer | SAE of | pooling | images | {' | '.join(judges)} |",
        f"|---|---|---|---|{'---|' * len(judges)}",
    ]
    plain = [row for row in rows if not row.centred and row.random == "as they are"]
    by_place: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in plain:
        place = (row.layer, row.trained_on, row.pooling, f"{row.n_images} {row.images}")
        by_place.setdefault(place, {})[row.judge] = row
    for place, found in by_place.items():
        cells = [_cell(found[judge]) for judge in judges]
        lines.append(f"| {' | '.join(str(part) for part in place)} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(row: Row) -> str:
    if math.isnan(row.difference):
        return "-"
    text = f"{row.difference:+.4f} ({row.low:+.4f} to {row.high:+.4f})"
    return f"**{text}**" if row.low > 0 else text


def main() -> None:
    """Run the models, train, compare, print and write."""
    cfg = tyro.cli(Config, description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if cfg.small:
        cfg = replace(cfg, layers=cfg.layers[-1:], n_trained=64, n_scored=64, fewer=(32,))
        cfg = replace(cfg, d_sae=256, training_tokens=20_000)
    torch.set_num_threads(cfg.threads)
    start = time.perf_counter()
    data = look_at(cfg)
    logger.info("ran the models in %.0f s", time.perf_counter() - start)
    rows, saes = [], []
    out = cfg.out or (None if cfg.small else RESULTS)
    for layer in sorted(cfg.layers, reverse=True):
        kinds = ("all tokens", "class token") if layer == max(cfg.layers) else ("all tokens",)
        for kind in kinds:
            facts, found = study(cfg, data, layer, kind)
            saes.append(facts)
            rows += found
            seconds = time.perf_counter() - start
            logger.info("%s after %.0f s", facts, seconds)
            text = table(cfg, rows)
            if out is not None:
                write(cfg, saes, rows, seconds, text, out)
    Console().print(Markdown(text))


def write(
    cfg: Config,
    saes: list[dict[str, Any]],
    rows: list[Row],
    seconds: float,
    text: str,
    out: Path,
) -> None:
    """The table, and every number with what it was measured on."""
    out.mkdir(parents=True, exist_ok=True)
    names = ("model_name", "other_model", "images")
    settings = {**asdict(cfg), "out": None, "cache": None}
    settings |= {name: Path(getattr(cfg, name)).name for name in names}
    document = {
        "schema": SCHEMA,
        "machine": machine("sae-lens", "transformer-lens"),
        "config": settings,
        "seconds": seconds,
        "saes": saes,
        "rows": [asdict(row) for row in rows],
    }
    (out / "monosemanticity.json").write_text(json.dumps(to_json(document), indent=1) + "\n")
    (out / "monosemanticity.md").write_text(text)


if __name__ == "__main__":
    main()
