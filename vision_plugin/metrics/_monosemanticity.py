"""Monosemanticity score: do the images that a latent fires on look alike to an outside encoder?"""

from __future__ import annotations

import logging
import math
from collections import Counter
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin.metrics import _moments as moments
from vision_plugin.metrics._jackknife import PairSums, jackknife_error
from vision_plugin.metrics._latents import (
    LatentColumns,
    Latents,
    read_embeddings,
    read_latents,
)
from vision_plugin.metrics._null import null_deviation, similarity_spread
from vision_plugin.metrics._result import (
    RARE_BELOW,
    MetricResult,
    mean_of_defined,
    median_of_defined,
)
from vision_plugin.metrics._streaming import State, StreamingMetric
from vision_plugin.metrics._top import N_TOP, VOID, TopRange, merge_top, top_values, top_weight_sums

__all__ = ["Monosemanticity", "MonosemanticityResult", "monosemanticity"]

logger = logging.getLogger(__name__)

Definition = Literal["all", "top16"]
Reason = Literal["ok", "dead", "constant", "one_image"]

SMALLEST_SHARE = 1e-10
"""A denominator below this share of (sum of weights)^2 is one image's weight and rounding."""


@dataclass(frozen=True)
class MonosemanticityResult(MetricResult):
    """Monosemanticity of ``k`` latents.

    Attributes:
        score: the weighted mean cosine similarity of the images, NaN where undefined.
        n_active: number of images on which the latent is not zero.
        reason: ``ok``, or why the score is undefined: ``dead`` (zero on every image), ``constant``
            (the same value, not zero, on every image), ``one_image`` (only one image is above the
            minimum, so there is no pair).
        mean_similarity: mean cosine similarity of all pairs, which a latent that fires at random
            tends to.
        z: (score - mean_similarity) in standard deviations of the score when the latent's
            activations are shuffled over the images; exact, see ``_null.py``. NaN where undefined
            or where shuffling cannot change the score.
        n_effective: (sum w)^2 / sum w^2, the number of images that carry the score.
        standard_error: jackknife standard error over images, None unless ``confidence`` was given;
            NaN where leaving out one image leaves the score undefined.
        low: lower end of the interval, cut at -1.
        high: upper end of the interval, cut at 1.
        n_images: number of images in the scores.
        n_excluded: number of images left out because their embedding has norm 0.
        definition: definition of the score; scores of different definitions do not compare.

    Examples:
        >>> latents = torch.tensor([[1.0, 0], [1, 0], [0, 0]])
        >>> found = vp.metrics.monosemanticity(latents, torch.eye(2)[[0, 0, 1]])
        >>> found.reason, found.n_active.tolist(), round(found.mean_similarity, 3)
        (('ok', 'dead'), [2, 0], 0.333)
    """

    headline = ("mean_score", "median_score", "share_z_above_3", "n_dead", "n_constant", "n_rare")

    score: Float[Tensor, " k"]
    n_active: Int[Tensor, " k"]
    reason: tuple[Reason, ...]
    mean_similarity: float
    z: Float[Tensor, " k"]
    n_effective: Float[Tensor, " k"]
    standard_error: Float[Tensor, " k"] | None
    low: Float[Tensor, " k"] | None
    high: Float[Tensor, " k"] | None
    n_images: int
    n_excluded: int
    definition: Definition

    @property
    def reason_counts(self) -> dict[str, int]:
        """Return the number of latents by reason, every reason present."""
        counts = Counter(self.reason)
        return {reason: counts[reason] for reason in get_args(Reason)}

    def summary(self) -> dict[str, float | int]:
        """Return mean and median over defined scores, and the counts of the undefined ones."""
        counts = self.reason_counts
        defined = counts["ok"]
        return {
            "mean_score": mean_of_defined(self.score),
            "median_score": median_of_defined(self.score),
            "mean_similarity": self.mean_similarity,
            "share_z_above_3": float((self.z > 3).sum()) / defined if defined else math.nan,
            "n_features": len(self.reason),
            "n_defined": defined,
            "n_dead": counts["dead"],
            "n_constant": counts["constant"],
            "n_one_image": counts["one_image"],
            "n_rare": int(((self.n_active > 0) & (self.n_active < RARE_BELOW)).sum()),
            "n_images": self.n_images,
            "n_excluded": self.n_excluded,
        }


