"""Steerability of whole edits: does an edit move the model's answer, and towards which concept?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vision_plugin.metrics._steerability_result import (
    THRESHOLD,
    Definition,
    SteerabilityScores,
    score_changes,
)
from vision_plugin.steering import Edit, SteeringEffect, edit_effects

__all__ = ["EditSteerabilityResult", "edit_steerability"]


@dataclass(frozen=True)
class EditSteerabilityResult(SteerabilityScores):
    """Steerability of ``k`` edits over a vocabulary of ``c`` concepts.

    Attributes:
        edits: What each edit does, in words, or the names that they were given.
        score: The sum, or the mean, over concepts of ``delta ** 2``; see ``definition``.
        power: The largest gain of a concept's probability.
        ratio: ``score / power``; NaN for an edit that moves nothing.
        polysemanticity: Distance between ``delta @ texts`` and the unit vector along the sum of the
            unit text embeddings.
        top_concept: The concept that gains most; -1 for an edit that moves nothing.
        delta: Mean change of each concept's probability.
        steerable: Whether the *sum* of ``delta ** 2`` exceeds ``threshold``.
        definition: ``"sum"`` or ``"mean"`` over concepts.
        threshold: Sum of ``delta ** 2`` above which an edit steers.
        n_images: Number of images.
        concepts: Names of the concepts.

    Examples:
        >>> texts = model.encode_text(["a red circle", "a blue square"])
        >>> edits = {"nothing": vp.Edit.scale("blocks.2.hook_resid_post", {0: 1.0})}
        >>> found = vp.metrics.edit_steerability(
        ...     model, edits, pixels, texts, concepts=["red circle", "blue square"]
        ... )
        >>> found.edits, found.steerable.tolist()
        (('nothing',), [False])
    """

    headline = ("mean_score", "max_score", "n_steerable", "coverage")

    edits: tuple[str, ...]
    delta: Float[Tensor, "k c"]
    steerable: Bool[Tensor, " k"]
    definition: Definition
    threshold: float
    n_images: int
    concepts: tuple[str, ...]

    @classmethod
    def of(
        cls,
        effects: Mapping[str, SteeringEffect],
        text_embeddings: Float[Tensor, "c d_embed"],
        *,
        definition: Definition = "sum",
        threshold: float = THRESHOLD,
    ) -> EditSteerabilityResult:
        """Score effects that were measured before.

        Args:
            effects: The effect of each edit on the same images and concepts, by its name.
            text_embeddings: One embedding per concept, ``[c, d_embed]``.
            definition: ``"sum"`` over concepts or ``"mean"``.
            threshold: Sum of squared changes above which an edit steers.

        Raises:
            ValueError: there is no effect, or the definition is unknown.
        """
        if not effects:
            raise ValueError("edits= is empty: name at least one")
        if definition not in get_args(Definition):
            raise ValueError(
                f"definition={definition!r} is not one of {list(get_args(Definition))}"
            )
        first = next(iter(effects.values()))
        changes = [(e.after.double() - e.before.double()).mean(0) for e in effects.values()]
        delta = torch.stack(changes)
        unit = torch.nn.functional.normalize(text_embeddings.double().cpu(), dim=-1)
        scores = score_changes(delta, unit)
        score, ratio = scores.under(definition, delta.shape[1])
        return cls(
            edits=tuple(effects),
            score=score,
            power=scores.power,
            ratio=ratio,
            polysemanticity=scores.polysemanticity,
            top_concept=scores.top_concept,
            delta=delta,
            steerable=scores.sum_of_squares > threshold,
            definition=definition,
            threshold=threshold,
            n_images=len(first.before),
            concepts=tuple(first.concepts),
        )

    @property
    def top_names(self) -> tuple[str | None, ...]:
        """Return the name of each edit's top concept; None for an edit that moves nothing."""
        return tuple(self.concepts[c] if c >= 0 else None for c in self.top_concept.tolist())

    def summary(self) -> dict[str, float | int]:
        """Return how many edits steer, towards how many concepts, and typical values."""
        return {
            **super().summary(),
            "n_edits": len(self.edits),
            "n_steerable": int(self.steerable.sum()),
            "coverage": int(self.top_concept[self.steerable].unique().numel()),
            "n_images": self.n_images,
        }


def edit_steerability(
    model: Any,
    edits: Edit | Sequence[Edit] | Mapping[str, Edit],
    pixels: Float[Tensor, "n channels height width"],
    text_embeddings: Float[Tensor, "c d_embed"],
    *,
    concepts: Sequence[str],
    definition: Definition = "sum",
    threshold: float = THRESHOLD,
    check_model: bool = True,
) -> EditSteerabilityResult:
    """Score edits as :func:`steerability` scores latents (arXiv 2504.08729).

    The score of an edit is the sum of squared mean changes of the concepts' probabilities. For an
    edit that clamps one latent it is the steerability of that latent.

    Args:
        model: A VisionBridge with a text space.
        edits: One edit, several, or edits by name. Edits may have many changes at many hooks.
        pixels: Images prepared by ``model.preprocess``.
        text_embeddings: One embedding per concept, ``[c, d_embed]``.
        concepts: Names of the concepts, one per embedding.
        definition: ``"sum"`` over concepts, as in the authors' code, or ``"mean"``.
        threshold: Sum of squared changes above which an edit steers, under either definition.
        check_model: Refuse an SAE that was trained on another model.

    Raises:
        ValueError: there is no edit, two are the same in words and have no names, an edit does not
            fit the model, or concepts and embeddings differ in number.

    Examples:
        >>> texts = model.encode_text(["a red circle", "a blue square"])
        >>> edit = vp.Edit.clamp("blocks.2.hook_resid_post", {0: 40.0})
        >>> found = vp.metrics.edit_steerability(
        ...     model, edit, pixels, texts, concepts=["red circle", "blue square"]
        ... )
        >>> found.edits
        ('clamp neuron 0 to 40 (neurons at blocks.2.hook_resid_post, tokens all)',)
    """
    named = _named(edits)
    effects = edit_effects(
        model,
        list(named.values()),
        pixels,
        text_embeddings,
        concepts=concepts,
        check_model=check_model,
    )
    return EditSteerabilityResult.of(
        dict(zip(named, effects, strict=True)),
        text_embeddings,
        definition=definition,
        threshold=threshold,
    )


def _named(edits: Edit | Sequence[Edit] | Mapping[str, Edit]) -> dict[str, Edit]:
    if isinstance(edits, Mapping):
        return {str(name): edit for name, edit in edits.items()}
    several = [edits] if isinstance(edits, Edit) else list(edits)
    named = {str(edit): edit for edit in several}
    if len(named) < len(several):
        raise ValueError("edits= has two that read the same: give a mapping with a name for each")
    return named
