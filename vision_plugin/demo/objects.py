"""Questions about shapes that are and are not in drawn images, with where the object is."""

from __future__ import annotations

import numpy as np
import torch

from vision_plugin.demo import SHAPES, draw
from vision_plugin.demo.dialogue import QUESTIONS
from vision_plugin.lens import ObjectQuestions


def object_questions(n: int = 400, *, absent: int = 2, seed: int = 3000) -> ObjectQuestions:
    """Draw images and ask about the shape that is there and about others that are not.

    Args:
        n: Number of images.
        absent: Shapes to ask about that are not in an image, for each image.
        seed: Seed of the images and of the absent shapes.

    Raises:
        ValueError: there are not that many other shapes.
    """
    if not 1 <= absent < len(SHAPES):
        raise ValueError(f"absent={absent}: there are {len(SHAPES) - 1} shapes beside an image's")
    world = draw(n, seed=seed)
    random = np.random.default_rng([seed, 17])
    image, asked, there = [], [], []
    for place, scene in enumerate(world.scenes):
        own = SHAPES.index(scene.shape)
        others = random.permutation([k for k in range(len(SHAPES)) if k != own])[:absent]
        for number in (own, *others.tolist()):
            image.append(place)
            asked.append(number)
            there.append(number == own)
    others_asked = {name: text for name, text in QUESTIONS.items() if name != "shape"}
    return ObjectQuestions(
        images=list(world.images),
        objects=SHAPES,
        image=torch.tensor(image),
        asked=torch.tensor(asked),
        there=torch.tensor(there),
        others=others_asked,
        masks=torch.from_numpy(np.stack([np.asarray(mask, dtype=bool) for mask in world.masks])),
    )
