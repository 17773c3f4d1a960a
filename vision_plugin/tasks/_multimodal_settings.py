"""What the steering of a vision-language model searches through: goals, methods, numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

Goal = Literal["insertion", "suppression"]
GOAL_METHODS: Mapping[Goal, tuple[str, ...]] = {
    "insertion": ("clamp", "transfer", "swap", "diff_mean", "neurons"),
    "suppression": ("zero", "negative", "diff_mean", "neurons"),
}


@dataclass(frozen=True, kw_only=True)
class MultimodalSettings:
    """What a steering task searches through."""

    sizes: tuple[int, ...] = (1, 3, 10)
    """Numbers of latents or neurons per value."""
    strengths: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Multiples of the natural strength, or of a difference of means."""
    preserved: float = 0.9
    """Share of other answers to preserve for the second choice."""
    targets: int = 2
    """Values that are put into each test image."""
    batch_size: int = 150
    """Images that run at once."""
    seed: int = 0
    """Seed of targets, random latents and the bootstrap."""

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"sizes={self.sizes} must be numbers of latents from 1 up")
        if not self.strengths or not all(0 < strength < math.inf for strength in self.strengths):
            raise ValueError(f"strengths={self.strengths} must be numbers above 0")
        if not 0 < self.preserved < 1:
            raise ValueError(f"preserved={self.preserved} is a share: between 0 and 1")
        if self.targets < 1:
            raise ValueError(f"targets={self.targets} must be 1 or more")


@dataclass(frozen=True)
class Recipe:
    """A method with its number of latents per value and its strength."""

    method: str
    size: int
    strength: float

    def __str__(self) -> str:
        return f"{self.method}, {self.size} per value, strength {self.strength:g}"


def recipes(goal: Goal, settings: MultimodalSettings) -> Iterator[Recipe]:
    """Yield what is tried."""
    for method in GOAL_METHODS[goal]:
        sizes = (1,) if method == "diff_mean" else settings.sizes
        strengths = (1.0,) if method == "zero" else settings.strengths
        for size in sizes:
            for strength in strengths:
                yield Recipe(method, size, strength)
