"""What the steering of a vision-language model searches through: goals, methods, numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from vision_plugin.tasks._settings import check_sizes

Goal = Literal["insertion", "suppression"]
Patches = Literal["chosen", "all"]
GOAL_METHODS: Mapping[Goal, tuple[str, ...]] = {
    "insertion": (
        *("clamp", "add", "replace", "transfer", "swap"),
        *("diff_mean", "diff_mean_replace", "neurons"),
    ),
    "suppression": ("zero", "mean", "negative", "subtract", "diff_mean", "neurons"),
}
EDITS = ("clamp", "add", "replace", "zero", "mean", "negative", "subtract")
"""Methods that a :class:`vision_plugin.Edit` can make."""
PAIRED = ("replace", "diff_mean_replace")
"""Methods that take away the value that is there, as the model's own answer says."""
TRADES = ("transfer", "swap")
"""Methods that move what the latents of one value have to those of another."""
DIRECTIONS = ("diff_mean", "diff_mean_replace")
"""Methods that add one direction per value."""
_ONE_STRENGTH = ("zero", "mean")
DONE: Mapping[Goal, str] = {"insertion": "inserted", "suppression": "suppressed"}
"""Name of each goal's figure."""


@dataclass(frozen=True, kw_only=True)
class MultimodalSettings:
    """What a steering task searches through.

    Examples:
        >>> vp.tasks.MultimodalSettings(sizes=(1, 3)).strengths
        (1.0, 1.25, 1.5, 2.0, 3.0)
    """

    sizes: tuple[int, ...] = (1, 3, 10, 30)
    """Numbers of latents or neurons per value."""
    latents: tuple[int, ...] = ()
    """Latents of the SAE to change for every value in place of those that are found."""
    strengths: tuple[float, ...] = (1.0, 1.25, 1.5, 2.0, 3.0)
    """Multiples of the natural strength, or of a difference of means."""
    preserved: float = 0.9
    """Share of other answers to preserve for the second choice: on validation, by more than a
    standard error."""
    targets: int = 2
    """Values that are put into each test image."""
    screened: int = 40
    """Validation images that see every candidate; the best candidates see all of them."""
    finalists: int = 1
    """Candidates of each method that see all validation images, by either choice."""
    pulled: int = 100
    """Training images whose gradients say which latents move an answer."""
    max_new_tokens: int = 1
    """Length of an answer."""
    batch_size: int = 150
    """Images that run at once."""
    seed: int = 0
    """Seed of targets, random latents and the bootstrap."""

    def __post_init__(self) -> None:
        check_sizes(self.sizes)
        if not self.strengths or not all(0 < strength < math.inf for strength in self.strengths):
            raise ValueError(f"strengths={self.strengths} must be numbers above 0")
        if not 0 < self.preserved < 1:
            raise ValueError(f"preserved={self.preserved} is a share: between 0 and 1")
        for name in ("targets", "screened", "finalists", "pulled", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")


@dataclass(frozen=True)
class Recipe:
    """A method with its number of latents per value, its strength and its patches.

    ``clamp`` and ``negative`` set latents to multiples of their natural strengths, ``zero`` and
    ``mean`` to 0 and to the mean. ``add`` and ``subtract`` add multiples of the value's difference
    from the mean, ``replace`` of its difference from the value that is there.
    """

    method: str
    size: int
    strength: float
    patches: Patches = "chosen"

    def __str__(self) -> str:
        everywhere = ", on all patches" if self.patches == "all" else ""
        return f"{self.method}, {self.size} per value, strength {self.strength:g}{everywhere}"


def methods_of(goal: Goal, settings: MultimodalSettings) -> list[str]:
    """Return the methods that are tried: none that trades, where every value has one list."""
    return [m for m in GOAL_METHODS[goal] if not (settings.latents and m in TRADES)]


def recipes(goal: Goal, settings: MultimodalSettings) -> Iterator[Recipe]:
    """Yield what is tried."""
    for method in methods_of(goal, settings):
        sizes = (1,) if method in DIRECTIONS else settings.sizes
        if settings.latents and method in EDITS:
            sizes = (len(settings.latents),)
        strengths = (1.0,) if method in _ONE_STRENGTH else settings.strengths
        for size in sizes:
            for strength in strengths:
                yield Recipe(method, size, strength)
