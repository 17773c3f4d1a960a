"""What a worker does for an evaluation: it scores a range of the images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vision_plugin.scale._versions import Home


@dataclass(frozen=True)
class RangeWork:
    """One range of the images of an evaluation."""

    index: int
    cfg: Any
    places: range
    at_once: int
    home: Home

    def __hash__(self) -> int:
        return hash(self.index)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RangeWork) and other.index == self.index

    def __str__(self) -> str:
        return f"images {self.places.start} to {self.places.stop - 1}"


def score_range(work: RangeWork) -> Any:
    """Return what the metrics have of the range, in states that merge."""
    work.home.settle()
    from vision_plugin.evaluation import score_part

    return score_part(work.cfg, work.places, work.at_once)
