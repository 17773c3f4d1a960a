"""A model's zero-shot probabilities before and while latents are held at values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.site import Site
from vision_plugin.steering._cached_pass import check_texts_differ
from vision_plugin.steering._edit import Edit
from vision_plugin.steering._edit_pass import EditPass


@dataclass(frozen=True)
class SteeringEffect:
    """Zero-shot probabilities of concepts, per image, before and while steering.

    Attributes:
        concepts: Names of the concepts.
        before: Probabilities without the change, ``[n, c]``.
        after: Probabilities with it, ``[n, c]``.

    Examples:
        >>> concepts = ["red circle", "blue square"]
        >>> texts = model.encode_text(concepts)
        >>> effect = vp.steering.steering_effect(
        ...     model, sae, pixels, texts, {12: 50.0}, concepts=concepts
        ... )
        >>> effect.before.shape, len(effect.gains())
        (torch.Size([8, 2]), 2)
    """

    concepts: list[str]
    before: Float[Tensor, "n c"]
    after: Float[Tensor, "n c"]

    def gains(self, n: int = 5) -> list[tuple[str, float]]:
        """Return the concepts that gain most, with their mean gain in probability."""
        delta = (self.after - self.before).mean(dim=0)
        top = delta.topk(min(n, len(self.concepts)))
        return [
            (self.concepts[i], float(gain))
            for i, gain in zip(top.indices.tolist(), top.values, strict=True)
        ]

    def top(self, probabilities: Tensor) -> list[tuple[str, float]]:
        """Return each image's likeliest concept, with its probability."""
        best = probabilities.max(dim=-1)
        return [
            (self.concepts[i], float(p))
            for i, p in zip(best.indices.tolist(), best.values, strict=True)
        ]


