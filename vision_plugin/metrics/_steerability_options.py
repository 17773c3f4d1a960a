"""The options of steerability: their checks, and the results they lead to."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar, get_args

import torch
from torch import Tensor

from vision_plugin.metrics._steerability_result import (
    THRESHOLD,
    Definition,
    SteerabilityResult,
    assemble,
    score_changes,
)
from vision_plugin.models.dictionary import Dictionary
from vision_plugin.steering import Steering

STRENGTH = 150.0
"""Value that latents are set to for scoring (arXiv 2504.08729)."""

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True, kw_only=True)
class SteerabilityOptions:
    """What to steer, and how to score the outcome.

    Raises:
        ValueError: a number is not finite, or the definition is unknown.

    Examples:
        >>> options = vp.metrics.SteerabilityOptions(strength=50.0, latents=[12, 13])
        >>> options.strength, options.tokens
        (50.0, 'all')
    """

    strength: float = STRENGTH
    """Value that each latent is set to, in units of the dictionary's latents."""
    latents: Iterable[int] | Tensor | None = None
    """Latents to steer; None steers all of them."""
    tokens: str = "all"
    """Tokens to steer: ``"cls"``, ``"patch"``, ``"register"`` or ``"all"``."""
    concepts: Sequence[str] | None = None
    """Names of the concepts, one per text embedding."""
    definition: Definition = "sum"
    """``"sum"`` over concepts, as in the authors' code, or ``"mean"``."""
    threshold: float = THRESHOLD
    """Sum of squared changes above which a latent is steerable, under either definition."""
    scale: float | None = None
    """Factor of the cosine similarities; None takes the model's own scale."""
    batch_size: int = 64
    """Sequences per forward pass."""
    closed_form: bool = True
    """Whether to use the closed form behind the last block where it applies."""
    watch: Callable[[int], object] | None = None
    """Called with the number of passes, one for each latent and image, as they are done."""

    def __post_init__(self) -> None:
        if self.definition not in get_args(Definition):
            raise ValueError(
                f"definition={self.definition!r} is not one of {list(get_args(Definition))}"
            )
        for name in ("strength", "threshold"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number")

    def open(
        self, model: Any, sae: Dictionary, text_embeddings: Tensor
    ) -> tuple[Steering, Scoring]:
        """Return the object that steers and the object that scores the outcome.

        Raises:
            ValueError: a latent is out of range or given twice, there are no latents, there is not
                one name per concept, or the dictionary does not fit the model.
        """
        if self.concepts is not None and len(self.concepts) != len(text_embeddings):
            raise ValueError(
                f"concepts= has {len(self.concepts)} names for {len(text_embeddings)} text "
                "embeddings; row i of text_embeddings must be the embedding of concepts[i]"
            )
        scoring = Scoring(
            latents=_read_latents(self.latents, int(sae.cfg.d_sae)),
            strength=float(self.strength),
            tokens=self.tokens,
            concepts=None if self.concepts is None else tuple(self.concepts),
            definition=self.definition,
            threshold=float(self.threshold),
        )
        steering = Steering(
            model,
            sae,
            text_embeddings,
            tokens=self.tokens,
            scale=self.scale,
            batch_size=self.batch_size,
            closed_form=self.closed_form,
            watch=self.watch,
        )
        return steering, scoring


def takes_options(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Show the fields of :class:`SteerabilityOptions` in a signature that ends in ``**options``.

    Editors, ``help`` and the registry of metrics then see the options by their names.
    """
    return takes_options_except()(function)


def takes_options_except(*left_out: str) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Show all fields but some, see :func:`takes_options`."""

    def show(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)
        own = list(signature.parameters.values())
        keyword = inspect.Parameter.KEYWORD_ONLY
        fields = [
            inspect.Parameter(field.name, keyword, default=field.default, annotation=field.type)
            for field in dataclasses.fields(SteerabilityOptions)
            if field.name not in left_out
        ]
        function.__signature__ = signature.replace(parameters=[*own[:-1], *fields])  # type: ignore[attr-defined]
        return function

    return show


@dataclass(frozen=True)
class Scoring:
    """The latents, the value they were set to, and how the outcome is scored."""

    latents: Tensor
    strength: float
    tokens: str
    concepts: tuple[str, ...] | None
    definition: Definition
    threshold: float

    def result(
        self,
        delta: Tensor,
        texts: Tensor,
        n_images: int,
        *,
        n_seen: Tensor | None = None,
        estimate: Tensor | None = None,
    ) -> SteerabilityResult:
        """Score mean changes ``[k, c]``.

        Args:
            delta: mean change of each concept's probability, ``[k, c]``.
            texts: unit text embeddings, ``[c, d_embed]``.
            n_images: number of images.
            n_seen: number of images behind each latent, ``[k]``; all of them by default.
            estimate: sum of squares ``[k]``, used for latents that did not see every image.
        """
        scores = score_changes(delta, texts.to(delta.device))
        if n_seen is None:
            n_seen = torch.full((len(self.latents),), n_images)
        finished = (n_seen == n_images).to(delta.device)
        if estimate is not None:
            squares = torch.where(finished, scores.sum_of_squares, estimate.to(delta.device))
            scores = replace(scores, sum_of_squares=squares)
        return assemble(
            scores,
            delta=delta,
            finished=finished,
            n_concepts=len(texts),
            latents=self.latents.clone(),
            strength=self.strength,
            definition=self.definition,
            threshold=self.threshold,
            tokens=self.tokens,
            n_images=n_images,
            n_seen=n_seen,
            concepts=self.concepts,
        )


def _read_latents(latents: Iterable[int] | Tensor | None, d_sae: int) -> Tensor:
    if latents is None:
        return torch.arange(d_sae)
    index = latents if isinstance(latents, Tensor) else torch.tensor(list(latents))
    if index.numel() == 0:
        raise ValueError("latents= is empty: name at least one, or leave it out for all of them")
    if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(
            f"latents= must be a list of whole numbers, got {index.dtype} of shape "
            f"{list(index.shape)}"
        )
    index = index.detach().cpu().long()
    outside = index[(index < 0) | (index >= d_sae)]
    if len(outside):
        raise ValueError(f"latent {int(outside[0])} is out of range: there are {d_sae}, from 0")
    if len(index.unique()) < len(index):
        raise ValueError("latents= names a latent twice; give each one once")
    return index.clone()
