"""A page of results on a real model: what SAEs of a DINOv2-S find in clip art, beside controls.

    python -m benchmarks.dinov2                       # everything; about an hour of one thread
    python -m benchmarks.dinov2 --widths 1 4 16       # fewer cells; the page says which ran
    python -m benchmarks.dinov2 --page                # the page and nothing else

BatchTopK and Matryoshka SAEs are trained on all tokens of some pictures (``--sixths``) and scored
on a third of the pictures, which they have not seen, by the protocols of two papers:
monosemanticity, hierarchy and uniqueness (arXiv 2504.02821), sparsity by layer and kind of token
(arXiv 2504.08729); and by sparse probing. Neurons, principal components and random directions are
scored alike.

What has run stays in ``benchmarks/results/dinov2.json`` and is not run again; a killed run goes on
where it was. ``dinov2.md`` beside it is the page, made from the JSON alone, and
``dinov2-features.webp`` shows features. Needs the data folder beside the checkout.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

import vision_plugin as vp
from benchmarks._dinov2_page import page
from benchmarks._dinov2_pictures import draw, standing_out
from benchmarks._dinov2_score import TOKENS, Held, Judged, read, scores
from benchmarks._machine import machine
from vision_plugin import metrics
from vision_plugin.activations import ActivationStore, ExtractionConfig, extract
from vision_plugin.images import open_images
from vision_plugin.sae import VisionSAERunnerConfig, train_many, training_config_class

logger = logging.getLogger("benchmarks.dinov2")

RESULTS = Path(__file__).parent / "results"
SHARED = Path(__file__).parents[2] / "shared"
MODEL = SHARED / "models" / "dinov2-small"
JUDGE = SHARED / "models" / "emoji-clip"
PICTURES = SHARED / "data" / "clipart.parquet"
SCHEMA = "vision_plugin.benchmarks.dinov2/1"
LAST = 11
"""The model's last block."""
SAES = {"BatchTopK": "batchtopk", "Matryoshka": "matryoshka_batchtopk"}
GROUPS = (1 / 16, 3 / 16, 7 / 16, 1)
"""Cumulative widths of the Matryoshka groups, as shares; the first paper's."""
SIXTHS = (1, 4, 2, 5)
"""Which sixth is trained on first, and so on; 0 and 3 are held out."""
SHOWN_AT = (11, 4)
"""Layer and width of the features that are shown, and that a second seed repeats."""


@dataclass(frozen=True)
class Config:
    """What to run, and how much of it."""

    layers: tuple[int, ...] = (11, 8, 5)
    """Blocks behind which to read."""
    widths: tuple[int, ...] = (4, 1, 16, 2, 8)
    """Latents of an SAE, as multiples of the model's width."""
    sixths: int = 2
    """Sixths of the pictures to train on, 1 to 4; the other two are held out."""
    every: int = 1
    """Take every so many-th picture."""
    training_tokens: int = 150_000
    """Vectors that each SAE is trained on."""
    k: int = 20
    """Latents that fire on a vector, on average; the first paper's."""
    threads: int = 1
    """Threads of torch."""
    folder: Path = Path("runs/dinov2")
    """Folder of the activations and of the SAEs; what is there is used again."""
    out: Path = RESULTS
    """Folder of the results."""
    page: bool = False
    """Run nothing; write the page."""


def hook(layer: int) -> str:
    """Where a layer is read."""
    return f"blocks.{layer}.hook_resid_post"


class Found:
    """The JSON of what has been found, written after each part."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.content: dict[str, Any] = {"schema": SCHEMA, "cells": [], "seconds": {}}
        if file.is_file():
            self.content = json.loads(file.read_text())

    def write(self) -> None:
        """Write what is there."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(metrics.to_json(self.content), indent=1) + "\n")

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Take the time of a part, adding to that of earlier runs, and write what it found."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        took = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        before = self.content["seconds"].get(name, {"wall": 0.0, "cpu": 0.0})
        self.content["seconds"][name] = {key: round(before[key] + took[key], 1) for key in took}
        self.write()
        logger.info("%s: %.0f s, %.0f s of CPU", name, took["wall"], took["cpu"])


# ---------------------------------------------------------------------- pictures


def clip_art(cfg: Config) -> tuple[datasets.Dataset, list[datasets.Dataset]]:
    """Return the pictures that are held out, and those to train on in sixths of all."""
    table = pyarrow.parquet.read_table(PICTURES)
    found = datasets.Dataset(table.replace_schema_metadata())
    found = found.cast_column("image", datasets.Image())
    rows = range(0, len(found), cfg.every)
    seen = [found.select(rows[sixth::6]) for sixth in SIXTHS[: cfg.sixths]]
    return found.select(rows[::3]), seen