class EffectPass:
    """Images that were run once, ready to be steered with any latents of a dictionary.

    Args:
        model: A VisionBridge with a space shared with text.
        sae: An SAE, or any dictionary, at one of the model's hooks.
        pixels: Images prepared by ``model.preprocess``.
        text_embeddings: Unit embeddings of the concepts, ``[c, d_embed]``.
        concepts: Names of the concepts, one per embedding.
        tokens: Kind of token to steer; None takes the kind that the SAE was trained on.

    Raises:
        ValueError: the dictionary does not fit the model, or concepts and embeddings differ in
            number.

    Examples:
        >>> concepts = ["red circle", "blue square"]
        >>> texts = model.encode_text(concepts)
        >>> ready = vp.steering.EffectPass(model, sae, pixels, texts, concepts=concepts)
        >>> ready.effect({12: 50.0}).after.shape
        torch.Size([8, 2])
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Any,
        sae: Dictionary,
        pixels: Float[Tensor, "n channels height width"],
        text_embeddings: Float[Tensor, "c d_embed"],
        *,
        concepts: Sequence[str],
        tokens: str | None = None,
    ) -> None:
        _check_concepts(concepts, text_embeddings)
        self.model, self.sae, self.concepts = model, sae, list(concepts)
        self.text_embeddings = text_embeddings
        self.tokens = tokens
        Site.of(model, sae, tokens=tokens)  # raises where the two do not fit together
        self.images = EditPass(model, pixels)
        self.before = _probabilities(model, self.images.embed(), text_embeddings)

    @torch.no_grad()
    def effect(self, latents: Mapping[int, float] | Edit) -> SteeringEffect:
        """Return the concepts' probabilities before and while latents are held at values.

        Args:
            latents: Value per latent; or an edit, which names its latents and tokens itself.

        Raises:
            ValueError: a latent is out of range, its value is not finite, or the edit does not fit
                the model.
        """
        if isinstance(latents, Edit):
            embedding = self.images.embed(latents)
        else:  # the SAE was checked at the start
            edit = Edit.clamp(self.sae, latents, tokens=self.tokens)
            embedding = self.images.embed(edit, check_model=False)
        after = _probabilities(self.model, embedding, self.text_embeddings)
        return SteeringEffect(self.concepts, self.before, after)


def steering_effect(
    model: Any,
    sae: Dictionary,
    pixels: Float[Tensor, "n channels height width"],
    text_embeddings: Float[Tensor, "c d_embed"],
    latents: Mapping[int, float],
    *,
    concepts: Sequence[str],
    tokens: str | None = None,
) -> SteeringEffect:
    """Run images with and without steering, and return the concepts' probabilities.

    Args:
        model: A VisionBridge with a space shared with text.
        sae: An SAE, or any dictionary, at one of the model's hooks.
        pixels: Images prepared by ``model.preprocess``.
        text_embeddings: Unit embeddings of the concepts, ``[c, d_embed]``.
        latents: Value per latent.
        concepts: Names of the concepts, one per embedding.
        tokens: Kind of token to steer; None takes the kind that the SAE was trained on.

    Raises:
        ValueError: :class:`EffectPass` or :meth:`EffectPass.effect` raises it.

    Examples:
        >>> concepts = ["red circle", "blue square"]
        >>> texts = model.encode_text(concepts)
        >>> effect = vp.steering.steering_effect(
        ...     model, sae, pixels, texts, {12: 50.0}, concepts=concepts
        ... )
        >>> torch.allclose(effect.after.sum(1), torch.ones(8), atol=1e-4)
        True
    """
    images = EffectPass(model, sae, pixels, text_embeddings, concepts=concepts, tokens=tokens)
    return images.effect(latents)


@torch.no_grad()
def edit_effect(
    model: Any,
    edit: Edit,
    pixels: Float[Tensor, "n channels height width"],
    text_embeddings: Float[Tensor, "c d_embed"],
    *,
    concepts: Sequence[str],
    check_model: bool = True,
) -> SteeringEffect:
    """Run images with and without an edit, and return the concepts' probabilities.

    Args:
        model: A VisionBridge with a space shared with text.
        edit: What changes.
        pixels: Images prepared by ``model.preprocess``.
        text_embeddings: Unit embeddings of the concepts, ``[c, d_embed]``.
        concepts: Names of the concepts, one per embedding.
        check_model: Refuse an SAE that was trained on another model.

    Raises:
        ValueError: the edit does not fit the model, or concepts and embeddings differ in number.

    Examples:
        >>> concepts = ["red circle", "blue square"]
        >>> texts = model.encode_text(concepts)
        >>> edit = vp.Edit.clamp("blocks.2.hook_resid_post", {0: 40.0})
        >>> effect = vp.steering.edit_effect(model, edit, pixels, texts, concepts=concepts)
        >>> effect.before.shape, effect.after.shape
        (torch.Size([8, 2]), torch.Size([8, 2]))
    """
    (effect,) = edit_effects(
        model, [edit], pixels, text_embeddings, concepts=concepts, check_model=check_model
    )
    return effect


@torch.no_grad()
def edit_effects(
    model: Any,
    edits: Sequence[Edit],
    pixels: Float[Tensor, "n channels height width"],
    text_embeddings: Float[Tensor, "c d_embed"],
    *,
    concepts: Sequence[str],
    check_model: bool = True,
) -> list[SteeringEffect]:
    """Run images without and with each of several edits; see :func:`edit_effect`.

    The model below the first edited block runs once for all edits that begin there.

    Args:
        model: A VisionBridge with a space shared with text.
        edits: What changes, one effect for each.
        pixels: Images prepared by ``model.preprocess``.
        text_embeddings: Unit embeddings of the concepts, ``[c, d_embed]``.
        concepts: Names of the concepts, one per embedding.
        check_model: Refuse an SAE that was trained on another model.

    Raises:
        ValueError: an edit does not fit the model, or concepts and embeddings differ in number.

    Examples:
        >>> concepts = ["red circle", "blue square"]
        >>> texts = model.encode_text(concepts)
        >>> edits = [vp.Edit.clamp(hook, {neuron: 40.0}) for neuron in range(3)]
        >>> len(vp.steering.edit_effects(model, edits, pixels, texts, concepts=concepts))
        3
    """
    _check_concepts(concepts, text_embeddings)
    images = EditPass(model, pixels)
    before = _probabilities(model, images.embed(), text_embeddings)
    return [
        SteeringEffect(
            list(concepts),
            before,
            _probabilities(model, images.embed(edit, check_model=check_model), text_embeddings),
        )
        for edit in edits
    ]


def _check_concepts(concepts: Sequence[str], texts: Tensor) -> None:
    if len(concepts) != len(texts):
        raise ValueError(f"concepts= has {len(concepts)} names for {len(texts)} text embeddings")
    check_texts_differ(texts)


def _probabilities(model: Any, embedding: Tensor, texts: Tensor) -> Tensor:
    unit = nn.functional.normalize(embedding, dim=-1)
    return torch.softmax(model.zero_shot_logits(unit, texts), dim=-1).float().cpu()
