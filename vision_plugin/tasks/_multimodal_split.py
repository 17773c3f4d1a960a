"""Images of one split, asked as they are and under any recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vision_plugin.models.dictionary import Dictionary
from vision_plugin.steering import LatentEditor
from vision_plugin.tasks._answers import AnswerPass
from vision_plugin.tasks._clustered import clustered
from vision_plugin.tasks._measure import LEAST, Figure
from vision_plugin.tasks._multimodal_change import Changes
from vision_plugin.tasks._multimodal_data import AskedImages, MultimodalData
from vision_plugin.tasks._multimodal_result import Dialogue
from vision_plugin.tasks._multimodal_settings import DONE, Goal, MultimodalSettings, Recipe
from vision_plugin.tasks._reading import Knowledge, PatchReading
from vision_plugin.tasks._row import Row

Judge: TypeAlias = Callable[[str, str], bool]
"""Says whether an answer states a value."""


def is_the_value(answer: str, value: str) -> bool:
    """Return whether an answer is a value and nothing else, as in the drawn world."""
    return answer == value


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a recipe did to the answers, one row per image and target.

    Attributes:
        done: Whether the answer changed as it should, ``[rows]``.
        kept: Whether each other answer stayed and is right, by factor: ``[rows]``.
        images: Numbers of the images, ``[rows]``.
    """

    done: Bool[Tensor, " rows"]
    kept: dict[str, Bool[Tensor, " rows"]]
    images: Int[Tensor, " rows"]

    @property
    def preserved(self) -> Tensor:
        """Share of the other answers that stayed, ``[rows]``."""
        return torch.stack(list(self.kept.values())).double().mean(0)

    def shares(self, goal: Goal) -> dict[str, float]:
        """Return the means (done, preserved, preserved of each factor) and a standard error."""
        each = {f"preserved_{factor}": kept for factor, kept in self.kept.items()}
        found = {DONE[goal]: self.done, "preserved": self.preserved, **each}
        means = {name: float(values.double().mean()) for name, values in found.items()}
        spread = float(self.preserved.std(unbiased=False))
        return {**means, "preserved_error": spread / len(self.images) ** 0.5}


