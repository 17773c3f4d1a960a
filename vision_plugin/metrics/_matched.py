"""Compare latents with a control at equal firing: do trained latents score above random ones?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

from torch import Tensor

from vision_plugin.metrics._monosemanticity import MonosemanticityResult
from vision_plugin.metrics._result import RARE_BELOW, MetricResult

__all__ = ["EqualFiringBin", "EqualFiringResult", "compare_at_equal_firing"]

Verdict = Literal["above", "below", "not told apart", "not comparable"]

SMALLEST_BIN = 5
"""A bin with fewer latents of either dictionary says nothing about their spread."""


@dataclass(frozen=True)
class EqualFiringBin(MetricResult):
    """The latents of both dictionaries that fire on about as many images.

    Attributes:
        fewest: smallest number of active images in the bin.
        most: largest number of active images in the bin, included.
        n_latents: latents under study in it.
        n_control: latents of the control in it.
        mean: mean score of the latents under study.
        control_mean: mean score of the control.
        difference: ``mean - control_mean``.
        standard_error: of the difference.

    Examples:
        >>> fires = torch.arange(64)[:, None] % torch.arange(2, 22)  # 64 images, 20 latents
        >>> scores = vp.metrics.monosemanticity(
        ...     (fires == 0).float(), torch.eye(4)[torch.arange(64) % 4]
        ... )
        >>> found = vp.metrics.compare_at_equal_firing(scores, scores, min_active=2)
        >>> [(one.fewest, one.most, one.n_latents) for one in found.bins]
        [(4, 7, 12), (8, 15, 5)]
    """

    fewest: int
    most: int
    n_latents: int
    n_control: int
    mean: float
    control_mean: float
    difference: float
    standard_error: float


@dataclass(frozen=True)
class EqualFiringResult(MetricResult):
    """How much higher latents score than a control that fires as often.

    Attributes:
        difference: mean over the compared latents; NaN where no bin holds enough of both.
        standard_error: of the difference.
        low: lower end of the interval.
        high: upper end of the interval.
        confidence: coverage of the interval.
        n_latents: latents that are compared.
        n_left_out: latents with a score that are not: they fire on too few images, or too few
            latents of the control fire as often.
        n_control: latents of the control that they are compared with.
        bins: the bins that are compared, rarest first.

    Examples:
        >>> fires = torch.arange(64)[:, None] % torch.arange(2, 22)  # 64 images, 20 latents
        >>> scores = vp.metrics.monosemanticity(
        ...     (fires == 0).float(), torch.eye(4)[torch.arange(64) % 4]
        ... )
        >>> found = vp.metrics.compare_at_equal_firing(scores, scores, min_active=2)
        >>> found.difference, found.verdict
        (0.0, 'not told apart')
    """

    headline = ("difference", "low", "high", "n_latents", "n_left_out")

    difference: float
    standard_error: float
    low: float
    high: float
    confidence: float
    n_latents: int
    n_left_out: int
    n_control: int
    bins: tuple[EqualFiringBin, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return every field, and the verdict, as plain JSON types."""
        return {**super().to_dict(), "verdict": self.verdict}

    @property
    def verdict(self) -> Verdict:
        """Which side of 0 the interval lies on."""
        if math.isnan(self.difference):
            return "not comparable"
        if self.low > 0:
            return "above"
        return "below" if self.high < 0 else "not told apart"


