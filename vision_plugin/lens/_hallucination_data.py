"""Questions whether objects are in images, with the right answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from PIL.Image import Image
from torch import Tensor

from vision_plugin._inputs import check_template

LEAST = 30
"""Fewest questions about present and about absent objects, in each half."""


@dataclass(frozen=True, eq=False)
class ObjectQuestions:
    """Images and objects that are asked about.

    Attributes:
        images: The images.
        objects: Names of objects, words of the model's vocabulary.
        image: Number of the image of each question.
        asked: Number of the object of each question.
        there: Whether the object is in the image.
        question: What is asked, with one ``{}`` for the object.
        answers: The words for yes and no.
        others: Other questions about the images, whose answers should stay as they are.
        masks: Where each image shows its object, ``[images, height, width]``, for localisation.

    Examples:
        >>> from vision_plugin.demo.objects import object_questions
        >>> data = object_questions(4, absent=1)
        >>> len(data.images), len(data.asked), data.there.tolist()
        (4, 8, [True, False, True, False, True, False, True, False])
    """

    images: Sequence[Image]
    objects: Sequence[str]
    image: Int[Tensor, " q"]
    asked: Int[Tensor, " q"]
    there: Bool[Tensor, " q"]
    question: str = "Is there a {}?"
    answers: tuple[str, str] = ("yes", "no")
    others: Mapping[str, str] = field(default_factory=dict)
    masks: Bool[Tensor, "images height width"] | None = None

    def __post_init__(self) -> None:
        check_template(self.question, argument="question")
        n = len(self.image)
        if not (n == len(self.asked) == len(self.there)):
            raise ValueError(
                f"image= has {n} questions, asked= {len(self.asked)} and there= {len(self.there)}: "
                "give one of each per question"
            )
        if not self.objects:
            raise ValueError("objects= is empty: name at least one object to ask about")
        if n and (int(self.image.max()) >= len(self.images) or int(self.image.min()) < 0):
            raise ValueError(f"image= names an image of {len(self.images)} that is not there")
        if n and (int(self.asked.max()) >= len(self.objects) or int(self.asked.min()) < 0):
            raise ValueError(f"asked= names an object of {len(self.objects)} that is not there")
        if self.masks is not None and len(self.masks) != len(self.images):
            raise ValueError(f"{len(self.masks)} masks stand for {len(self.images)} images")

    def __len__(self) -> int:
        return len(self.image)

    def halves(self, seed: int) -> tuple[ObjectQuestions, ObjectQuestions]:
        """Return the questions about one half of the images and about the other.

        Raises:
            ValueError: a half has too few questions about present or about absent objects.
        """
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))
        middle = len(order) // 2
        first, second = self._of(order[:middle]), self._of(order[middle:])
        for half in (first, second):
            counts = int(half.there.sum()), int((~half.there).sum())
            if min(counts) < LEAST:
                raise ValueError(
                    f"a half has {counts[0]} questions about present and {counts[1]} about absent "
                    f"objects, and needs {LEAST} of each: give more images"
                )
        return first, second

    def _of(self, images: Int[Tensor, " m"]) -> ObjectQuestions:
        """Return the questions about some images."""
        place = torch.full((len(self.images),), -1)
        place[images] = torch.arange(len(images))
        rows = (place[self.image] >= 0).nonzero()[:, 0]
        return ObjectQuestions(
            images=[self.images[i] for i in images.tolist()],
            objects=self.objects,
            image=place[self.image[rows]],
            asked=self.asked[rows],
            there=self.there[rows],
            question=self.question,
            answers=self.answers,
            others=self.others,
            masks=None if self.masks is None else self.masks[images],
        )
