"""Effects of holding each latent at a value on the concepts' probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.site import in_eval_mode
from vision_plugin.steering import Edit, EffectPass, Latents, SteeringEffect

N_LIKELIEST, N_FALLEN, N_CURVES = 6, 3, 4


@dataclass(frozen=True)
class ConceptShift:
    """A concept's mean probability before and while a latent is held at a value."""

    concept: str
    before: float
    after: float


@dataclass(frozen=True)
class Curve:
    """Mean probabilities of some concepts over the values that a latent was held at."""

    strengths: tuple[float, ...]
    """Ascending; at 0 the latent is switched off."""
    concepts: tuple[str, ...]
    shares: tuple[tuple[float, ...], ...]
    """By concept and strength."""
    unsteered: tuple[float, ...]
    """By concept, without steering."""


@dataclass(frozen=True)
class Steered:
    """The effect of steering, and how the latent was steered, where it is known."""

    effect: SteeringEffect
    strength: float | None
    """Value that the latent was held at; None where an edit, or nobody, says."""
    numbers: tuple[int, ...] = ()
    """Numbers of the images, where they are of the report's source."""
    curve: Curve | None = None
    edit: Edit | None = None
    """The latent's part of an edit, where that was made in place of holding it."""


def shifts(effect: SteeringEffect) -> list[ConceptShift]:
    """Return the likeliest concepts under steering, then those that fell most, as means."""
    before, after = effect.before.double().mean(0), effect.after.double().mean(0)
    likeliest = torch.sort(after, descending=True, stable=True).indices[:N_LIKELIEST].tolist()
    fallen = torch.sort(after - before, stable=True).indices[:N_FALLEN].tolist()
    chosen = dict.fromkeys([*likeliest, *(c for c in fallen if after[c] < before[c])])
    return [ConceptShift(effect.concepts[c], float(before[c]), float(after[c])) for c in chosen]


class Steerer:
    """Steer one latent after another on the same images.

    Args:
        model: A VisionBridge with a space shared with text.
        sae: An SAE at one of the model's hooks.
        pixels: Images prepared by ``model.preprocess``.
        concepts: Texts, or texts with their embeddings ``[d_embed]``.
        strength: Activation that latents are held at.
        strengths: Further values for a curve.
        numbers: Numbers of the images in their source.
        tokens: Kind of token to steer.
        edit: An edit; its latents are changed as it says, and not held at ``strength``.

    Raises:
        ValueError: an embedding has another width than the model's, or there is no text.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Any,
        sae: Dictionary,
        pixels: Tensor,
        concepts: Mapping[str, Tensor] | Sequence[str],
        *,
        strength: float,
        tokens: str,
        strengths: Sequence[int | float] = (),
        numbers: Sequence[int] = (),
        edit: Edit | None = None,
    ) -> None:
        self.strength, self.numbers = float(strength), tuple(numbers)
        self.strengths = sorted({*map(float, strengths), self.strength} if strengths else set())
        with in_eval_mode(model):
            width = model.encode_image(pixels[:1]).shape[1]
        texts = _embeddings(model, concepts).to(pixels)
        if texts.shape[1] != width:
            raise ValueError(
                f"the embeddings in concepts= have {texts.shape[1]} dimensions, but "
                f"{model.cfg.model_name} embeds images in {width}"
            )
        names = [str(name) for name in concepts]
        self.images = EffectPass(model, sae, pixels, texts, concepts=names, tokens=tokens)
        self.edit = edit

    def whole_edit(self) -> SteeringEffect | None:
        """Return the effect of all changes of the edit at once; None without an edit."""
        return None if self.edit is None else self.images.effect(self.edit)

    def steer(self, latent: int) -> Steered:
        """Return probabilities per image, before and with the latent held, and the curve."""
        part = None if self.edit is None else self.edit.only(self.images.sae, [latent])
        if part:
            return Steered(self.images.effect(part), None, self.numbers, edit=part)
        effect = self.images.effect({latent: self.strength})
        curve = self._curve(latent, effect) if self.strengths else None
        return Steered(effect, self.strength, self.numbers, curve)

    def _curve(self, latent: int, effect: SteeringEffect) -> Curve:
        """Return the means of the concepts that move most, over all strengths."""
        before = effect.before.double().mean(0)
        moved = effect.after.double().mean(0) - before
        chosen = torch.sort(moved.abs(), descending=True, stable=True).indices[:N_CURVES]
        means = [
            effect.after if s == self.strength else self.images.effect({latent: s}).after
            for s in self.strengths
        ]
        shares = torch.stack([mean.double().mean(0)[chosen] for mean in means], 1)
        return Curve(
            tuple(self.strengths),
            tuple(effect.concepts[c] for c in chosen.tolist()),
            tuple(tuple(row) for row in shares.tolist()),
            tuple(before[chosen].tolist()),
        )


def amounts_of(edit: Edit | None, sae: Dictionary) -> dict[str, list[float | None]]:
    """Return a column with the amount of each latent that an edit changes; none without an edit.

    Raises:
        ValueError: the edit changes no latent of the SAE.
    """
    if edit is None:
        return {}
    column: list[float | None] = [None] * int(sae.cfg.d_sae)
    for change in edit.changes:
        if isinstance(change.basis, Latents) and change.basis.dictionary is sae:
            for target, amount in zip(change.targets, change.amounts, strict=True):
                column[target] = amount
    if all(amount is None for amount in column):
        raise ValueError(
            "edit= changes no latent of this SAE: load it with Edit.load(path, sae=sae), or leave "
            "it out"
        )
    return {"edit": column}


def effects(
    given: Mapping[int, SteeringEffect] | None, steerer: Steerer | None, features: Sequence[int]
) -> Iterator[Steered | None]:
    """Yield each latent's effect: the given one, else a computed one, else None."""
    for latent in features:
        if given is not None and latent in given:
            yield Steered(given[latent], None)
        elif steerer is not None:
            yield steerer.steer(latent)
        else:
            yield None


def _embeddings(model: Any, concepts: Mapping[str, Tensor] | Sequence[str]) -> Tensor:
    if not concepts:
        raise ValueError("concepts= is empty: name at least one text to steer towards")
    if not isinstance(concepts, Mapping):
        texts: Tensor = model.encode_text([str(text) for text in concepts])
        return texts
    rows = torch.stack([torch.as_tensor(row).float().reshape(-1) for row in concepts.values()])
    return torch.nn.functional.normalize(rows, dim=-1)
