"""Steering a vision-language model through its tower: put a value into its answers, or take it out.

Pach et al. 2025 (arXiv 2504.02821) clamp one latent of an SAE in LLaVA's tower. Here every method
is chosen on validation images and reported on test images, by exact answers: how often the answer
changes as it should, and how often the answers to the other questions stay unchanged and right.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.site import Site
from vision_plugin.steering import LatentEditor
from vision_plugin.tasks._answers import AnswerPass
from vision_plugin.tasks._measure import Figure
from vision_plugin.tasks._multimodal_data import AskedImages, MultimodalData
from vision_plugin.tasks._multimodal_result import Dialogue, MultimodalResult, clustered
from vision_plugin.tasks._reading import Knowledge, PatchReading, learn, object_patches
from vision_plugin.tasks._row import Row

logger = logging.getLogger(__name__)

Goal = Literal["insertion", "suppression"]
Announce = Callable[[str], None]
GOAL_METHODS: Mapping[Goal, tuple[str, ...]] = {
    "insertion": ("clamp", "transfer", "swap", "diff_mean", "neurons"),
    "suppression": ("zero", "negative", "diff_mean", "neurons"),
}


@dataclass(frozen=True, kw_only=True)
class MultimodalSettings:
    """What a steering task searches through."""

    sizes: tuple[int, ...] = (1, 3, 10)
    """Numbers of latents or neurons per value."""
    strengths: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Multiples of the natural strength, or of a difference of means."""
    preserved: float = 0.9
    """Share of other answers to preserve for the second choice."""
    targets: int = 2
    """Values that are put into each test image."""
    batch_size: int = 150
    """Images that run at once."""
    seed: int = 0
    """Seed of targets, random latents and the bootstrap."""

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes={self.sizes} must be numbers of latents from 1 up")
        if not 0 < self.preserved < 1:
            raise ValueError(f"preserved={self.preserved} is a share: between 0 and 1")
        if self.targets < 1:
            raise ValueError(f"targets={self.targets} must be 1 or more")


@dataclass(frozen=True)
class Recipe:
    """A method with its number of latents per value and its strength."""

    method: str
    size: int
    strength: float

    def __str__(self) -> str:
        return f"{self.method}, {self.size} per value, strength {self.strength:g}"


def multimodal(
    vlm: Any,
    sae: Dictionary,
    data: MultimodalData,
    *,
    settings: MultimodalSettings | None = None,
    name: str = "",
    announce: Announce = logger.info,
) -> MultimodalResult:
    """Insert and suppress values in the answers of a vision-language model.

    Args:
        vlm: A VisionLanguageBridge that reads the output of one block of its tower.
        sae: An SAE at that output, of its patches.
        data: Questions, values and images.
        settings: What is searched through.
        name: Name of the SAE, for records.
        announce: Called with one line per stage.

    Raises:
        ValueError: the SAE belongs to another hook or model, or the model cannot answer.
    """
    settings = settings or MultimodalSettings()
    Site.of(vlm.vision, sae)
    hook_name = str(sae.cfg.metadata["hook_name"])
    if hook_name not in vlm.reach.hook_names:
        raise ValueError(
            f"the SAE works at {hook_name}, but {vlm.cfg.model_name} reads "
            f"{', '.join(vlm.reach.hook_names)}: use an SAE of that hook"
        )
    editor = LatentEditor(sae)
    announce(f"finding latents on {len(data.train)} images")
    train = _Split(vlm, sae, editor, data, data.train, settings)
    knowledge = learn(train.reading, dict(data.train.labels), data.locator, set(data.beside))
    del train
    validation = _Split(vlm, sae, editor, data, data.validation, settings, knowledge)
    test = _Split(vlm, sae, editor, data, data.test, settings, knowledge)
    rows = test.unchanged()
    search: list[dict[str, Any]] = []
    dialogues: list[Dialogue] = []
    for factor in data.questions:
        for goal in GOAL_METHODS:
            announce(f"{goal} of a {factor}: choosing on {len(data.validation)} images")
            seen = [(recipe, *validation.tried(goal, factor, recipe)) for recipe in
                    recipes(goal, settings)]  # fmt: skip
            search += [_searched(goal, factor, *entry) for entry in seen]
            for method in GOAL_METHODS[goal]:
                mine = [entry for entry in seen if entry[0].method == method]
                for choice, recipe in _choices(mine, settings.preserved).items():
                    rows.append(test.row(goal, factor, recipe, choice))
                    if choice == "best" and method in ("clamp", "negative"):
                        rows.append(test.row(goal, factor, recipe, choice, random=True))
                        rows.append(test.row(goal, factor, recipe, choice, error=False))
                    if choice == "best" and method in ("transfer", "negative"):
                        dialogues += test.dialogues(goal, factor, recipe)
    return MultimodalResult(
        model=str(vlm.cfg.model_name),
        sae=name or hook_name,
        settings=_listed(settings, data),
        rows=rows,
        search=search,
        dialogues=dialogues,
    )