def stored(cfg: Config, model: Any, name: str, images: Any) -> ActivationStore:
    """Return all tokens of some pictures; a killed extraction goes on."""
    wanted = ExtractionConfig(
        model_name=str(MODEL),
        images="images",
        hook_names=[hook(layer) for layer in sorted({*cfg.layers, LAST})],
        tokens="all",
        dtype="float16",
        output_path=str(cfg.folder / name),
        n_workers=0,
    )
    return extract(wanted, model=model, images=open_images(images))


@torch.no_grad()
def held_out(model: Any, store: ActivationStore, pictures: datasets.Dataset) -> Held:
    """Return the held-out pictures with their folders and what three judges say of them.

    The judges are an outside encoder, the pictures' folders, and the model itself, whose
    embedding is its last normalisation of the class token.
    """
    judge = vp.load_model(str(JUDGE))
    images = open_images(pictures)
    outside = [
        judge.image_features(
            judge.preprocess([images[i] for i in range(n, min(n + 32, len(images)))])
        )
        for n in range(0, len(images), 32)
    ]
    folders = [str(category) for category in pictures["category"]]
    known = sorted(set(folders))
    numbers = torch.tensor([known.index(folder) for folder in folders])
    last = store.activations(hook(LAST))[:, 0].float()
    return Held(
        folders=folders,
        judges={
            "emoji CLIP": torch.cat(outside).float(),
            "folders": torch.nn.functional.one_hot(numbers).float(),
            "the model itself": model.ln_final(last),
        },
    )


# ---------------------------------------------------------------------- dictionaries


def trained(
    cfg: Config, store: ActivationStore, layer: int, width: int, seed: int
) -> dict[str, Any]:
    """Return an SAE of each kind, trained in one pass or loaded from an earlier run."""
    d_sae = width * store.d_in(hook(layer))
    place = cfg.folder / f"saes-{cfg.sixths}-{cfg.training_tokens}" / f"{layer}-x{width}-{seed}"
    if not all((place / kind / "cfg.json").is_file() for kind in SAES):
        cfgs = {}
        for name, kind in SAES.items():
            groups = {"matryoshka_widths": [int(d_sae * share) for share in GROUPS]}
            sized = groups if name == "Matryoshka" else {}
            cfgs[name] = VisionSAERunnerConfig(
                model_name=str(MODEL),
                images="",
                hook_name=hook(layer),
                tokens="all",
                sae=training_config_class(kind)(d_in=0, d_sae=d_sae, k=cfg.k, **sized),
                training_tokens=cfg.training_tokens,
                n_batches_in_buffer=40,
                n_quality_tokens=min(4000, cfg.training_tokens),
                seed=seed,
                output_path=None,
            )
        train_many(cfgs, output_path=str(place), images=store)
    return {name: vp.load_sae(str(place / name)) for name in SAES}


def controls(cfg: Config, rows: Tensor, width: int, *, is_first: bool) -> dict[str, Any]:
    """Return what nobody trained, by name; random directions first.

    Args:
        cfg: As many latents fire as ``cfg.k`` says.
        rows: Some training vectors, ``[n, d_in]``.
        width: Multiple of the model's width.
        is_first: Whether to return neurons and components, too, whose width is the model's.
    """
    d_in, centre = rows.shape[1], rows.mean(0)
    drawn = metrics.random_dictionary(d_in, width * d_in, k=cfg.k, seed=0)
    found = {"random": metrics.ControlDictionary("random", drawn.W_dec, centre, k=cfg.k)}
    if is_first:
        found["neurons"] = metrics.neuron_dictionary(d_in)
        found["PCA"] = metrics.pca_dictionary(rows, k=cfg.k)
    return found


def cells(
    cfg: Config, found: Found, held: Held, store: ActivationStore, seen: ActivationStore
) -> None:
    """Train and score what is missing: both kinds of SAE and the controls, width by width."""
    for layer, width, seed in wanted_units(cfg, found.content):
        with found.part(f"train layer {layer} x{width}"):
            saes = trained(cfg, seen, layer, width, seed)
        with found.part(f"score layer {layer} x{width}"):
            x = store.activations(hook(layer))[:, TOKENS].float()
            rows = seen.activations(hook(layer), range(0, len(seen), 10))[:, TOKENS]
            before = {(c["layer"], c["dictionary"]) for c in found.content["cells"]}
            is_first = (layer, "neurons") not in before
            untrained = controls(cfg, rows.float().flatten(0, 1), width, is_first=is_first)
            random: Judged | None = None
            made = []
            for name, dictionary in (untrained | saes).items():
                groups = [int(x.shape[2] * width * share) for share in GROUPS]
                one = read(dictionary, x)
                cell, judged = scores(one, held, random, groups if name == "Matryoshka" else None)
                random = random or judged
                own = width if name in SAES or name == "random" else 1
                made.append({"layer": layer, "width": own, "seed": seed, "dictionary": name} | cell)
            if seed:
                made = [cell for cell in made if cell["dictionary"] in SAES]
            found.content["cells"] += made