def compare_at_equal_firing(
    latents: MonosemanticityResult,
    control: MonosemanticityResult,
    *,
    min_active: int = RARE_BELOW,
    confidence: float = 0.95,
) -> EqualFiringResult:
    r"""Compare the monosemanticity of latents with that of a control that fires as often.

    A latent's score depends on how often it fires: a direction drawn at random scores high where it
    fires on three images that happen to be alike, and near the mean similarity where it fires on
    all of them. So means over dictionaries that fire differently do not compare. Here latents go
    into bins by the number of images they are active on, bin ``b`` from ``2^b`` to ``2^(b+1) - 1``,
    and the difference of means in each bin counts by its share of the latents under study:

        difference = sum_b p_b (mean_b - control_mean_b),   p_b = n_b / sum_b n_b
        standard_error^2 = sum_b p_b^2 (var_b / n_b + control_var_b / control_n_b)

    with ``n_b`` latents and sample variances (divided by ``n_b - 1``). The interval is the
    difference plus and minus the normal quantile times the standard error. It says what other
    latents and other random directions would give on the same images. Other images add to it: left
    out in groups, they give one to two times that standard error
    (``benchmarks/monosemanticity.py``).

    Edges: a latent without a score does not enter. A latent on fewer than ``min_active`` images is
    left out, since few images are alike by luck. A bin with fewer than five latents of either
    dictionary is left out. Left out latents are counted. Where no bin is left, the difference and
    the interval are NaN.

    Args:
        latents: scores of the latents under study.
        control: scores of random directions that are as sparse, on the same images.
        min_active: number of images from which a latent is compared.
        confidence: coverage of the interval, between 0 and 1.

    Raises:
        ValueError: the two results come from different images, embeddings or definitions, or an
            argument is out of range.

    Examples:
        >>> _ = torch.manual_seed(0)
        >>> kinds = torch.arange(200) % 4
        >>> fires = torch.rand(200, 20) < 0.2
        >>> of_one_kind = fires & (kinds[:, None] == torch.arange(20) % 4)
        >>> at_random = of_one_kind[torch.randperm(200)]
        >>> true, control = (
        ...     vp.metrics.monosemanticity(fired.float(), torch.eye(4)[kinds])
        ...     for fired in (of_one_kind, at_random)
        ... )
        >>> vp.metrics.compare_at_equal_firing(true, control, min_active=2).verdict
        'above'
    """
    _check_same_images(latents, control)
    if min_active < 1:
        raise ValueError(f"min_active={min_active} must be at least 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, such as 0.95")
    score, firing = _scored(latents, min_active)
    control_score, control_firing = _scored(control, min_active)
    bins = []
    for octave in sorted({int(n).bit_length() - 1 for n in firing}):
        fewest, most = 2**octave, 2 ** (octave + 1) - 1
        inside = score[(firing >= fewest) & (firing <= most)]
        control_inside = control_score[(control_firing >= fewest) & (control_firing <= most)]
        if min(len(inside), len(control_inside)) >= SMALLEST_BIN:
            bins.append(_bin(max(fewest, min_active), most, inside, control_inside))
    n_scored = int((~latents.score.isnan()).sum())
    return _combine(tuple(bins), n_scored, confidence)


def _check_same_images(latents: MonosemanticityResult, control: MonosemanticityResult) -> None:
    for name, what in (("definition", "definition"), ("n_images", "number of images")):
        here, there = getattr(latents, name), getattr(control, name)
        if here != there:
            raise ValueError(
                f"the latents' {name}={here!r} is not the control's {name}={there!r}: score both "
                f"with the same {what}"
            )
    similarity = (latents.mean_similarity, control.mean_similarity)
    if not math.isclose(*similarity, rel_tol=1e-6, abs_tol=1e-9):
        raise ValueError(
            f"the mean similarity of the latents' images is {similarity[0]:.6g}, of the control's "
            f"{similarity[1]:.6g}: score both on the same images with the same embeddings"
        )


def _scored(result: MonosemanticityResult, min_active: int) -> tuple[Tensor, Tensor]:
    """Scores and numbers of active images of the latents that are compared."""
    score, firing = result.score.double().cpu(), result.n_active.cpu()
    kept = ~score.isnan() & (firing >= min_active)
    return score[kept], firing[kept]


def _bin(fewest: int, most: int, score: Tensor, control_score: Tensor) -> EqualFiringBin:
    mean, control_mean = float(score.mean()), float(control_score.mean())
    variance = score.var() / len(score) + control_score.var() / len(control_score)
    return EqualFiringBin(
        fewest=fewest,
        most=most,
        n_latents=len(score),
        n_control=len(control_score),
        mean=mean,
        control_mean=control_mean,
        difference=mean - control_mean,
        standard_error=math.sqrt(float(variance)),
    )


def _combine(
    bins: tuple[EqualFiringBin, ...], n_scored: int, confidence: float
) -> EqualFiringResult:
    n_latents = sum(each.n_latents for each in bins)
    difference = error = math.nan
    if bins:
        shares = [each.n_latents / n_latents for each in bins]
        parts = list(zip(shares, bins, strict=True))
        difference = sum(share * each.difference for share, each in parts)
        error = math.sqrt(sum((share * each.standard_error) ** 2 for share, each in parts))
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return EqualFiringResult(
        difference=difference,
        standard_error=error,
        low=difference - reach,
        high=difference + reach,
        confidence=confidence,
        n_latents=n_latents,
        n_left_out=n_scored - n_latents,
        n_control=sum(each.n_control for each in bins),
        bins=bins,
    )
