"""Shares and means over images with 95% intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

from vision_plugin._intervals import RESAMPLES, Interval, ends, wilson

_Z = 1.959964
"""Quantile of the normal distribution that covers 95%."""


@dataclass(frozen=True)
class Share(Interval):
    """A number with its 95% interval, and the images behind it.

    Examples:
        >>> vp.lens.Share(value=0.5, low=0.4, high=0.6, n=100).to_dict()
        {'value': 0.5, 'low': 0.4, 'high': 0.6, 'n': 100}
    """

    n: int


def around(value: float, resampled: Tensor, n: int) -> Share:
    """Return a number with the interval of its resampled values, widened to hold the number."""
    low, high = ends(resampled)
    return Share(value, min(value, low), max(value, high), n)


def share_of(hits: Shaped[Tensor, " n"]) -> Share:
    """Return the share of True values with Wilson's score interval (1927).

    Raises:
        ValueError: there is no value.
    """
    n = len(hits)
    if n == 0:
        raise ValueError("there are no images to take a share of: give at least one")
    p = float(hits.double().mean())
    low, high = wilson(p, n, _Z)
    return Share(p, min(p, max(0.0, low)), max(p, min(1.0, high)), n)


def mean_of(values: Shaped[Tensor, " n"], *, seed: int = 0) -> Share:
    """Return the mean with the 95% interval of the bootstrap.

    Raises:
        ValueError: there is no value.
    """
    n = len(values)
    if n == 0:
        raise ValueError("there are no images to take a mean of: give at least one")
    values = values.double().cpu()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (RESAMPLES, n), generator=generator)
    return around(float(values.mean()), values[drawn].mean(1), n)


def auroc_of(scores: Shaped[Tensor, " n"], truth: Shaped[Tensor, " n"], *, seed: int = 0) -> Share:
    """Return the area under the ROC curve with the 95% interval of the bootstrap.

    The area is the share of pairs of a true and a false case that the score puts in the right
    order; a tie counts one half.

    Raises:
        ValueError: all cases are true, or all are false.
    """
    truth = truth.bool().cpu()
    scores = scores.double().cpu()
    if bool(truth.all()) or not bool(truth.any()):
        raise ValueError("an area under the curve needs true and false cases: all are of one kind")
    right, wrong = scores[truth], scores[~truth]
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(200):
        a = torch.randint(len(right), (len(right),), generator=generator)
        b = torch.randint(len(wrong), (len(wrong),), generator=generator)
        found.append(_area(right[a], wrong[b]))
    sample = torch.tensor(found, dtype=torch.float64)
    return around(_area(right, wrong), sample, len(truth))


def _area(right: Tensor, wrong: Tensor) -> float:
    """Return the area from ranks, ties at their mean rank."""
    ordered = wrong.sort().values
    below = torch.searchsorted(ordered, right, right=False)
    above = torch.searchsorted(ordered, right, right=True)
    return float((below + above).double().mean() / (2 * len(wrong)))


def shares_to_dict(shares: Sequence[tuple[str, Share]]) -> dict[str, dict[str, float | int]]:
    """Return named numbers ready for JSON."""
    return {name: share.to_dict() for name, share in shares}
