"""``vision-plugin steer``: hold latents at a value and see what the model then sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from vision_plugin._inputs import Inputs, check_template, sentences
from vision_plugin._ours import check_replaceable_file
from vision_plugin._paths import local_path
from vision_plugin._progress import Progress
from vision_plugin.cli._console import console
from vision_plugin.cli._flags import parse

KIND = "vision_plugin.steering/"
BATCH = 32
"""Images that are steered at once."""


@dataclass(frozen=True, kw_only=True)
class SteerConfig(Inputs):
    """Latents to steer, images to steer on, and concepts to look for."""

    sae: str
    """Folder of the SAE, or any checkpoint that ``vp.load_sae`` reads."""
    latents: tuple[int, ...]
    """Numbers of the latents to hold, one or several."""
    strength: float = 150.0
    """Activation to hold the latents at; 0 suppresses them."""
    concepts: str
    """Concepts to look for: ``labels`` or ``column:NAME`` of the images; a text file, one a line;
    or ``demo`` for every factor of drawn images, whose labels are their shapes alone."""
    concept_template: str = "{}"
    """Sentence around a concept, for example ``a picture of {}``."""
    n_images: int = 8
    """Number of images to steer on, spread evenly over the source."""
    tokens: str = "all"
    """Tokens to steer: ``cls``, ``patch``, ``all`` or ``random:n``."""
    output_path: str | None = None
    """JSON file for the probabilities; None writes none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.latents:
            raise ValueError("name at least one latent: --latents 12")
        if self.n_images < 1:
            raise ValueError(f"n_images={self.n_images} must be at least 1")
        check_template(self.concept_template, argument="concept_template")


def run(arguments: Sequence[str]) -> None:
    """Steer from flags and print each image's likeliest concept before and after."""
    cfg = parse(
        SteerConfig,
        arguments,
        command="steer",
        description="Hold latents of an SAE at a value and compare what the model sees in "
        "images before and during steering.",
    )
    place = None if cfg.output_path is None else local_path(cfg.output_path)
    if place is not None:
        check_replaceable_file(place, KIND)
    ids, effect = compute(cfg)
    out = console()
    out.print(effect_table(cfg, ids, effect))
    gains = ", ".join(f"{name} {gain:+.3f}" for name, gain in effect.gains())
    out.print(f"Largest mean gains in probability: {gains}")
    if place is not None:
        from vision_plugin._disk import write_json

        check_replaceable_file(place, KIND)
        content = {
            "schema": f"{KIND}1",
            "latents": list(cfg.latents),
            "strength": cfg.strength,
            "ids": ids,
            "concepts": effect.concepts,
            "before": effect.before.tolist(),
            "after": effect.after.tolist(),
        }
        write_json(content, place)


def compute(cfg: SteerConfig) -> tuple[list[str], Any]:
    """Return the ids of the images, and the effect on them."""
    import torch

    from vision_plugin.evaluation import read_concepts
    from vision_plugin.images import read_spread
    from vision_plugin.steering import SteeringEffect, steering_effect

    sae = cfg.open_sae(cfg.sae)
    model = cfg.open_model(sae, where=cfg.sae)
    images = cfg.open_images()
    concepts = read_concepts(cfg.concepts, images)
    template = cfg.concept_template
    texts = model.encode_text(sentences(template, concepts, argument="concept_template"))
    chosen = read_spread(images, cfg.n_images)
    places, read = list(chosen), list(chosen.values())
    effects = []
    with Progress(len(read), "steering") as shown:
        for start in range(0, len(read), BATCH):
            some = read[start : start + BATCH]
            effect = steering_effect(
                model,
                sae,
                model.preprocess(some),
                texts,
                dict.fromkeys(cfg.latents, cfg.strength),
                concepts=concepts,
                tokens=cfg.tokens,
            )
            effects.append(effect)
            shown.advance(len(some))
    before = torch.cat([effect.before for effect in effects])
    after = torch.cat([effect.after for effect in effects])
    return [images.ids[i] for i in places], SteeringEffect(concepts, before, after)


def effect_table(cfg: SteerConfig, ids: Sequence[str], effect: Any) -> Table:
    """Return a table with one row per image."""
    latents = ", ".join(map(str, cfg.latents))
    table = Table(title=f"latent {latents} held at {cfg.strength:g}")
    for heading in ("image", "seen before", "", "seen while steered", ""):
        table.add_column(heading, justify="left" if heading else "right")
    rows = zip(ids, effect.top(effect.before), effect.top(effect.after), strict=True)
    for id, (was, p_was), (now, p_now) in rows:
        table.add_row(id, was, f"{p_was:.2f}", now, f"{p_now:.2f}")
    return table
