"""Groups in the drawn world: a label and a nuisance that go together in training alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch

from vision_plugin.demo import FACTORS, draw, render
from vision_plugin.tasks import GroupData, GroupSplit

OTHERS = ("shape", "colour", "texture", "background")


@dataclass(frozen=True)
class Confound:
    """A factor that is asked, and another that goes along with it, with two values of each."""

    label: str
    classes: tuple[str, str]
    nuisance: str
    values: tuple[str, str]
    unusual: int
    """Training images of each class with the other value, where nobody says how many."""


CONFOUNDS = MappingProxyType(
    {
        "background": Confound("shape", ("circle", "square"), "background", ("night", "sand"), 16),
        "attribute": Confound("texture", ("striped", "dotted"), "colour", ("yellow", "purple"), 8),
    }
)
"""What each task asks and confounds."""


def group_data(
    model: Any,
    task: str,
    *,
    usual: int = 300,
    unusual: int | None = None,
    validation: int = 80,
    test: int = 250,
    seed: int = 2000,
) -> GroupData:
    """Draw images of two classes, each of which has its own value of a nuisance in training.

    Args:
        model: A VisionBridge, which prepares the images.
        task: ``"background"`` (shape and background) or ``"attribute"`` (texture and colour).
        usual: Training images of each class with the value that goes along with it.
        unusual: Training images of each class with the other value: the fewer, the stronger the
            confound. None takes 16 for the background and 8 for the attribute.
        validation: Images of each group on which is chosen.
        test: Images of each group that are reported on.
        seed: Seed of the images; the next three are those of the other splits.
    """
    of = CONFOUNDS[task]
    unusual = of.unusual if unusual is None else unusual
    sizes = [
        (usual, unusual, unusual, usual),
        (validation,) * 4,
        (test,) * 4,
        ((usual + unusual) // 2,) * 4,
    ]
    splits = [group_split(model, of, n, seed=seed + place) for place, n in enumerate(sizes)]
    train, chosen, reported, balanced = splits
    return GroupData(
        of.label, of.nuisance, of.classes, of.values, train, chosen, reported, balanced
    )


def group_split(model: Any, of: Confound, sizes: Sequence[int], *, seed: int) -> GroupSplit:
    """Draw so many images of each group: (0, 0), (0, 1), (1, 0) and (1, 1)."""
    groups = torch.arange(4).repeat_interleave(torch.tensor(sizes))
    labels, nuisance = groups // 2, groups % 2
    scenes = []
    for scene, y, a in zip(
        draw(len(groups), seed=seed).scenes, labels.tolist(), nuisance.tolist(), strict=True
    ):
        changed: dict[str, Any] = {of.label: of.classes[y], of.nuisance: of.values[a]}
        scenes.append(replace(scene, **changed))
    others = {
        name: torch.tensor([FACTORS[name].index(scene.value(name)) for scene in scenes])
        for name in OTHERS
        if name not in (of.label, of.nuisance)
    }
    pixels = model.preprocess([render(scene) for scene in scenes])
    return GroupSplit(pixels, labels, nuisance, others)
