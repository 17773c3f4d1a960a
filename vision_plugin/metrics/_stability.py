"""Stability: do two dictionaries, say from two seeds, hold the same directions?"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vision_plugin.metrics._latents import check_finite
from vision_plugin.metrics._result import MetricResult, mean_of_defined
from vision_plugin.metrics._streaming import StreamingMetric

__all__ = ["Stability", "StabilityResult", "stability"]

logger = logging.getLogger(__name__)

ROWS_AT_ONCE = 2**12
LARGEST_ASSIGNMENT = 2**13
"""Most directions that are assigned by default: the time is cubic, minutes above this."""
SECONDS_AT_LARGEST = 60.0
"""Time of an assignment of that size, roughly."""


@dataclass(frozen=True)
class StabilityResult(MetricResult):
    """Match of the decoder directions of a first dictionary with those of a second.

    Attributes:
        max_cosine: cosine of each direction of the first with its nearest of the second; several
            directions may share one. NaN for a direction of norm 0.
        max_cosine_back: cosine of each direction of the second with its nearest of the first.
        matched_cosine: cosine with the partner in the best one-to-one assignment (Hungarian); NaN
            without a partner, None where no assignment was asked for.
        n_zero: number of directions of norm 0, left out of both.

    Examples:
        >>> found = vp.metrics.stability(torch.eye(3)[:2], torch.eye(3))
        >>> found.max_cosine_back.tolist(), found.n_zero
        ([1.0, 1.0, 0.0], 0)
    """

    headline = ("mean_max_cosine", "mean_matched_cosine", "share_above_0.9")

    max_cosine: Float[Tensor, " k1"]
    max_cosine_back: Float[Tensor, " k2"]
    matched_cosine: Float[Tensor, " k1"] | None
    n_zero: int

    def summary(self) -> dict[str, float | int]:
        """Return the means, the share of directions found again, and the counts."""
        matched = self.matched_cosine
        defined = self.max_cosine[~self.max_cosine.isnan()]
        return {
            "mean_max_cosine": mean_of_defined(self.max_cosine),
            "mean_max_cosine_back": mean_of_defined(self.max_cosine_back),
            "mean_matched_cosine": math.nan if matched is None else mean_of_defined(matched),
            "share_above_0.7": mean_of_defined((defined > 0.7).double()),
            "share_above_0.9": mean_of_defined((defined > 0.9).double()),
            "n_directions": self.max_cosine.numel(),
            "n_zero": self.n_zero,
        }


def stability(
    decoder: Float[Tensor, "k1 d"],
    other: Float[Tensor, "k2 d_other"],
    *,
    assign: bool | None = None,
) -> StabilityResult:
    """Match the decoder directions of two SAEs by cosine.

    ``stability(decoder, random_dictionary(...).W_dec)`` gives the level of chance.

    Args:
        decoder: the first SAE's ``W_dec``, ``[k1, d]``.
        other: the second SAE's ``W_dec``, ``[k2, d]``.
        assign: whether to solve the one-to-one assignment, cubic in the number of directions; by
            default only up to 8,192 of them. With more, a warning says beforehand how long it
            takes.

    Raises:
        ValueError: widths differ, there is no direction, or a value is NaN or infinite.

    Examples:
        >>> found = vp.metrics.stability(torch.eye(3), torch.eye(3).flip(0))
        >>> found.matched_cosine.tolist()
        [1.0, 1.0, 1.0]
    """
    if decoder.ndim != 2 or other.ndim != 2 or decoder.shape[1] != other.shape[1]:
        raise ValueError(
            f"decoders {tuple(decoder.shape)} and {tuple(other.shape)} must be [directions, d] "
            "with the same d"
        )
    check_finite(decoder, "decoder")
    check_finite(other, "other decoder")
    first_keep, second_keep = ((rows != 0).any(1) for rows in (decoder, other))
    if not bool(first_keep.any()) or not bool(second_keep.any()):
        raise ValueError("one of the decoders has no direction: every row has norm 0")
    first = F.normalize(decoder.detach().double()[first_keep], dim=1)
    second = F.normalize(other.detach().double()[second_keep], dim=1)
    forth, back = _nearest(first, second)
    n_largest = max(len(first), len(second))
    if assign is None:
        assign = n_largest <= LARGEST_ASSIGNMENT
    elif assign and n_largest > LARGEST_ASSIGNMENT:
        _warn_of_time(n_largest)
    matched = _spread_out(_assigned(first, second), first_keep) if assign else None
    return StabilityResult(
        max_cosine=_spread_out(forth, first_keep),
        max_cosine_back=_spread_out(back, second_keep),
        matched_cosine=matched,
        n_zero=int((~first_keep).sum() + (~second_keep).sum()),
    )


class Stability(StreamingMetric):
    """Stability over one or several pairs of dictionaries; see :func:`stability`.

    Args:
        assign: whether to solve the one-to-one assignment of each pair; see :func:`stability`.

    Examples:
        >>> metric = vp.metrics.Stability()
        >>> metric.update(torch.eye(3), torch.eye(3).flip(0))
        >>> metric.compute().max_cosine.tolist()
        [1.0, 1.0, 1.0]
    """

    higher_is_better = True

    n_zero: Tensor

    def __init__(self, *, assign: bool | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.assign = assign
        for name in ("forth", "back", "matched"):
            self.add_rows_state(name, torch.zeros(0, dtype=torch.float64))
        self.add_state("n_zero", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, decoder: Float[Tensor, "k1 d"], other: Float[Tensor, "k2 d_other"]) -> None:
        """Add a pair of decoders, ``[directions, d]`` each."""
        result = stability(decoder, other, assign=self.assign)
        self.add_rows("forth", result.max_cosine)
        self.add_rows("back", result.max_cosine_back)
        if result.matched_cosine is not None:
            self.add_rows("matched", result.matched_cosine)
        self.n_zero += result.n_zero

    def compute(self) -> StabilityResult:
        """Return the cosines of all pairs seen, one after the other.

        Matched cosines are left out where a pair was too wide to assign.
        """
        forth, matched = self.rows("forth"), self.rows("matched")
        are_all = self.assign is not False and len(matched) == len(forth)
        return StabilityResult(
            forth, self.rows("back"), matched if are_all else None, int(self.n_zero)
        )


def _warn_of_time(n: int) -> None:
    minutes = SECONDS_AT_LARGEST * (n / LARGEST_ASSIGNMENT) ** 3 / 60
    gigabytes = 8 * n * n / 1e9
    logger.warning(
        "assigning %d directions one to one takes time that grows with their cube, here about %.0f "
        "minutes, and %.1f GB of memory: assign=False leaves it out",
        *(n, minutes, gigabytes),
    )


def _nearest(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    forth = first.new_empty(len(first))
    back = second.new_full((len(second),), -torch.inf)
    for start in range(0, len(first), ROWS_AT_ONCE):
        cosines = first[start : start + ROWS_AT_ONCE] @ second.T
        forth[start : start + ROWS_AT_ONCE] = cosines.amax(1)
        back = torch.maximum(back, cosines.amax(0))
    return forth, back


def _assigned(first: Tensor, second: Tensor) -> Tensor:
    from scipy.optimize import linear_sum_assignment

    cosines = first @ second.T
    rows, columns = linear_sum_assignment(cosines.cpu().numpy(), maximize=True)
    matched = torch.full_like(first[:, 0], math.nan)
    matched[rows] = cosines[rows, columns]
    return matched


def _spread_out(values: Tensor, keep: Tensor) -> Tensor:
    spread = values.new_full((len(keep),), math.nan)
    spread[keep] = values
    return spread
