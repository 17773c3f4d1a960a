"""How a recipe changes what a language model reads of images: latents, neurons or a direction."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vision_plugin.tasks._multimodal_data import MultimodalData
from vision_plugin.tasks._multimodal_settings import Goal, Recipe
from vision_plugin.tasks._reading import Knowledge, PatchReading, object_patches


class Changes:
    """Changes of the images of one split.

    Args:
        data: Values by factor, and which factors are seen beside the object.
        reading: The images' patches.
        knowledge: What was found on training images.
        random: Draws the latents that stand in for those that were found.
    """

    def __init__(
        self,
        data: MultimodalData,
        reading: PatchReading,
        knowledge: Knowledge,
        random: torch.Generator,
    ) -> None:
        self.data, self.reading, self.knowledge = data, reading, knowledge
        self.here = object_patches(reading, knowledge, data.locator)
        active = (knowledge.natural > 0).nonzero()[:, 0]
        self.strangers = active[torch.randperm(len(active), generator=random)]

    def stream(
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
        chosen = self._best(factor, value, recipe)
        if random:
            chosen = self.strangers[~torch.isin(self.strangers, chosen)][: recipe.size]
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
        """Let the new value's latents take what the other values' latents had at each patch."""
        new = self._best(factor, value, recipe)
        n_values = len(self.data.values[factor])
        others = [self._best(factor, v, recipe) for v in range(n_values) if v != value]
        trade = _Trade(new, torch.stack(others), self.knowledge.natural, recipe)
        return self.reading.with_latents(trade.latents, trade, rows)


class _Trade:
    """Latents of several values that give what they have to those of a new value.

    ``transfer`` takes it from the latents of every other value, and sets those to 0. ``swap`` takes
    it from the strongest value of each image alone, whose latents get what the new value's had.

    Args:
        new: Latents of the new value ``[size]``.
        old: Latents of each other value ``[values, size]``.
        natural: Natural strength of every latent.
        recipe: The method, and the strength that the new latents are multiplied with.
    """

    def __init__(
        self,
        new: Int[Tensor, " size"],
        old: Int[Tensor, "values size"],
        natural: Tensor,
        recipe: Recipe,
    ) -> None:
        self.recipe = recipe
        self.keep = ~torch.isin(old, new)
        every = torch.cat([new, old.flatten()])
        self.latents, place = torch.unique(every, return_inverse=True)
        self.at_new, self.at_old = place[: len(new)], place[len(new) :].view_as(old)
        self.natural = natural[self.latents].clamp(min=1e-6)

    def __call__(self, values: Float[Tensor, "rows patches m"]) -> Tensor:
        """Return new values of ``latents``."""
        shares = values / self.natural
        had = shares[..., self.at_old] * self.keep  # [rows, patches, values, size]
        result = values.clone()
        if self.recipe.method == "swap":
            strongest = had.sum(1).amax(-1).argmax(-1)
            gives = nn.functional.one_hot(strongest, had.shape[2]).bool()
            had = had * gives[:, None, :, None]
            self._give_back(result, shares[..., self.at_new].amax(-1), gives)
        else:
            result[..., self.at_old[self.keep]] = 0
        moved = had.amax(-1).amax(-1) * self.recipe.strength
        for index in self.at_new.tolist():
            result[..., index] = torch.maximum(values[..., index], moved * self.natural[index])
        return result

    def _give_back(self, result: Tensor, mine: Tensor, gives: Bool[Tensor, "rows values"]) -> None:
        """Let the latents of the value that gives take the new value's share, in place."""
        for number, slot in self.keep.nonzero().tolist():
            index = self.at_old[number, slot]
            back = mine * self.natural[index]
            result[..., index] = torch.where(gives[:, number, None], back, result[..., index])
