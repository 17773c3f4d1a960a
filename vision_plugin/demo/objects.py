"""Questions about objects that are and are not in drawn images, with where the object is."""

from __future__ import annotations

import numpy as np
import torch

from vision_plugin.demo import SHAPES, draw
from vision_plugin.demo.dialogue import QUESTIONS
from vision_plugin.lens import ObjectQuestions

COLOURED = tuple(
    (colour, shape) for colour in ("red", "green", "blue") for shape in ("star", "heart", "square")
)
"""Coloured shapes that are asked about; an absent one shares its shape or colour with the image."""


def object_questions(
    n: int = 400, *, absent: int = 2, coloured: bool = False, seed: int = 3000
) -> ObjectQuestions:
    """Draw images and ask about the object that is there and about others that are not.

    Args:
        n: Number of images.
        absent: Objects to ask about that are not in an image, for each image.
        coloured: Ask for a shape of a colour, of which an absent one has the shape or the colour
            that the image shows: the small LLaVA often says yes. By default for the shape alone.
        seed: Seed of the images and of the absent objects.

    Raises:
        ValueError: there are not that many other objects.
    """
    most = 4 if coloured else len(SHAPES) - 1
    if not 1 <= absent <= most:
        raise ValueError(f"absent={absent}: there are {most} objects beside an image's")
    # One in eight drawn objects is among the coloured ones.
    world = draw(16 * n + 100 if coloured else n, seed=seed)
    named = [(s.colour, s.shape) if coloured else ("", s.shape) for s in world.scenes]
    objects = COLOURED if coloured else tuple(("", shape) for shape in SHAPES)
    chosen = [place for place, name in enumerate(named) if name in objects][:n]
    random = np.random.default_rng([seed, 17])
    image, asked, there = [], [], []
    for number, place in enumerate(chosen):
        own = objects.index(named[place])
        alike = [
            k
            for k, (colour, shape) in enumerate(objects)
            if k != own and (not coloured or colour == objects[own][0] or shape == objects[own][1])
        ]
        for one in (own, *random.permutation(alike)[:absent].tolist()):
            image.append(number)
            asked.append(one)
            there.append(one == own)
    left_out = {"shape", "colour"} if coloured else {"shape"}
    masks = [np.asarray(world.masks[place], dtype=bool) for place in chosen]
    return ObjectQuestions(
        images=[world.images[place] for place in chosen],
        objects=[f"{colour} {shape}".strip() for colour, shape in objects],
        image=torch.tensor(image),
        asked=torch.tensor(asked),
        there=torch.tensor(there),
        others={name: text for name, text in QUESTIONS.items() if name not in left_out},
        masks=torch.from_numpy(np.stack(masks)),
    )