def recipes(goal: Goal, settings: MultimodalSettings) -> Iterator[Recipe]:
    """Yield what is tried."""
    for method in GOAL_METHODS[goal]:
        sizes = (1,) if method == "diff_mean" else settings.sizes
        strengths = (1.0,) if method == "zero" else settings.strengths
        for size in sizes:
            for strength in strengths:
                yield Recipe(method, size, strength)


class _Split:
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
        self.knowledge = knowledge
        self.before = self.answering.answers()
        self.right = {
            factor: torch.tensor(
                [word == data.values[factor][label] for word, label in zip(
                    self.before[factor], asked.labels[factor].tolist(), strict=True)]
            )
            for factor in data.questions
        }  # fmt: skip
        self.here = object_patches(self.reading, knowledge, data.locator)
        random = torch.Generator().manual_seed(settings.seed)
        active = (knowledge.natural > 0).nonzero()[:, 0]
        self.strangers = active[torch.randperm(len(active), generator=random)]
        self.targets = {
            factor: _other_values(asked.labels[factor], len(values), settings.targets, random)
            for factor, values in data.values.items()
        }

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
        n_targets = self.settings.targets if goal == "insertion" else 1
        parts = [
            self.outcome(goal, factor, recipe, k, random=random, error=error)
            for k in range(n_targets)
        ]
        done, kept, images = (torch.cat(each) for each in zip(*parts, strict=True))
        name = "inserted" if goal == "insertion" else "suppressed"
        method = "random_latents" if random else recipe.method if error else "sae_without_error"
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
        stream = self._stream(goal, factor, recipe, target, rows, random=random)
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
        after = self.answering.answers(self._stream(goal, factor, recipe, target, rows), rows)
        values = self.data.values[factor]
        return [
            Dialogue(
                goal, factor, values[int(target[row])], int(row), str(recipe),
                {self.data.questions[f]: (self.before[f][row], after[f][place])
                 for f in self.data.questions},
            )
            for place, row in enumerate(rows.tolist())
        ]  # fmt: skip

    # ------------------------------------------------------------------ changes

    def _stream(
        self,
        goal: Goal,
        factor: str,
        recipe: Recipe,
        target: Int[Tensor, " n"],
        rows: Int[Tensor, " rows"],
        *,
        random: bool = False,
    ) -> Tensor:
        """Return what the language model reads of some images under a recipe."""
        stream = self.reading.stream[rows].clone()
        for value in torch.unique(target[rows]).tolist():
            places = (target[rows] == value).nonzero()[:, 0]
            some = rows[places]
            stream[places] = self._changed(goal, factor, recipe, value, some, random)
        return stream

    def _changed(
        self, goal: Goal, factor: str, recipe: Recipe, value: int, rows: Tensor, random: bool
    ) -> Tensor:
        known, strength = self.knowledge, recipe.strength
        here = self.here[rows]
        mask = (~here if factor in self.data.beside else here).unsqueeze(-1)
        if recipe.method in ("diff_mean", "neurons"):
            away = known.means[factor][value] - known.overall[factor]
            sign = 1.0 if goal == "insertion" else -1.0
            patches = self.reading.patches[rows]
            if recipe.method == "diff_mean":
                change = sign * strength * away * mask
                return self.reading.with_patches(patches + change, rows)
            chosen = known.neurons[factor][value, : recipe.size]
            new = patches.clone()
            goal_value = known.overall[factor][chosen] + sign * strength * away[chosen]
            new[..., chosen] = torch.where(mask, goal_value, new[..., chosen])
            return self.reading.with_patches(new, rows)
        chosen = self.strangers[: recipe.size] if random else self._best(factor, value, recipe)
        natural = known.natural[chosen]
        if recipe.method in ("transfer", "swap"):
            return self._moved(factor, value, recipe, rows)
        amount = {"clamp": strength, "negative": -strength, "zero": 0.0}[recipe.method] * natural
        return self.reading.with_latents(
            chosen, lambda old: torch.where(mask, amount.expand_as(old), old), rows
        )

    def _best(self, factor: str, value: int, recipe: Recipe) -> Int[Tensor, " size"]:
        return self.knowledge.latents[factor][value, : recipe.size]

    def _moved(self, factor: str, value: int, recipe: Recipe, rows: Tensor) -> Tensor:
        """Let the new value's latents take what the old values' latents had at each patch.

        ``transfer`` takes it from the latents of every other value, ``swap`` from the strongest
        value's of each image alone, which gets in turn what the new value's had.
        """
        known = self.knowledge
        new = self._best(factor, value, recipe)
        n_values = len(self.data.values[factor])
        others = [self._best(factor, v, recipe) for v in range(n_values) if v != value]
        old = torch.stack(others)
        keep = ~torch.isin(old, new)
        every = torch.cat([new, old.flatten()])
        every, place = torch.unique(every, return_inverse=True)
        at_new, at_old = place[: len(new)], place[len(new) :].view_as(old)
        natural = known.natural[every].clamp(min=1e-6)

        def operate(values: Tensor) -> Tensor:
            shares = values / natural
            had = shares[..., at_old] * keep  # [rows, patches, values, size]
            result = values.clone()
            if recipe.method == "swap":
                strongest = had.sum(1).amax(-1).argmax(-1)
                picked = torch.zeros(had.shape[2], dtype=torch.bool).expand(len(had), -1).clone()
                picked[torch.arange(len(had)), strongest] = True
                had = had * picked[:, None, :, None]
                mine = shares[..., at_new].amax(-1)
                for number in range(old.shape[0]):
                    is_it = picked[:, number][:, None]
                    for slot in range(old.shape[1]):
                        if keep[number, slot]:
                            index = at_old[number, slot]
                            back = mine * natural[index]
                            result[..., index] = torch.where(is_it, back, result[..., index])
            else:
                result[..., at_old[keep]] = 0
            moved = had.amax(-1).amax(-1) * recipe.strength
            for index in at_new.tolist():
                result[..., index] = torch.maximum(values[..., index], moved * natural[index])
            return result

        return self.reading.with_latents(every, operate, rows)


