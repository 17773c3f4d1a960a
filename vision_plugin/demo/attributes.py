"""Factors in the drawn world: images whose every attribute is known."""

from __future__ import annotations

from typing import Any

import torch

from vision_plugin.demo import FACTORS, draw, zero_shot_prompts
from vision_plugin.tasks import FactorData, FactorSplit

NAMED = ("shape", "colour", "texture", "background")
"""Factors that the packaged CLIP reads zero-shot."""


def factor_data(
    model: Any,
    *,
    factors: tuple[str, ...] = NAMED,
    train: int = 600,
    validation: int = 300,
    test: int = 500,
    readers: int = 0,
    seed: int = 3000,
) -> FactorData:
    """Draw images whose factors vary independently of each other.

    Args:
        model: A VisionBridge, which prepares the images.
        factors: Names of the factors.
        train: Images in which latents, directions and rotations are found.
        validation: Images on which is chosen.
        test: Images that are reported on.
        readers: Images on which probes are fitted; 0 reads the factors zero-shot.
        seed: Seed of the images; the next three are those of the other splits.

    Raises:
        ValueError: there is no such factor.
    """
    unknown = [factor for factor in factors if factor not in FACTORS or factor == "word"]
    if unknown:
        known = ", ".join(factor for factor in FACTORS if factor != "word")
        raise ValueError(f"factors= has {unknown[0]!r}: use some of {known}")
    splits = [
        factor_split(model, factors, n, seed=seed + place) if n else None
        for place, n in enumerate((train, validation, test, readers))
    ]
    found, chosen, reported, probed = splits
    assert found is not None
    assert chosen is not None
    assert reported is not None
    prompts = {} if readers else {factor: zero_shot_prompts(factor)[0] for factor in factors}
    names = {factor: FACTORS[factor] for factor in factors}
    return FactorData(names, found, chosen, reported, probed, prompts)


def factor_split(model: Any, factors: tuple[str, ...], n: int, *, seed: int) -> FactorSplit:
    """Draw images with their factors."""
    drawn = draw(n, seed=seed)
    values = {
        factor: torch.tensor([FACTORS[factor].index(scene.value(factor)) for scene in drawn.scenes])
        for factor in factors
    }
    return FactorSplit(model.preprocess(list(drawn.images)), values)
