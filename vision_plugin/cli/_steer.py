"""``vision-plugin steer``: hold latents at a value and see what the model then sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vision_plugin.cli._flags import parse


@dataclass(frozen=True, kw_only=True)
class SteerConfig:
    """What to steer, on which images, and which concepts to look for."""

    sae: str
    """Folder of the SAE, or any checkpoint that ``vp.load_sae`` reads."""
    images: str
    """Folder, ``imagefolder:...``, Parquet file, data set name, tar shards, or ``demo:N``."""
    latents: tuple[int, ...]
    """Latents to hold, one or several."""
    strength: float = 150.0
    """Value to hold them at; 0 suppresses them."""
    concepts: str
    """What to look for: ``labels`` or ``column:NAME`` of the images, or a text file, a concept a
    line."""
    concept_template: str = "{}"
    """Sentence around a concept, for example ``a picture of {}``."""
    n_images: int = 8
    """Images, evenly spread over the images."""
    model_name: str | None = None
    """The model; by default the one the SAE's metadata names."""
    tokens: str = "all"
    """Tokens to steer: ``cls``, ``patch``, ``all`` or ``random:n``."""
    output_path: str | None = None
    """JSON file for the probabilities, if wanted."""
    image_column: str | None = None
    """Column of images, where a data set has several."""
    split: str | None = None
    """Split of a data set."""
    device: str = "cpu"
    """Where to compute."""

    def __post_init__(self) -> None:
        if not self.latents:
            raise ValueError("name at least one latent: --latents 12")
        if self.n_images < 1:
            raise ValueError(f"n_images={self.n_images}: at least one image is needed")


def run(arguments: Sequence[str]) -> None:
    """Steer from flags and print what the images were and are taken for."""
    from vision_plugin.evaluation import write_json

    cfg = parse(
        SteerConfig,
        arguments,
        command="steer",
        description="Hold latents of an SAE at a value and compare what the model sees in "
        "images before and while it is steered.",
    )
    ids, effect = compute(cfg)
    console = Console()
    console.print(effect_table(cfg, ids, effect))
    gains = ", ".join(f"{name} {gain:+.3f}" for name, gain in effect.gains())
    console.print(f"Largest mean gains in probability: {gains}", highlight=False)
    if cfg.output_path is not None:
        content = {
            "latents": list(cfg.latents),
            "strength": cfg.strength,
            "ids": ids,
            "concepts": effect.concepts,
            "before": effect.before.tolist(),
            "after": effect.after.tolist(),
        }
        write_json(content, Path(cfg.output_path))


def compute(cfg: SteerConfig) -> tuple[list[str], Any]:
    """Ids of the images, and the effect on them."""
    from vision_plugin.evaluation import model_of, read_concepts
    from vision_plugin.formats import load_sae
    from vision_plugin.images import open_images
    from vision_plugin.models import load_model
    from vision_plugin.steering import steering_effect

    sae = load_sae(cfg.sae, device=cfg.device)
    model = load_model(cfg.model_name or model_of(sae, cfg.sae), device=cfg.device)
    images = open_images(cfg.images, column=cfg.image_column, split=cfg.split)
    concepts = read_concepts(cfg.concepts, images)
    step = max(1, len(images) // cfg.n_images)
    chosen = list(range(0, len(images), step))[: cfg.n_images]
    effect = steering_effect(
        model,
        sae,
        model.preprocess([images[i] for i in chosen]),
        model.encode_text([cfg.concept_template.format(concept) for concept in concepts]),
        dict.fromkeys(cfg.latents, cfg.strength),
        concepts=concepts,
        tokens=cfg.tokens,
    )
    return [images.ids[i] for i in chosen], effect


def effect_table(cfg: SteerConfig, ids: Sequence[str], effect: Any) -> Table:
    """One row per image."""
    latents = ", ".join(map(str, cfg.latents))
    table = Table(title=f"latent {latents} held at {cfg.strength:g}")
    for heading in ("image", "seen before", "", "seen while steered", ""):
        table.add_column(heading, justify="left" if heading else "right")
    rows = zip(ids, effect.top(effect.before), effect.top(effect.after), strict=True)
    for id, (was, p_was), (now, p_now) in rows:
        table.add_row(id, was, f"{p_was:.2f}", now, f"{p_now:.2f}")
    return table
