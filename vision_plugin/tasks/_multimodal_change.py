"""How a recipe changes what a language model reads of images: latents, neurons or a direction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from vision_plugin.models.dictionary import Dictionary
from vision_plugin.steering import Edit, Where
from vision_plugin.tasks._multimodal_data import MultimodalData
from vision_plugin.tasks._multimodal_settings import DIRECTIONS, EDITS, PAIRED, TRADES, Goal, Recipe
from vision_plugin.tasks._reading import SHARE, Knowledge, PatchReading, object_patches


@dataclass(frozen=True, eq=False)
class Plan:
    """New values of latents, the same for every image: what an Edit can say.

    Attributes:
        latents: Numbers of the latents.
        amounts: What they are set to, or what is added.
        adds: Whether the amounts are added.
    """

    latents: Int[Tensor, " m"]
    amounts: Float[Tensor, " m"]
    adds: bool

    def __call__(self, old: Float[Tensor, "rows patches m"]) -> Float[Tensor, "rows patches m"]:
        """Return new values of old ones."""
        return old + self.amounts if self.adds else self.amounts.expand_as(old)


def plan_of(
    knowledge: Knowledge,
    factor: str,
    recipe: Recipe,
    value: int,
    strangers: Int[Tensor, " all"] | None = None,
    *,
    seen: int | None = None,
) -> Plan:
    """Return what a recipe makes of the latents for one value.

    Args:
        knowledge: What was found on training images.
        factor: Factor of the value.
        recipe: The recipe; its method is one of ``EDITS``.
        value: Number of the value.
        strangers: Latents that stand in for those that were found, in random order.
        seen: Number of the value that the model sees, for a method of ``PAIRED``.
    """
    if recipe.method == "replace":
        assert seen is not None
        both = torch.unique(knowledge.pushing[factor][[value, seen], : recipe.size])
        means = knowledge.latent_means[factor]
        return Plan(both, recipe.strength * (means[value, both] - means[seen, both]), True)
    adds, strength = recipe.method in ("add", "subtract"), recipe.strength
    found = knowledge.pushing if adds else knowledge.latents
    chosen = found[factor][value, : recipe.size]
    if strangers is not None:
        chosen = strangers[~torch.isin(strangers, chosen)][: recipe.size]
    natural, overall = knowledge.natural[chosen], knowledge.latent_overall[factor]
    away = knowledge.latent_means[factor][value, chosen] - overall[chosen]
    match recipe.method:
        case "add":
            return Plan(chosen, strength * away, True)
        case "subtract":
            return Plan(chosen, -strength * away, True)
        case "zero":
            return Plan(chosen, torch.zeros_like(natural), False)
        case "mean":
            return Plan(chosen, overall[chosen], False)
        case "negative":
            return Plan(chosen, -strength * natural, False)
        case "clamp":
            return Plan(chosen, strength * natural, False)
    raise ValueError(f"{recipe.method} is no change of latents: use one of {', '.join(EDITS)}")


def edit_of(
    sae: Dictionary,
    data: MultimodalData,
    knowledge: Knowledge,
    factor: str,
    recipe: Recipe,
    value: int,
    *,
    seen: int | None = None,
) -> Edit:
    """Return a recipe for one value as an Edit, which finds the object's patches itself."""
    plan = plan_of(knowledge, factor, recipe, value, seen=seen)
    where = None
    if recipe.patches == "chosen":
        shows = knowledge.shows.unique()
        above = dict(zip(shows.tolist(), (SHARE * knowledge.natural[shows]).tolist(), strict=True))
        where = Where(above, outside=factor in data.beside)
    amounts = dict(zip(plan.latents.tolist(), plan.amounts.tolist(), strict=True))
    return Edit.of("add" if plan.adds else "clamp", sae, amounts, tokens="patch", where=where)


def edits_of(
    sae: Dictionary,
    data: MultimodalData,
    knowledge: Knowledge,
    factor: str,
    recipe: Recipe,
    value: int,
) -> dict[str, Edit]:
    """Return a recipe's edits for one value, by its name, or as ``red-to-blue`` by both names."""
    names, rest = data.values[factor], (sae, data, knowledge, factor, recipe, value)
    if recipe.method not in PAIRED:
        return {names[value]: edit_of(*rest)}
    return {
        f"{names[seen]}-to-{names[value]}": edit_of(*rest, seen=seen)
        for seen in range(len(names))
        if seen != value
    }


class Changes:
    """Changes of the images of one split.

    Args:
        data: Values by factor, and which factors are seen beside the object.
        reading: The images' patches.
        knowledge: What was found on training images.
        random: Draws the latents that stand in for those that were found.
        seen: Number of the value that the model sees in each image, by factor: ``[n]``.
    """

    def __init__(
        self,
        data: MultimodalData,
        reading: PatchReading,
        knowledge: Knowledge,
        random: torch.Generator,
        seen: Mapping[str, Int[Tensor, " n"]],
    ) -> None:
        self.data, self.reading, self.knowledge, self.seen = data, reading, knowledge, seen
        self.here = object_patches(reading, knowledge)
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
        seen = self.seen[factor] if recipe.method in PAIRED else target
        pairs = torch.stack([target[rows], seen[rows]], dim=1)
        for pair in torch.unique(pairs, dim=0):
            places = (pairs == pair).all(1).nonzero()[:, 0]
            value, old = pair.tolist()
            some = rows[places]
            stream[places] = self._changed(goal, factor, recipe, value, old, some, random)
        return stream

    def _changed(
        self,
        goal: Goal,
        factor: str,
        recipe: Recipe,
        value: int,
        seen: int,
        rows: Tensor,
        random: bool,
    ) -> Tensor:
        known, strength = self.knowledge, recipe.strength
        here = self.here[rows]
        mask = (~here if factor in self.data.beside else here).unsqueeze(-1)
        if recipe.patches == "all":
            mask = torch.ones_like(mask)
        if recipe.method in (*DIRECTIONS, "neurons"):
            means = known.means[factor]
            start = means[seen] if recipe.method in PAIRED else known.overall[factor]
            away = means[value] - start
            sign = 1.0 if goal == "insertion" else -1.0
            patches = self.reading.patches[rows]
            if recipe.method in DIRECTIONS:
                change = sign * strength * away * mask
                return self.reading.with_patches(patches + change, rows)
            chosen = known.neurons[factor][value, : recipe.size]
            new = patches.clone()
            goal_value = known.overall[factor][chosen] + sign * strength * away[chosen]
            new[..., chosen] = torch.where(mask, goal_value, new[..., chosen])
            return self.reading.with_patches(new, rows)
        if recipe.method in TRADES:
            return self._moved(factor, value, recipe, rows)
        strangers = self.strangers if random else None
        plan = plan_of(known, factor, recipe, value, strangers, seen=seen)
        return self.reading.with_latents(
            plan.latents, lambda old: torch.where(mask, plan(old), old), rows
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
