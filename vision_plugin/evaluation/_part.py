"""A part of a pass over images: what the metrics and the keeper have of a range of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from vision_plugin.evaluation._keep import Keeper
from vision_plugin.evaluation._loop import Loop

N_RANGES = 16
"""Ranges that a pass is cut into where an engine runs it, whatever the number of workers."""

Place = tuple[str, int, str]
"""Subject, number of its group, and metric."""


@dataclass
class Part:
    """What a range of images leaves behind."""

    keep: Keeper
    bad: dict[str, str]
    """Reasons by id of the images that could not be read."""
    metrics: dict[Place, Any] = field(default_factory=dict)
    """Metrics that saw the range alone; empty where the loop's own saw it."""
    failures: dict[tuple[str, str | None, str], str] = field(default_factory=dict)
    """Why a metric was left out, by subject, embedder and metric."""


def ranges_of(n_images: int, at_once: int) -> list[range]:
    """Return ranges of whole batches, so that each image is in the batch that it always is in."""
    n_batches = -(-n_images // at_once)
    n = min(N_RANGES, n_batches)
    ends = [min(n_images, at_once * (n_batches * i // n)) for i in range(n + 1)]
    return [range(first, last) for first, last in pairwise(ends)]


def taken(loop: Loop) -> dict[Place, Any]:
    """Return the metrics of a loop by their places."""
    return {
        (subject.key, number, name): metric
        for subject in loop.subjects
        for number, group in enumerate(subject.groups)
        for name, metric in group.metrics.metrics.items()
    }


def merge(loop: Loop, part: Part) -> None:
    """Add a part to a loop whose metrics saw the images before it.

    A metric that failed in any part is left out, as it is where it fails in one process.
    """
    loop.failures.update(part.failures)
    for (key, number, name), _ in taken(loop).items():
        subject = next(one for one in loop.subjects if one.key == key)
        group = subject.groups[number]
        later = part.metrics.get((key, number, name))
        if later is None:
            del group.metrics.metrics[name]
        else:
            group.metrics.metrics[name].merge_state(later)
