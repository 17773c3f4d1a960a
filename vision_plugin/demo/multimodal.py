"""Drawn images and questions about them, for steering the small LLaVA."""

from __future__ import annotations

import torch

from vision_plugin.demo import FACTORS, draw
from vision_plugin.demo.dialogue import QUESTIONS
from vision_plugin.tasks import AskedImages, MultimodalData


def multimodal_data(
    *, train: int = 600, validation: int = 150, test: int = 150, seed: int = 2000
) -> MultimodalData:
    """Draw images whose shape, colour, texture and background are asked for.

    Args:
        train: Number of images on which latents are found.
        validation: Number of images on which is chosen.
        test: Number of images that are reported on.
        seed: Seed of the images; the next two are those of validation and test.
    """
    return MultimodalData(
        QUESTIONS,
        {factor: FACTORS[factor] for factor in QUESTIONS},
        train=asked(train, seed=seed),
        validation=asked(validation, seed=seed + 1),
        test=asked(test, seed=seed + 2),
        locator="colour",
        beside=frozenset({"background"}),
    )


def asked(n: int, *, seed: int) -> AskedImages:
    """Draw images with the right answers."""
    world = draw(n, seed=seed)
    labels = {
        factor: torch.tensor([FACTORS[factor].index(s.value(factor)) for s in world.scenes])
        for factor in QUESTIONS
    }
    return AskedImages(list(world.images), labels)
