"""Results of steering: numbers per latent from the changes of the concepts' probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vision_plugin.metrics._result import MetricResult, mean_of_defined

__all__ = ["SteerabilityCurve", "SteerabilityResult"]

Definition = Literal["sum", "mean"]

THRESHOLD = 0.10
"""A latent is steerable above this sum of squared changes (arXiv 2504.08729)."""

_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class SteerabilityScores(MetricResult):
    """Numbers per latent, or per edit, that follow from the changes of the probabilities."""

    score: Float[Tensor, " k"]
    power: Float[Tensor, " k"]
    ratio: Float[Tensor, " k"]
    polysemanticity: Float[Tensor, " k"]
    top_concept: Int[Tensor, " k"]

    def summary(self) -> dict[str, float | int]:
        """Return typical values."""
        return {
            "mean_score": mean_of_defined(self.score),
            "max_score": float(self.score.max()),
            "mean_power": mean_of_defined(self.power),
        }


@dataclass(frozen=True)
class SteerabilityResult(SteerabilityScores):
    """Steerability of ``k`` latents over a vocabulary of ``c`` concepts.

    Attributes:
        score: the sum, or the mean, over concepts of ``delta ** 2``; see ``definition``.
        power: the largest gain of a concept's probability.
        ratio: ``score / power``; NaN for a latent that moves nothing.
        polysemanticity: distance between ``delta @ texts`` and the unit vector along the sum of the
            unit text embeddings.
        top_concept: the concept that gains most; -1 for a latent that moves nothing.
        delta: mean change of each concept's probability; None where it was not kept.
        steerable: whether the *sum* of ``delta ** 2`` exceeds ``threshold``, whatever the
            definition of the score.
        coverage: number of distinct top concepts among the steerable latents.
        latents: numbers of these latents.
        strength: value that they were set to.
        definition: ``"sum"`` (the authors' code) or ``"mean"`` over concepts; scores of different
            definitions do not compare.
        threshold: sum of ``delta ** 2`` above which a latent is steerable.
        tokens: kind of token that was steered.
        n_images: number of images.
        n_seen: number of images each latent was steered on, fewer than ``n_images`` where screening
            dropped it. Such a latent is not steerable; its score is an unbiased estimate for all
            images (not the sum of squares of its ``delta``), and its other numbers describe the
            images seen.
        concepts: names of the concepts, where they were given.

    Examples:
        >>> texts = model.encode_text(["a red circle", "a blue square"])
        >>> found = vp.metrics.steerability(
        ...     model, sae, pixels, texts, latents=[12, 13], strength=50.0
        ... )
        >>> found.latents.tolist(), found.strength, found.n_images
        ([12, 13], 50.0, 8)
    """

    headline = ("mean_score", "max_score", "n_steerable", "share_steerable", "coverage")

    delta: Float[Tensor, "k c"] | None
    steerable: Bool[Tensor, " k"]
    coverage: int
    latents: Int[Tensor, " k"]
    strength: float
    definition: Definition
    threshold: float
    tokens: str
    n_images: int
    n_seen: Int[Tensor, " k"]
    concepts: tuple[str, ...] | None = None

    @property
    def directional(self) -> Float[Tensor, "k c"]:
        """Return signed squares ``delta * |delta|``: above 0 for concepts that a latent raises.

        Raises:
            ValueError: the changes were not kept.
        """
        if self.delta is None:
            raise ValueError("the changes were not kept: call steerability with keep_delta=True")
        return self.delta * self.delta.abs()

    @property
    def top_names(self) -> tuple[str | None, ...]:
        """Return the name of each latent's top concept; None for a latent that moves nothing.

        Raises:
            ValueError: the concepts have no names.
        """
        if self.concepts is None:
            raise ValueError("the concepts have no names: call steerability with concepts=[...]")
        return tuple(self.concepts[c] if c >= 0 else None for c in self.top_concept.tolist())

    def summary(self) -> dict[str, float | int]:
        """Return how many latents are steerable, over how many concepts, and typical values."""
        n_latents = len(self.latents)
        n_steerable = int(self.steerable.sum())
        return {
            **super().summary(),
            "mean_ratio": mean_of_defined(self.ratio),
            "mean_polysemanticity": mean_of_defined(self.polysemanticity),
            "n_latents": n_latents,
            "n_steerable": n_steerable,
            "share_steerable": n_steerable / n_latents,
            "coverage": self.coverage,
            "n_unmoved": int((self.top_concept < 0).sum()),
            "n_screened_out": int((self.n_seen < self.n_images).sum()),
            "n_images": self.n_images,
            "strength": self.strength,
        }


@dataclass(frozen=True)
class SteerabilityCurve(MetricResult):
    """Steerability at several strengths; ``results[j]`` belongs to ``strengths[j]``.

    Examples:
        >>> texts = model.encode_text(["a red circle", "a blue square"])
        >>> curve = vp.metrics.steerability_curve(
        ...     model, sae, pixels, texts, latents=[12], strengths=(10.0, 50.0)
        ... )
        >>> curve.strengths, len(curve.results)
        ((10.0, 50.0), 2)
    """

    strengths: tuple[float, ...]
    results: tuple[SteerabilityResult, ...]

    @property
    def score(self) -> Float[Tensor, "strengths k"]:
        """Return the score at each strength."""
        return torch.stack([result.score for result in self.results])

    @property
    def power(self) -> Float[Tensor, "strengths k"]:
        """Return the power at each strength."""
        return torch.stack([result.power for result in self.results])

    @property
    def coverage(self) -> tuple[int, ...]:
        """Return the coverage at each strength."""
        return tuple(result.coverage for result in self.results)

    def summary(self) -> dict[str, float | int]:
        """Return the share of steerable latents and the coverage at each strength."""
        rows: dict[str, float | int] = {}
        for strength, result in zip(self.strengths, self.results, strict=True):
            rows[f"share_steerable_at_{strength:g}"] = float(result.steerable.double().mean())
            rows[f"coverage_at_{strength:g}"] = result.coverage
        return rows


@dataclass(frozen=True)
class Scores:
    """Numbers per latent that follow from its changes alone, float64."""

    sum_of_squares: Tensor
    power: Tensor
    polysemanticity: Tensor
    top_concept: Tensor

    def under(self, definition: Definition, n_concepts: int) -> tuple[Tensor, Tensor]:
        """Return the scores, and their ratios to the power; NaN for what moves nothing."""
        score = self.sum_of_squares / (n_concepts if definition == "mean" else 1)
        moves = (self.top_concept >= 0) & (self.power > 0)
        return score, torch.where(moves, score / self.power, math.nan)


def score_changes(delta: Tensor, texts: Tensor) -> Scores:
    """Return the scores of mean changes ``[k, c]``, given unit text embeddings ``[c, d]``."""
    texts = texts.double()
    centre = torch.nn.functional.normalize(texts.sum(0), dim=0)
    step = max(1, _CHUNK_ELEMENTS // delta.shape[1])
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for some in delta.split(step):
        double = some.double()
        power, top = double.max(dim=1)
        moved = (double != 0).any(dim=1)
        parts.append(
            (
                double.square().sum(1),
                power,
                (double @ texts - centre).norm(dim=1),
                torch.where(moved, top, -1),
            )
        )
    return Scores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def assemble(
    scores: Scores,
    *,
    delta: Tensor | None,
    finished: Tensor,
    n_concepts: int,
    latents: Tensor,
    strength: float,
    definition: Definition,
    threshold: float,
    tokens: str,
    n_images: int,
    n_seen: Tensor,
    concepts: tuple[str, ...] | None,
) -> SteerabilityResult:
    """Return the result made of the numbers per latent."""
    score, ratio = scores.under(definition, n_concepts)
    steerable = finished & (scores.sum_of_squares > threshold)
    return SteerabilityResult(
        score=score,
        power=scores.power,
        ratio=ratio,
        polysemanticity=scores.polysemanticity,
        top_concept=scores.top_concept,
        delta=delta,
        steerable=steerable,
        coverage=int(scores.top_concept[steerable].unique().numel()),
        latents=latents,
        strength=strength,
        definition=definition,
        threshold=threshold,
        tokens=tokens,
        n_images=n_images,
        n_seen=n_seen,
        concepts=concepts,
    )


def join(parts: Sequence[SteerabilityResult]) -> SteerabilityResult:
    """Return the results of several groups of latents as one."""
    if len(parts) == 1:
        return parts[0]

    def column(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    top_concept, steerable = column("top_concept"), column("steerable")
    return replace(
        parts[0],
        score=column("score"),
        power=column("power"),
        ratio=column("ratio"),
        polysemanticity=column("polysemanticity"),
        top_concept=top_concept,
        steerable=steerable,
        coverage=int(top_concept[steerable].unique().numel()),
        latents=column("latents"),
        n_seen=column("n_seen"),
    )
