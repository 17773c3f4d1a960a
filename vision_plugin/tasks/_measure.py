"""What a model answers under an edit, as values per image, and figures with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vision_plugin._intervals import RESAMPLES, Interval, ends
from vision_plugin.steering import Edit, EditPass
from vision_plugin.tasks._attack import Attack

LEAST = 30
"""Fewest images of which an interval is given."""


@dataclass(frozen=True)
class Figure(Interval):
    """A number with its bootstrap interval.

    Examples:
        >>> vp.tasks.Figure(value=0.5, low=0.4, high=0.6).to_dict()
        {'value': 0.5, 'low': 0.4, 'high': 0.6}
    """


class Questions:
    """What is asked about images: the classes, and other questions whose answers should stay."""

    def __init__(
        self, model: Any, prompts: Sequence[str], others: Mapping[str, Sequence[str]]
    ) -> None:
        self.model = model
        # Figures are computed on the CPU, wherever the model runs.
        self.texts: Tensor = model.encode_text(list(prompts)).float().cpu()
        self.others = {
            name: model.encode_text(list(texts)).float().cpu() for name, texts in others.items()
        }

    def logits(self, embedding: Tensor, texts: Tensor) -> Tensor:
        """Return logits of unit embeddings."""
        found: Tensor = self.model.zero_shot_logits(embedding, texts)
        return found


@dataclass(frozen=True)
class Share:
    """A share of the images that were looked at, and whether these were all."""

    value: float
    n: int
    whole: bool


@dataclass(frozen=True, eq=False)
class Answers:
    """What the model says about one split under one edit.

    Attributes:
        attacked: Answer to the attacked images.
        clean: Unit embeddings of the clean images.
    """

    attacked: Tensor
    clean: Tensor


class Judge:
    """One split of pairs, run once as it is, and then under any edit."""

    raised, kept = "accuracy", "clean_accuracy"

    def __init__(self, model: Any, attack: Attack, questions: Questions, batch_size: int) -> None:
        self.attack, self.questions = attack, questions
        self._clean = EditPass(model, attack.clean, batch_size=batch_size)
        self._attacked = EditPass(model, attack.attacked, batch_size=batch_size)
        self.before = self.answers(Edit())

    def answers(self, edit: Edit) -> Answers:
        """Return what the model says under an edit."""
        return Answers(self.attacked_answers(edit), unit(self._clean.embed(edit)))

    def attacked_answers(self, edit: Edit) -> Tensor:
        """Return the answers to the attacked images alone."""
        return self._answer(unit(self._attacked.embed(edit)))

    def score(self, edit: Edit, *, above: float = -1.0) -> Share:
        """Return the accuracy on attacked images; see :class:`Judged`."""
        return self._accuracy(self._attacked, edit, beyond=above)

    def upkeep(self, edit: Edit, *, least: float = 0.0) -> Share:
        """Return the accuracy on clean images; see :class:`Judged`."""
        return self._accuracy(self._clean, edit, least=least)

    def _accuracy(
        self, images: EditPass, edit: Edit, *, beyond: float = -1.0, least: float = 0.0
    ) -> Share:
        """Count right answers until the share can no longer exceed one bound or reach the other."""
        n, seen, right = len(images), 0, 0
        with closing(images.embeddings(edit)) as batches:
            for batch in batches:
                labels = self.attack.labels[seen : seen + len(batch)]
                right += int((self._answer(unit(batch)) == labels).sum())
                seen += len(batch)
                most = (right + n - seen) / n
                if most <= beyond or most < least:
                    break
        return Share(right / seen, seen, seen == n)

    def under(self, edit: Edit) -> dict[str, Tensor]:
        """Return each figure under an edit as a value per image."""
        return self.values(self.answers(edit))

    def values(self, answers: Answers) -> dict[str, Tensor]:
        """Return each figure as a value per image, ``[n]`` float64."""
        attack, before = self.attack, self.before
        right = (answers.attacked == attack.labels).double()
        clean = (self._answer(answers.clean) == attack.labels).double()
        was = self._log_probabilities(before.clean)
        now = self._log_probabilities(answers.clean)
        return {
            "fooled": (answers.attacked == attack.printed).double(),
            "accuracy": right,
            "clean_accuracy": clean,
            "accuracy_gain": right - (before.attacked == attack.labels).double(),
            "clean_change": clean - (self._answer(before.clean) == attack.labels).double(),
            "collateral": self._changed(before.clean, answers.clean),
            "kl": (was.exp() * (was - now)).sum(1),
            "moved": (answers.clean - before.clean).norm(dim=1).double(),
            "group": attack.labels.double(),
        }

    def _changed(self, before: Tensor, after: Tensor) -> Tensor:
        """Return the share of answers to other questions that change; to this one if none is."""
        every = list(self.questions.others.values()) or [self.questions.texts]
        changed = [
            self.questions.logits(before, texts).argmax(1)
            != self.questions.logits(after, texts).argmax(1)
            for texts in every
        ]
        return torch.stack(changed).double().mean(0)

    def _log_probabilities(self, unit: Tensor) -> Tensor:
        logits = self.questions.logits(unit, self.questions.texts)
        return torch.log_softmax(logits.double(), dim=1)

    def _answer(self, unit: Tensor) -> Tensor:
        return self.questions.logits(unit, self.questions.texts).argmax(1)


def pooled(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return values of several sets of images as one set."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def averaged(parts: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of several values of each image, as of several random draws."""
    return {name: torch.stack([part[name] for part in parts]).mean(0) for name in parts[0]}


def figures(values: dict[str, Tensor], *, seed: int = 0) -> dict[str, Figure]:
    """Return means over images with 95% bootstrap intervals, and the worst class's accuracy.

    Raises:
        ValueError: there are too few images for an interval.
    """
    group = values["group"].long()
    n = len(group)
    if n < LEAST:
        raise ValueError(
            f"{n} images are too few for an interval, which needs {LEAST}: make the split larger"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (RESAMPLES, n), generator=generator)
    counts = torch.zeros(RESAMPLES, n, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones(RESAMPLES, n, dtype=torch.float64))
    found = {
        name: interval(float(value.mean()), counts @ value / n)
        for name, value in values.items()
        if name != "group"
    }
    right = values["accuracy"]
    once = worst(torch.ones(1, n, dtype=torch.float64), right, group)
    found["worst_group"] = interval(float(once[0]), worst(counts, right, group))
    return found


def worst(
    counts: Float[Tensor, "r n"], right: Float[Tensor, " n"], groups: Int[Tensor, " n"]
) -> Float[Tensor, " r"]:
    """Return the accuracy of the worst group in each resample; an absent group does not count."""
    member = nn.functional.one_hot(groups).double()
    size = counts @ member
    share = torch.where(size > 0, counts @ (member * right[:, None]) / size.clamp(min=1), torch.inf)
    return share.amin(1)


def interval(value: float, resampled: Tensor) -> Figure:
    """Return a number with the interval that holds 95% of its resampled values."""
    return Figure(value, *ends(resampled))


def unit(embedding: Tensor) -> Tensor:
    """Return embeddings of norm one, on the CPU."""
    return nn.functional.normalize(embedding.float(), dim=-1).cpu()
