"""What holding each latent at a value does to the concepts that pictures are taken for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vision_plugin.models._splicing import token_mask
from vision_plugin.models._tokens import TokenSelection
from vision_plugin.steering import SteeringEffect, latent_change

N_LIKELIEST, N_FALLEN = 6, 3


@dataclass(frozen=True)
class ConceptShift:
    """A concept's mean probability before and while a latent is held at a value."""

    concept: str
    before: float
    after: float


@dataclass(frozen=True)
class Steered:
    """What became of the concepts, and the value the latent was held at, where it is known."""

    effect: SteeringEffect
    strength: float | None


def shifts(effect: SteeringEffect) -> list[ConceptShift]:
    """The likeliest concepts under steering, then those that fell most, as means over pictures."""
    before, after = effect.before.double().mean(0), effect.after.double().mean(0)
    likeliest = torch.sort(after, descending=True, stable=True).indices[:N_LIKELIEST].tolist()
    fallen = torch.sort(after - before, stable=True).indices[:N_FALLEN].tolist()
    chosen = dict.fromkeys([*likeliest, *(c for c in fallen if after[c] < before[c])])
    return [ConceptShift(effect.concepts[c], float(before[c]), float(after[c])) for c in chosen]


class Steerer:
    """Steers one latent after another on the same pictures.

    At the residual stream the model below the hook is run once for all latents.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Any,
        sae: Any,
        pixels: Tensor,
        concepts: Mapping[str, Tensor] | Sequence[str],
        *,
        strength: float,
        tokens: str,
    ) -> None:
        """Embed the concepts and run the pictures unsteered.

        Args:
            model: A VisionBridge with a space shared with text.
            sae: A ``sae_lens.SAE`` at one of its hooks.
            pixels: As ``model.preprocess`` gives them.
            concepts: Texts, or texts with their embeddings [d_embed].
            strength: Value that latents are held at.
            tokens: Kind of token to steer.

        Raises:
            ValueError: an embedding has another width than the model's, or there is no text.
        """
        self.model, self.sae, self.pixels = model, sae, pixels
        self.strength, self.tokens = float(strength), tokens
        self.names = [str(name) for name in concepts]
        plain = model.encode_image(pixels)
        self.texts = _embeddings(model, concepts).to(plain)
        if self.texts.shape[1] != plain.shape[1]:
            raise ValueError(
                f"the concepts' embeddings have {self.texts.shape[1]} dimensions, but "
                f"{model.cfg.model_name} embeds pictures in {plain.shape[1]}"
            )
        self.before = self._probabilities(plain)
        self.start = _first_block(sae)
        self.stream = None
        if self.start is not None:
            self.stream = model(pixels, stop_at_layer=self.start)

    @torch.no_grad()
    def effect(self, latent: int) -> SteeringEffect:
        """Probabilities per picture, before and with the latent held."""
        if self.stream is None:
            with self.model.steer(self.sae, {latent: self.strength}, tokens=self.tokens):
                steered = self.model.encode_image(self.pixels)
        else:
            index, value = torch.tensor([latent]), torch.tensor([self.strength])
            change = latent_change(self.sae, self.stream, index, value).to(self.stream)
            selection = TokenSelection.parse(self.tokens)
            mask = token_mask(selection, self.model.token_layout, self.stream)
            edited = self.stream + (change if mask is None else change * mask)
            steered = self.model.encode_image(edited, start_at_layer=self.start)
        return SteeringEffect(self.names, self.before, self._probabilities(steered))

    def _probabilities(self, embedding: Tensor) -> Tensor:
        logits = self.model.logit_scale * embedding @ self.texts.T
        return torch.softmax(logits, dim=-1).float().cpu()


def effects(
    given: Mapping[int, SteeringEffect] | None, steerer: Steerer | None, features: Sequence[int]
) -> Iterator[Steered | None]:
    """Each latent's effect: the one that was handed in, or else computed, or else None."""
    for latent in features:
        if given is not None and latent in given:
            yield Steered(given[latent], None)
        elif steerer is not None:
            yield Steered(steerer.effect(latent), steerer.strength)
        else:
            yield None


def _embeddings(model: Any, concepts: Mapping[str, Tensor] | Sequence[str]) -> Tensor:
    if not concepts:
        raise ValueError("concepts is empty: name at least one text to steer towards")
    if not isinstance(concepts, Mapping):
        texts: Tensor = model.encode_text([str(text) for text in concepts])
        return texts
    rows = torch.stack([torch.as_tensor(row).float().reshape(-1) for row in concepts.values()])
    return torch.nn.functional.normalize(rows, dim=-1)


def _first_block(sae: Any) -> int | None:
    """Block from which a pass steered at the SAE's hook can start; None for the pixels."""
    metadata = sae.cfg.metadata
    name = metadata["hook_name"]
    if metadata.get("hook_name_out") not in (None, name):
        return None
    match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", str(name))
    return None if match is None else int(match[1]) + (match[2] == "post")