class Monosemanticity(StreamingMetric):
    r"""Monosemanticity score of every latent, in one pass (arXiv 2504.02821).

    With latents min-max scaled over the data set to ``w[n,k]`` and ``s`` the cosine similarity of
    the images' embeddings by an encoder other than the one under study,

        score_k = sum_{n<m} w[n,k] w[m,k] s[n,m] / sum_{n<m} w[n,k] w[m,k]

    The numerator is ``(|sum_n w e|^2 - sum_n w^2) / 2`` for unit embeddings ``e``, so sums over
    images are enough; they are kept in float64 and relative to the minimum. The work is one
    multiply-add per non-zero and embedding dimension, on the rows of the state that the batch's
    non-zeros touch; larger batches need less memory traffic. Memory holds the state, ``n_features``
    by ``d_embed`` in float64, and one batch.

    ``definition="top16"`` is the definition of VISAEBench: the same expression over the 16 images
    on which the latent is largest. Its weights are scaled by the range over all images
    (``top_range="dataset"``, what that benchmark computes) or over the 16 (``"top"``, which gives
    the 16th image weight 0). Equal activations are ranked in the order seen.

    An image whose embedding has norm 0 has no cosine: it is left out everywhere and counted. NaN
    and infinity raise. A latent without a pair of positive weight scores NaN, with a reason.

    Args:
        n_features: number of latents, ``k``.
        d_embed: width of the embeddings.
        definition: ``"all"`` images or each latent's ``"top16"``.
        top_range: images whose range scales the weights of ``"top16"``: ``"dataset"`` or ``"top"``.

    Examples:
        >>> metric = vp.metrics.Monosemanticity(n_features=2, d_embed=2)
        >>> metric.update(torch.tensor([[1.0, 0], [1, 1], [0, 1]]), torch.eye(2)[[0, 0, 1]])
        >>> metric.compute().score.tolist()
        [1.0, 0.0]
    """

    sparse_latents = True
    higher_is_better = True

    def __init__(
        self,
        *,
        n_features: int,
        d_embed: int,
        definition: Definition = "all",
        top_range: TopRange = "dataset",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if n_features < 1 or d_embed < 1:
            raise ValueError(
                f"n_features={n_features} and d_embed={d_embed} must both be at least 1"
            )
        _check_choice("definition", definition, Definition)
        _check_choice("top_range", top_range, TopRange)
        self.n_features, self.d_embed = n_features, d_embed
        self.definition, self.top_range = definition, top_range
        states = {**moments.empty_image_sums(d_embed), **moments.empty_ranges(n_features)}
        if definition == "all":
            states.update(moments.empty_pair_sums(n_features, d_embed))
        else:
            states["top_value"] = torch.full((n_features, N_TOP), VOID, dtype=torch.float64)
            states["top_image"] = torch.full((n_features, N_TOP), -1)
            self.add_rows_state("embeddings", torch.zeros(0, d_embed, dtype=torch.float64))
        for name, value in states.items():
            self.add_coupled_state(name, value)

    def update(self, latents: Tensor, embeddings: Float[Tensor, "n d"]) -> None:
        """Add images.

        Args:
            latents: image-level latents ``[n, n_features]``, dense, sparse COO or sparse CSR.
            embeddings: the images' embeddings ``[n, d_embed]`` by an outside encoder, not all zero.

        Raises:
            ValueError: shapes disagree, or a value is NaN or infinite.
        """
        self._add(*self._read(latents, embeddings))

    def _read(self, latents: Tensor, embeddings: Tensor) -> tuple[Latents, Tensor, int]:
        """Check both inputs, drop images whose embedding has norm 0, scale the others to norm 1."""
        columns = read_latents(latents.detach().to(self.device), n_features=self.n_features)
        n_rows = latents.shape[0]
        read = read_embeddings(embeddings.detach(), n_rows=n_rows, d_embed=self.d_embed)
        unit, keep = _unit_rows(read.to(self.device))
        n_excluded = n_rows - int(keep.sum())
        if n_excluded:
            logger.warning(
                "%d of %d images have an embedding of norm 0 and are left out", n_excluded, n_rows
            )
            unit = unit[keep]
            columns = (
                columns.keep_rows(keep) if isinstance(columns, LatentColumns) else columns[keep]
            )
        return columns, unit, n_excluded

    def _add(self, latents: Latents, unit: Tensor, n_excluded: int) -> None:
        state = {name: getattr(self, name) for name in self._coupled}
        before = int(state["n_images"])
        if unit.shape[0] == 0:
            state["n_excluded"] += n_excluded
            return
        ranges = {name: state[name] for name in ("minimum", "maximum", "n_active")}
        moments.add_ranges(ranges, latents)
        if self.definition == "all":
            moments.move_minimum(state, ranges["minimum"])
            moments.add_pairs(state, latents, unit)
        else:
            values, rows = top_values(latents, N_TOP)
            new = (values, torch.where(rows < 0, rows, rows + before))
            old = (state["top_value"], state["top_image"])
            state["top_value"], state["top_image"] = merge_top(old, new)
            self.add_rows("embeddings", unit)
        moments.add_images(state, unit, n_excluded)
        for name, value in {**state, **ranges}.items():
            setattr(self, name, value)

    @staticmethod
    def merge_coupled(first: State, second: State) -> State:
        """Merge two shards' sums exactly, whatever their minima."""
        if "powers" in first:
            return moments.merge_moments(first, second)
        later = second["top_image"]
        later = torch.where(later < 0, later, later + first["n_images"])
        value, image = merge_top(
            (first["top_value"], first["top_image"]), (second["top_value"], later)
        )
        return {
            **moments.merge_image_sums(first, second),
            **moments.merge_ranges(first, second),
            "top_value": value,
            "top_image": image,
        }

    def compute(self) -> MonosemanticityResult:
        """Return the scores over all images seen, by all processes.

        Raises:
            ValueError: fewer than two images have an embedding, so there is no pair.
        """
        return self._result(self.coupled_states(), error=None, confidence=None)

    def _result(
        self, state: State, error: Tensor | None, confidence: float | None
    ) -> MonosemanticityResult:
        n_images, n_excluded = int(state["n_images"]), int(state["n_excluded"])
        _check_enough(n_images, n_excluded)
        numerator, denominator, powers = self._sums(state)
        defined, reason = _reasons(state, powers[0], denominator)
        nan = torch.full_like(numerator, math.nan)
        score = torch.where(defined, numerator / denominator, nan)
        spread = similarity_spread(n_images, state["embedding_sum"], state["gram"])
        deviation = null_deviation(powers, spread)
        low = high = None
        if error is not None and confidence is not None:
            error = torch.where(defined, error, nan)
            width = NormalDist().inv_cdf((1 + confidence) / 2) * error
            low, high = (score - width).clamp(min=-1), (score + width).clamp(max=1)
        return MonosemanticityResult(
            score=score,
            n_active=state["n_active"].clone(),
            reason=reason,
            mean_similarity=spread.mean,
            z=torch.where(defined, (score - spread.mean) / deviation, nan),
            n_effective=torch.where(defined, powers[0] ** 2 / powers[1], nan),
            standard_error=error,
            low=low,
            high=high,
            n_images=n_images,
            n_excluded=n_excluded,
            definition=self.definition,
        )

    def _sums(self, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """Return the score's numerator and denominator and the power sums of the weights."""
        if self.definition == "all":
            powers = state["powers"]
            squared_norm = torch.einsum("kd,kd->k", state["weighted"], state["weighted"])
        else:
            powers, squared_norm = top_weight_sums(
                state, self.rows("embeddings"), n_powers=moments.N_POWERS, top_range=self.top_range
            )
        return (squared_norm - powers[1]) / 2, (powers[0] ** 2 - powers[1]) / 2, powers


def monosemanticity(
    latents: Tensor,
    embeddings: Float[Tensor, "n d"],
    *,
    definition: Definition = "all",
    top_range: TopRange = "dataset",
    confidence: float | None = None,
) -> MonosemanticityResult:
    """Score every latent for monosemanticity in one call; see :class:`Monosemanticity`.

    Args:
        latents: image-level latents ``[n, k]``, dense, sparse COO or sparse CSR.
        embeddings: the images' embeddings ``[n, d]`` by an encoder other than the one studied.
        definition: ``"all"``, or ``"top16"`` for the 16 images on which each latent is largest.
        top_range: for ``"top16"``: weights are scaled by the range over the ``"dataset"`` or the
            ``"top"`` 16.
        confidence: coverage, such as 0.95, of a jackknife interval over images; it costs a second
            pass over the non-zeros and needs ``definition="all"``.

    Raises:
        ValueError: shapes disagree, fewer than two images, NaN or infinity, an unknown option.

    Examples:
        >>> latents = torch.tensor([[1.0, 0], [1, 1], [0, 1]])  # 3 images, 2 latents
        >>> found = vp.metrics.monosemanticity(latents, torch.eye(2)[[0, 0, 1]])
        >>> found.score.tolist()
        [1.0, 0.0]
    """
    if latents.ndim != 2 or embeddings.ndim != 2:
        raise ValueError(
            f"latents must be [n, k] and embeddings [n, d], got {tuple(latents.shape)} and "
            f"{tuple(embeddings.shape)}"
        )
    if confidence is not None and not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, such as 0.95")
    if confidence is not None and definition != "all":
        raise ValueError(
            "the jackknife interval is defined for definition='all' only: leaving out one of the "
            "top 16 images lets another image in"
        )
    metric = Monosemanticity(
        n_features=latents.shape[1],
        d_embed=embeddings.shape[1],
        definition=definition,
        top_range=top_range,
        sync_on_compute=False,
    ).to(latents.device)
    columns, unit, n_excluded = metric._read(latents, embeddings)
    metric._add(columns, unit, n_excluded)
    state = metric.coupled_states()
    _check_enough(int(state["n_images"]), int(state["n_excluded"]))
    error = None
    if confidence is not None:
        numerator, denominator, powers = metric._sums(state)
        sums = PairSums(
            minimum=state["minimum"],
            total=powers[0],
            weighted=state["weighted"],
            numerator=numerator,
            denominator=denominator,
            smallest_share=SMALLEST_SHARE,
        )
        error = jackknife_error(columns, unit, sums)
    metric.drop_cycle()
    return metric._result(state, error, confidence)


def _unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows scaled to norm 1 in float64, and whether each has a direction."""
    unit = rows.to(torch.float64, copy=True)
    norm = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
    if bool(((norm < 1e-100) | (norm > 1e100)).any()):
        # Such entries' squares overflow or underflow float64, so divide by the largest entry first.
        largest = unit.abs().amax(dim=1, keepdim=True) if unit.numel() else norm
        unit /= torch.where(largest > 0, largest, 1.0)
        norm = torch.linalg.vector_norm(unit, dim=1, keepdim=True)
    unit /= torch.where(norm > 0, norm, 1.0)
    return unit, norm.squeeze(1) > 0


def _reasons(state: State, total: Tensor, denominator: Tensor) -> tuple[Tensor, tuple[Reason, ...]]:
    defined = denominator > SMALLEST_SHARE * total * total
    code = torch.where(defined, 0, 3)
    code = torch.where(state["maximum"] == state["minimum"], 2, code)
    code = torch.where(state["n_active"] == 0, 1, code)
    names: tuple[Reason, ...] = get_args(Reason)
    return code == 0, tuple(names[index] for index in code.tolist())


def _check_enough(n_images: int, n_excluded: int) -> None:
    if n_images < 2:
        raise ValueError(
            f"monosemanticity compares pairs of images, and there are {n_images} with an embedding "
            f"({n_excluded} left out for a norm of 0); update with at least two"
        )


def _check_choice(name: str, value: str, allowed: Any) -> None:
    if value not in get_args(allowed):
        raise ValueError(f"{name}={value!r} is not one of {list(get_args(allowed))}")
