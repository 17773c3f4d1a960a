"""Figures on images that were drawn anew, beside those of a table."""

from __future__ import annotations

from typing import Any

import torch

FRESH_SEED = 777_000


def compared(test: dict[str, float], values: torch.Tensor, n: int) -> dict[str, Any]:
    """Return a figure on test, the same on fresh images, and whether both agree.

    They agree where they differ by no more than both half intervals together, as independent
    errors add. An interval of a share that is 0 or 1 has no width; it counts as 3 of n images.
    """
    share = values.double().mean().item()
    half = max((test["high"] - test["low"]) / 2, 3 / n)
    fresh_half = max(1.96 * (share * (1 - share) / n) ** 0.5, 3 / n)
    allowed = (half**2 + fresh_half**2) ** 0.5
    return {
        "test": test,
        "fresh": share,
        "allowed": allowed,
        "agrees": abs(share - test["value"]) <= allowed,
    }
