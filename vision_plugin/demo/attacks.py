"""Typographic attacks in the drawn world: the same scenes with and without a word that misleads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch

from vision_plugin.demo import FACTORS, draw, render, zero_shot_prompts
from vision_plugin.tasks import Attack, TypographicData

OTHERS = ("shape", "colour", "texture", "background")
Kind = Literal["shape", "colour"]


def typographic_data(
    model: Any,
    kind: Kind,
    *,
    train: int = 600,
    validation: int = 400,
    test: int = 1000,
    seed: int = 1000,
) -> TypographicData:
    """Draw pairs of images with and without a printed word that names another shape or colour.

    Args:
        model: A VisionBridge, which prepares the images.
        kind: What the words name.
        train: Number of pairs in which latents are found.
        validation: Number of pairs on which is chosen.
        test: Number of pairs that are reported on.
        seed: Seed of the images; the next two are those of validation and test.
    """
    prompts, classes = zero_shot_prompts(kind)
    others = {name: zero_shot_prompts(name)[0] for name in OTHERS if name != kind}
    sizes = (train, validation, test)
    found, chosen, reported = (attack(model, kind, n, seed=seed + i) for i, n in enumerate(sizes))
    return TypographicData(kind, classes, prompts, found, chosen, reported, others)


def attack(model: Any, kind: Kind, n: int, *, seed: int) -> Attack:
    """Draw pairs of images with and without a printed word that names another shape or colour."""
    drawn = draw(n, seed=seed, words=1.0, naming=kind, conflicting=True)
    values = FACTORS[kind]
    words = [str(scene.word) for scene in drawn.scenes]
    clean = [render(replace(scene, word=None)) for scene in drawn.scenes]
    return Attack(
        clean=model.preprocess(clean),
        attacked=model.preprocess(list(drawn.images)),
        labels=torch.tensor([values.index(scene.value(kind)) for scene in drawn.scenes]),
        printed=torch.tensor([values.index(word) for word in words]),
    )
