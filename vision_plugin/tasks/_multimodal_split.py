"""Images of one split, asked as they are and under any recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vision_plugin.models.dictionary import Dictionary
from vision_plugin.steering import LatentEditor
from vision_plugin.tasks._answers import AnswerPass
from vision_plugin.tasks._measure import LEAST, Figure
from vision_plugin.tasks._multimodal_change import Changes
from vision_plugin.tasks._multimodal_data import AskedImages, MultimodalData
from vision_plugin.tasks._multimodal_result import Dialogue, clustered
from vision_plugin.tasks._multimodal_settings import Goal, MultimodalSettings, Recipe
from vision_plugin.tasks._reading import Knowledge, PatchReading
from vision_plugin.tasks._row import Row


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
    ) -> None:
        self.data, self.asked, self.settings = data, asked, settings
        self.answering = AnswerPass(
            vlm, asked.images, data.questions, batch_size=settings.batch_size
        )
        layout = vlm.vision.token_layout()
        first = int(layout.n_cls + layout.n_registers)
        self.reading = PatchReading(self.answering.stream, first, sae, editor)
        if knowledge is None:
            return
        self.before = self.answering.answers()
        self.right = {
            factor: torch.tensor(
                [word == data.values[factor][label] for word, label in zip(
                    self.before[factor], asked.labels[factor].tolist(), strict=True)]
            )
            for factor in data.questions
        }  # fmt: skip
        random = torch.Generator().manual_seed(settings.seed)
        self.changes = Changes(data, self.reading, knowledge, random)
        self.targets = {
            factor: _other_values(asked.labels[factor], len(values), settings.targets, random)
            for factor, values in data.values.items()
        }

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
            for factor, values in self.data.values.items():
                labels = self.asked.labels[factor].tolist()
                hits = torch.tensor(
                    [w == values[n] for w, n in zip(answers[factor], labels, strict=True)]
                )
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
        done, kept, images = (torch.cat(each) for each in zip(*parts, strict=True))
        name = "inserted" if goal == "insertion" else "suppressed"
        method = (
            "random_active_latents" if random else recipe.method if error else "sae_without_error"
        )
        figures = {name: self._figure(done, images), "preserved": self._figure(kept, images)}
        return Row(
            method, factor, "test", recipe.size, self.answering.layer - 1, f"{goal}, {choice}",
            str(recipe), figures,
        )  # fmt: skip

    def _figure(self, values: Tensor, images: Tensor) -> Figure:
        return clustered(values, images, seed=self.settings.seed)

    def tried(self, goal: Goal, factor: str, recipe: Recipe) -> tuple[float, float]:
        """Return the shares of answers that changed as they should, and that stayed."""
        done, kept, _ = self.outcome(goal, factor, recipe)
        return float(done.mean()), float(kept.mean())

    def outcome(
        self,
        goal: Goal,
        factor: str,
        recipe: Recipe,
        which: int = 0,
        *,
        random: bool = False,
        error: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return whether answers changed as they should and how many stayed, and their images."""
        own = self.asked.labels[factor]
        target = self.targets[factor][:, which] if goal == "insertion" else own
        # An answer that is wrong before says nothing about a change of it.
        rows = self.right[factor].nonzero()[:, 0]
        stream = self.changes.stream(goal, factor, recipe, target, rows, random=random)
        if not error:
            stream = self.reading.without_error(stream, rows)
        after = self.answering.answers(stream, rows)
        values = self.data.values[factor]
        wanted = [values[n] for n in target[rows].tolist()]
        said = torch.tensor([w == v for w, v in zip(after[factor], wanted, strict=True)])
        done = said if goal == "insertion" else ~said
        others = [f for f in self.data.questions if f != factor]
        kept = torch.stack([self._kept(f, after[f], rows) for f in others]).double().mean(0)
        return done.double(), kept, rows

    def _kept(self, factor: str, after: Sequence[str], rows: Tensor) -> Bool[Tensor, " rows"]:
        before = [self.before[factor][row] for row in rows.tolist()]
        same = torch.tensor([a == b for a, b in zip(after, before, strict=True)])
        return same & self.right[factor][rows]

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
