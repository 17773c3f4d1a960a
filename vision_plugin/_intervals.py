"""Numbers with their intervals: of the bootstrap, and Wilson's of a share."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

RESAMPLES = 1000
COVERED = 0.95


@dataclass(frozen=True)
class Interval:
    """A number and its 95% interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float | int]:
        """Return the number and its interval ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def ends(resampled: Tensor) -> tuple[float, float]:
    """Return the ends of the interval that holds 95% of a number's resampled values."""
    tail = (1 - COVERED) / 2
    low, high = torch.quantile(resampled, torch.tensor([tail, 1 - tail], dtype=torch.float64))
    return float(low), float(high)


def wilson(share: float, n: int, z: float) -> tuple[float, float]:
    """Return the ends of Wilson's score interval (1927), ``z`` standard deviations on each side."""
    middle = share + z**2 / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n * n))
    scale = 1 + z**2 / n
    return (middle - spread) / scale, (middle + spread) / scale


def cell(found: Interval | None) -> str:
    """Return a number as a cell of a table: the value and half its interval."""
    return "" if found is None else f"{found.value:.3f} ±{(found.high - found.low) / 2:.3f}"
