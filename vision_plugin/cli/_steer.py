"""``vision-plugin steer``: hold latents at a value and see what the model then sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vision_plugin._inputs import Inputs, check_template, sentences
from vision_plugin._ours import check_replaceable_file
from vision_plugin._paths import local_path
from vision_plugin._progress import Progress
from vision_plugin._rich import Table
from vision_plugin.cli._console import console
from vision_plugin.cli._flags import parse
from vision_plugin.cli._name import resolve_latents

KIND = "vision_plugin.steering/"
STRENGTH = 150.0
BATCH = 32
"""Images that are steered at once."""


@dataclass(frozen=True, kw_only=True)
class SteerConfig(Inputs):
    """Latents to steer, images to steer on, and concepts to look for."""

    sae: str | None = None
    """Folder of the SAE, or any checkpoint that ``vp.load_sae`` reads."""
    latents: tuple[int | str, ...] = ()
    """Latents to hold, by number, or as ``name:WORD`` for all whose name in ``names.json`` beside
    the SAE has that word."""
    edit: str | None = None
    """JSON file of an edit to make in place of ``latents``; ``Edit.save`` and ``tasks`` write it.
    It names its SAE, or ``sae`` does."""
    strength: float = STRENGTH
    """Activation to hold the latents at; 0 suppresses them."""
    concepts: str
    """Concepts to look for: ``labels`` or ``column:NAME`` of the images; a text file, one a line;
    or ``demo`` for every factor of drawn images, whose labels are their shapes alone."""
    concept_template: str = "{}"
    """Sentence around a concept, for example ``a picture of {}``."""
    n_images: int = 8
    """Number of images to steer on, spread evenly over the source."""
    tokens: str | None = None
    """Tokens to steer: ``cls``, ``patch``, ``all`` or ``random:n``; by default those that the SAE
    was trained on. An edit names its own."""
    output_path: str | None = None
    """JSON file for the probabilities; None writes none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.edit is not None and self.latents:
            raise ValueError("an edit names its latents itself: leave out --latents or --edit")
        if self.edit is not None and (self.strength, self.tokens) != (STRENGTH, None):
            raise ValueError(
                "an edit says how much and on which tokens: leave out --strength and --tokens"
            )
        if self.edit is None and not self.latents:
            raise ValueError("name at least one latent: --latents 12, or an edit: --edit FILE")
        if self.edit is None and self.sae is None:
            raise ValueError("name the SAE whose latents are held: --sae FOLDER")
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
    edit, ids, effect, score = compute(cfg)
    out = console()
    out.print(effect_table(cfg, ids, effect, held(edit)))
    gains = ", ".join(f"{name} {gain:+.3f}" for name, gain in effect.gains())
    out.print(f"Largest mean gains in probability: {gains}")
    out.print(
        f"Steerability (sum of squared mean changes): {float(score.score[0]):.3f}, "
        f"{'above' if bool(score.steerable[0]) else 'not above'} {score.threshold:.2f}"
    )
    if place is not None:
        from vision_plugin._disk import write_json

        check_replaceable_file(place, KIND)
        content = {
            "schema": f"{KIND}1",
            **({} if cfg.edit else {"latents": held(edit), "strength": cfg.strength}),
            "edit": edit.to_dict(sae=cfg.sae),
            "ids": ids,
            "concepts": effect.concepts,
            "before": effect.before.tolist(),
            "after": effect.after.tolist(),
            "steerability": float(score.score[0]),
        }
        write_json(content, place)


def compute(cfg: SteerConfig) -> tuple[Any, list[str], Any, Any]:
    """Return the edit, the ids of the images, the effect on them, and its steerability."""
    import torch

    from vision_plugin.evaluation import read_concepts
    from vision_plugin.images import read_spread
    from vision_plugin.metrics import EditSteerabilityResult
    from vision_plugin.steering import SteeringEffect, edit_effect

    edit, model = open_edit(cfg)
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
            pixels = model.preprocess(some)
            effect = edit_effect(
                model, edit, pixels, texts, concepts=concepts, check_model=cfg.check_model
            )
            effects.append(effect)
            shown.advance(len(some))
    before = torch.cat([effect.before for effect in effects])
    after = torch.cat([effect.after for effect in effects])
    effect = SteeringEffect(concepts, before, after)
    score = EditSteerabilityResult.of({str(edit): effect}, texts)
    return edit, [images.ids[i] for i in places], effect, score


def open_edit(cfg: SteerConfig) -> tuple[Any, Any]:
    """Return the edit that the flags describe, and the model.

    Raises:
        ValueError: nothing names a model, or the edit is of another SAE.
    """
    from vision_plugin.steering import Edit

    sae: Any = None if cfg.sae is None else cfg.open_sae(cfg.sae)
    if cfg.edit is None:
        assert sae is not None  # the configuration has checked it
        latents = resolve_latents(cfg.latents, sae, cfg.sae)
        edit = Edit.clamp(sae, dict.fromkeys(latents, cfg.strength), tokens=cfg.tokens)
        return edit, cfg.open_model(sae, where=str(cfg.sae))
    edit = Edit.load(cfg.edit, sae=sae, device=cfg.device)
    of = next(iter(edit.dictionaries), sae)
    if of is None and cfg.model_name is None:
        raise ValueError(f"{cfg.edit} names no SAE that would name the model: give model_name=")
    return edit, cfg.open_model(of, where=cfg.edit)


def held(edit: Any) -> list[int]:
    """Return the latents that an edit changes."""
    return [target for change in edit.changes for target in change.targets]


def effect_table(cfg: SteerConfig, ids: Sequence[str], effect: Any, held: Sequence[int]) -> Table:
    """Return a table with one row per image."""
    latents = ", ".join(map(str, held))
    title = f"latent {latents} held at {cfg.strength:g}" if cfg.edit is None else cfg.edit
    table = Table(title=title)
    for heading in ("image", "seen before", "", "seen while steered", ""):
        table.add_column(heading, justify="left" if heading else "right")
    rows = zip(ids, effect.top(effect.before), effect.top(effect.after), strict=True)
    for id, (was, p_was), (now, p_now) in rows:
        table.add_row(id, was, f"{p_was:.2f}", now, f"{p_now:.2f}")
    return table
