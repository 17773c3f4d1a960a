"""Shares and means over images with 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Shaped
from torch import Tensor

_Z = 1.959964
"""Quantile of the normal distribution that covers 95%."""
_RESAMPLES = 1000


@dataclass(frozen=True)
class Share:
    """A number with its 95% interval, and the images behind it.

    Examples:
        >>> vp.lens.Share(value=0.5, low=0.4, high=0.6, n=100).to_dict()
        {'value': 0.5, 'low': 0.4, 'high': 0.6, 'n': 100}
    """

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        """Return the number ready for JSON."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def share_of(hits: Shaped[Tensor, " n"]) -> Share:
    """Return the share of True values with Wilson's score interval (1927).

    Raises:
        ValueError: there is no value.
    """
    n = len(hits)
    if n == 0:
        raise ValueError("there are no images to take a share of: give at least one")
    p = float(hits.double().mean())
    middle, spread = p + _Z**2 / (2 * n), _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
    scale = 1 + _Z**2 / n
    low, high = (middle - spread) / scale, (middle + spread) / scale
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
    drawn = torch.randint(n, (_RESAMPLES, n), generator=generator)
    low, high = torch.quantile(values[drawn].mean(1), torch.tensor([0.025, 0.975]).double())
    value = float(values.mean())
    return Share(value, min(value, float(low)), max(value, float(high)), n)


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
    found = [_area(right, wrong)]
    for _ in range(200):
        a = torch.randint(len(right), (len(right),), generator=generator)
        b = torch.randint(len(wrong), (len(wrong),), generator=generator)
        found.append(_area(right[a], wrong[b]))
    sample = torch.tensor(found[1:], dtype=torch.float64)
    low, high = torch.quantile(sample, torch.tensor([0.025, 0.975]).double()).tolist()
    return Share(found[0], min(found[0], low), max(found[0], high), len(truth))


def _area(right: Tensor, wrong: Tensor) -> float:
    """Return the area from ranks, ties at their mean rank."""
    ordered = wrong.sort().values
    below = torch.searchsorted(ordered, right, right=False)
    above = torch.searchsorted(ordered, right, right=True)
    return float((below + above).double().mean() / (2 * len(wrong)))


def cell(share: Share | None) -> str:
    """Return a number as a cell of a table: the value and half its interval."""
    if share is None:
        return ""
    return f"{share.value:.3f} ±{(share.high - share.low) / 2:.3f}"


def shares_to_dict(shares: Sequence[tuple[str, Share]]) -> dict[str, dict[str, float | int]]:
    """Return named numbers ready for JSON."""
    return {name: share.to_dict() for name, share in shares}
