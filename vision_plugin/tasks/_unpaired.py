"""Attacked images that nobody has without the word, and what can be said about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin.steering import Edit, EditPass
from vision_plugin.tasks._attack import Attack
from vision_plugin.tasks._measure import Answers, Judge, Questions, unit


@dataclass(frozen=True, eq=False)
class Unpaired:
    """Attacked images alone.

    Attributes:
        attacked: Pixels of images with a word that names another class.
        labels: True class of each image.
        printed: Class that the word names.
        why: Why there are no figures on clean images.

    Examples:
        >>> labels, printed = torch.zeros(8).long(), torch.ones(8).long()
        >>> alone = vp.tasks.Unpaired(pixels, labels, printed, why="no clean twins")
        >>> alone.why
        'no clean twins'
    """

    attacked: Float[Tensor, "n channels height width"]
    labels: Int[Tensor, " n"]
    printed: Int[Tensor, " n"]
    why: str

    def __len__(self) -> int:
        return len(self.labels)


class UnpairedJudge(Judge):
    """Attacked images, run once as they are, and then under any edit; no clean images."""

    def __init__(self, model: Any, attack: Unpaired, questions: Questions, batch_size: int) -> None:
        self.images, self.questions = attack, questions
        self._attacked = EditPass(model, attack.attacked, batch_size=batch_size)
        self.before = self.answers(Edit())

    def answers(self, edit: Edit) -> Answers:
        """Return what the model says under an edit."""
        answers = self._answer(unit(self._attacked.embed(edit)))
        return Answers(answers, clean=torch.empty(0, 0))

    def values(self, answers: Answers) -> dict[str, Tensor]:
        """Return the figures that need no clean images as a value per image."""
        right = (answers.attacked == self.images.labels).double()
        return {
            "fooled": (answers.attacked == self.images.printed).double(),
            "accuracy": right,
            "accuracy_gain": right - (self.before.attacked == self.images.labels).double(),
            "group": self.images.labels.double(),
        }


def judge_of(model: Any, attack: Attack | Unpaired, questions: Questions, batch_size: int) -> Judge:
    """Return the judge of images with clean twins, or without."""
    if isinstance(attack, Unpaired):
        return UnpairedJudge(model, attack, questions, batch_size)
    return Judge(model, attack, questions, batch_size)