class Split:
    """One split of the images: asked as it is, and under any recipe."""

    def __init__(
        self,
        vlm: Any,
        sae: Dictionary,
        editor: LatentEditor,
        data: MultimodalData,
        asked: AskedImages,
        settings: MultimodalSettings,
        knowledge: Knowledge | None = None,
        judge: Judge = is_the_value,
    ) -> None:
        self.data, self.asked, self.settings = data, asked, settings
        self._outcomes: dict[Any, Outcome] = {}
        self.judge = judge
        self.answering = AnswerPass(
            vlm,
            asked.images,
            data.questions,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
        )
        layout = vlm.vision.token_layout()
        first = int(layout.n_cls + layout.n_registers)
        self.reading = PatchReading(self.answering.stream, first, sae, editor)
        if knowledge is None:
            return
        self.before = self.answering.answers()
        self.right = {
            factor: self._says(factor, self.before[factor], asked.labels[factor])
            for factor in data.questions
        }
        random = torch.Generator().manual_seed(settings.seed)
        # Where an answer is right before, as in every row of a table, it says the label.
        self.changes = Changes(data, self.reading, knowledge, random, asked.labels)
        self.targets = {
            factor: _other_values(asked.labels[factor], len(values), settings.targets, random)
            for factor, values in data.values.items()
        }

    def _says(self, factor: str, answers: Sequence[str], value: Tensor) -> Bool[Tensor, " n"]:
        """Return whether each answer states the value of this number."""
        values = self.data.values[factor]
        pairs = zip(answers, value.tolist(), strict=True)
        return torch.tensor([self.judge(said, values[number]) for said, number in pairs])

    def check_answers(self, split: str) -> None:
        """Raise ValueError unless enough questions are answered right for an interval."""
        for factor, right in self.right.items():
            n = int(right.sum())
            if n < LEAST:
                raise ValueError(
                    f"the model answers {n} of {len(right)} questions about the {factor} right on "
                    f"the {split} images, and an interval needs {LEAST}: give more images, or "
                    "another model"
                )

    # ------------------------------------------------------------------ rows

    def unchanged(self) -> list[Row]:
        """Return how often the model is right: as it is, and reading the SAE's reconstruction."""
        every = torch.arange(len(self.asked))
        rebuilt = self.reading.without_error(self.reading.stream, every)
        found = []
        for method, answers in (("none", self.before), ("sae", self.answering.answers(rebuilt))):
            for factor in self.data.values:
                hits = self._says(factor, answers[factor], self.asked.labels[factor])
                figures = {"accuracy": self._figure(hits.double(), every)}
                how = "as it is" if method == "none" else "reconstruction in place of the layer"
                found.append(Row(method, factor, "test", 0, None, how, "", figures))
        return found

    def row(
        self,
        goal: Goal,
        factor: str,
        recipe: Recipe,
        choice: str,
        *,
        random: bool = False,
        error: bool = True,
    ) -> Row:
        """Return the figures of a recipe."""
        n_targets = self.targets[factor].shape[1] if goal == "insertion" else 1
        parts = [
            self.outcome(goal, factor, recipe, k, random=random, error=error)
            for k in range(n_targets)
        ]
        images = torch.cat([part.images for part in parts])
        values = {
            DONE[goal]: torch.cat([part.done for part in parts]),
            "preserved": torch.cat([part.preserved for part in parts]),
            **{f"preserved_{name}": torch.cat([part.kept[name] for part in parts])
               for name in parts[0].kept},
        }  # fmt: skip
        figures = {name: self._figure(each.double(), images) for name, each in values.items()}
        method = recipe.method if error else "sae_without_error"
        if random or recipe.patches == "all":
            method = "random_active_latents" if random else "all_patches"
        return Row(
            method, factor, "test", recipe.size, self.answering.layer - 1, f"{goal}, {choice}",
            str(recipe), figures,
        )  # fmt: skip

    def _figure(self, values: Tensor, images: Tensor) -> Figure:
        return clustered(values, images, seed=self.settings.seed)

    def tried(
        self, goal: Goal, factor: str, recipe: Recipe, most: int | None = None
    ) -> dict[str, Any]:
        """Return the shares of answers that changed as they should, and that stayed.

        Args:
            goal: Goal of the recipe.
            factor: Factor whose answers change.
            recipe: The recipe.
            most: Number of images to ask about; None asks about all.
        """
        outcome = self.outcome(goal, factor, recipe, most=most)
        return {"images": len(outcome.images), **outcome.shares(goal)}

    def outcome(
        self,
        goal: Goal,
        factor: str,
        recipe: Recipe,
        which: int = 0,
        *,
        random: bool = False,
        error: bool = True,
        most: int | None = None,
    ) -> Outcome:
        """Return whether answers changed as they should, which others stayed, and the images."""
        asked = (goal, factor, recipe, which, random, error, most)
        if asked not in self._outcomes:
            self._outcomes[asked] = self._outcome(*asked)
        return self._outcomes[asked]

    def _outcome(
        self,
        goal: Goal,
        factor: str,
        recipe: Recipe,
        which: int,
        random: bool,
        error: bool,
        most: int | None,
    ) -> Outcome:
        own = self.asked.labels[factor]
        target = self.targets[factor][:, which] if goal == "insertion" else own
        # An answer that is wrong before says nothing about a change of it.
        rows = self.right[factor].nonzero()[:most, 0]
        stream = self.changes.stream(goal, factor, recipe, target, rows, random=random)
        if not error:
            stream = self.reading.without_error(stream, rows)
        after = self.answering.answers(stream, rows)
        said = self._says(factor, after[factor], target[rows])
        others = [f for f in self.data.questions if f != factor]
        kept = {
            f: self._says(f, after[f], self.asked.labels[f][rows]) & self.right[f][rows]
            for f in others
        }
        return Outcome(said if goal == "insertion" else ~said, kept, rows)

    def dialogues(self, goal: Goal, factor: str, recipe: Recipe) -> list[Dialogue]:
        """Return what the model says about a few images before and after."""
        own = self.asked.labels[factor]
        target = self.targets[factor][:, 0] if goal == "insertion" else own
        rows = self.right[factor].nonzero()[:2, 0]
        after = self.answering.answers(
            self.changes.stream(goal, factor, recipe, target, rows), rows
        )
        values = self.data.values[factor]
        return [
            Dialogue(
                goal, factor, values[int(target[row])], int(row), str(recipe),
                {self.data.questions[f]: (self.before[f][row], after[f][place])
                 for f in self.data.questions},
            )
            for place, row in enumerate(rows.tolist())
        ]  # fmt: skip


def _other_values(
    labels: Int[Tensor, " n"], n_values: int, count: int, random: torch.Generator
) -> Int[Tensor, "n count"]:
    """Return values that an image does not have, each once, in random order."""
    order = torch.rand(len(labels), n_values, generator=random)
    order[torch.arange(len(labels)), labels] = 2.0  # the own value comes last
    return order.argsort(1)[:, : min(count, n_values - 1)]