@torch.no_grad()
def maps(cfg: Config, found: Found, store: ActivationStore, seen: ActivationStore) -> None:
    """Count the latents that fire at each place of the picture, at all of its patches."""
    grid = store.plan.tokens.grid
    kinds = ["cls"] + ["patch"] * (grid[0] * grid[1])
    every = found.content.setdefault("maps", {})
    for layer in sorted(cfg.layers):
        if str(layer) in every:
            continue
        with found.part("maps"):
            sae = trained(cfg, seen, layer, SHOWN_AT[1], 0)["BatchTopK"]
            sparsity = metrics.Sparsity(n_features=sae.cfg.d_sae, token_kinds=kinds)
            for part in store.activations(hook(layer)).split(16):
                sparsity.update(sae.encode(part.float()))
            every[str(layer)] = metrics.l0_map(sparsity.compute(), kinds, grid).tolist()


def shown(
    cfg: Config,
    found: Found,
    held: Held,
    store: ActivationStore,
    seen: ActivationStore,
    pictures: datasets.Dataset,
) -> None:
    """Draw the features that stand out, and some from the middle."""
    layer, width = SHOWN_AT
    with found.part("pictures"):
        sae = trained(cfg, seen, layer, width, 0)["BatchTopK"]
        activations = store.activations(hook(layer))
        chosen = standing_out(read(sae, activations[:, TOKENS].float()), held)
        draw(chosen, sae, activations, pictures, cfg.out / "dinov2-features.webp")
        found.content["features"] = {"layer": layer, "width": width, "rows": chosen}


# ---------------------------------------------------------------------- all of it


def wanted_units(cfg: Config, content: dict[str, Any]) -> list[tuple[int, ...]]:
    """Return layer, width and seed of what was asked for and has not run."""
    ran = [cell for cell in content["cells"] if cell["dictionary"] in SAES]
    done = {(cell["layer"], cell["width"], cell["seed"]) for cell in ran}
    every = [(layer, width, 0) for width in cfg.widths for layer in cfg.layers]
    if SHOWN_AT in [unit[:2] for unit in every]:
        every.append((*SHOWN_AT, 1))
    return [unit for unit in every if unit not in done]


def settings(
    cfg: Config, pictures: datasets.Dataset, to_train_on: list[datasets.Dataset]
) -> dict[str, Any]:
    """Return what a result depends on; runs that differ in it do not mix."""
    return {
        "n_pictures": pyarrow.parquet.read_metadata(PICTURES).num_rows,
        "n_seen": sum(map(len, to_train_on)),
        "n_held": len(pictures),
        "every": cfg.every,
        "training_tokens": cfg.training_tokens,
        "k": cfg.k,
        "tokens_scored": len(TOKENS),
        "n_folders": len(set(pictures["category"])),
    }


def run(cfg: Config, found: Found) -> None:
    """Run what is missing.

    Raises:
        ValueError: the results are those of other settings.
    """
    torch.set_num_threads(cfg.threads)
    pictures, to_train_on = clip_art(cfg)
    asked = settings(cfg, pictures, to_train_on)
    before = found.content.setdefault("settings", asked)
    if before != asked:
        raise ValueError(
            f"{found.file} holds results of {before}, not of {asked}: give another --out"
        )
    found.content["environment"] = machine("sae-lens", "transformers", "scikit-learn")
    model = vp.load_model(str(MODEL))
    with found.part("extract"):
        store = stored(cfg, model, "held", pictures)
        parts = [stored(cfg, model, f"seen-{n}", part) for n, part in enumerate(to_train_on)]
        seen = ActivationStore.concatenate(parts)
    with found.part("judges"):
        held = held_out(model, store, pictures)
    if SHOWN_AT[1] in cfg.widths:
        if SHOWN_AT[0] in cfg.layers and "features" not in found.content:
            shown(cfg, found, held, store, seen, pictures)
        maps(cfg, found, store, seen)
    cells(cfg, found, held, store, seen)


def main(cfg: Config) -> None:
    """Run what is missing, and write the page."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found = Found(cfg.out / "dinov2.json")
    if not cfg.page:
        run(cfg, found)
    found.file.with_suffix(".md").write_text(page(found.content))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