def _choices(tried: Sequence[tuple[Recipe, float, float]], floor: float) -> dict[str, Recipe]:
    """Return the recipe that does best in both respects, and the best one above a floor."""
    best = max(tried, key=lambda entry: min(entry[1], entry[2]))
    found = {"best": best[0]}
    above = [entry for entry in tried if entry[2] >= floor + 0.01]
    if above:
        found["preserving"] = max(above, key=lambda entry: entry[1])[0]
    return found


def _other_values(
    labels: Int[Tensor, " n"], n_values: int, count: int, random: torch.Generator
) -> Int[Tensor, "n count"]:
    """Return values that an image does not have, each once, in random order."""
    order = torch.rand(len(labels), n_values, generator=random)
    order[torch.arange(len(labels)), labels] = 2.0  # the own value comes last
    return order.argsort(1)[:, : min(count, n_values - 1)]


def _searched(goal: Goal, factor: str, recipe: Recipe, done: float, kept: float) -> dict[str, Any]:
    name = "inserted" if goal == "insertion" else "suppressed"
    return {
        "kind": factor, "goal": goal, "method": recipe.method, "size": recipe.size,
        "strength": recipe.strength, name: done, "preserved": kept,
    }  # fmt: skip


def _listed(settings: MultimodalSettings, data: MultimodalData) -> dict[str, Any]:
    named = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in named.items()}
    sizes = {name: len(getattr(data, name)) for name in ("train", "validation", "test")}
    return {**listed, "images": sizes}
