"""What a steerability run was asked for, checked once, and the result made from it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from vision_plugin.metrics._steerability_result import (
    Definition,
    SteerabilityResult,
    assemble,
    score_changes,
)


@dataclass(frozen=True)
class Options:
    """Which latents are set to what, and how the outcome is judged; see ``Steerability``."""

    latents: Tensor
    strength: float
    tokens: str
    concepts: tuple[str, ...] | None
    definition: Definition
    threshold: float

    @classmethod
    def read(
        cls,
        sae: Any,
        texts: Tensor,
        *,
        strength: float,
        latents: Iterable[int] | Tensor | None,
        tokens: str,
        concepts: Sequence[str] | None,
        definition: str,
        threshold: float,
    ) -> Options:
        """Check the arguments of a user.

        Raises:
            ValueError: a latent out of range or given twice, no latents, a number that is not
                finite, an unknown definition, or not one name per concept.
        """
        if definition not in get_args(Definition):
            raise ValueError(
                f"definition={definition!r} is not one of {list(get_args(Definition))}"
            )
        for name, value in (("strength", strength), ("threshold", threshold)):
            if not math.isfinite(value):
                raise ValueError(f"{name}={value} must be a finite number")
        if concepts is not None and len(concepts) != len(texts):
            raise ValueError(
                f"there are {len(concepts)} concept names and {len(texts)} text embeddings; row i "
                "of text_embeddings must be the embedding of concepts[i]"
            )
        return cls(
            latents=_read_latents(latents, int(sae.cfg.d_sae)),
            strength=float(strength),
            tokens=tokens,
            concepts=None if concepts is None else tuple(concepts),
            definition="sum" if definition == "sum" else "mean",
            threshold=float(threshold),
        )

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
            delta: the changes.
            texts: unit text embeddings.
            n_images: images there were.
            n_seen: images behind each latent; all of them by default.
            estimate: the sum of squares, for latents that did not see every image.
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
        raise ValueError("latents is empty: name at least one, or leave it out for all of them")
    if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(
            f"latents must be a list of whole numbers, got {index.dtype} of shape "
            f"{list(index.shape)}"
        )
    index = index.detach().cpu().long()
    outside = index[(index < 0) | (index >= d_sae)]
    if len(outside):
        raise ValueError(f"latent {int(outside[0])} is out of range: there are {d_sae}, from 0")
    if len(index.unique()) < len(index):
        raise ValueError("latents names a latent twice; each may be given once")
    return index.clone()
