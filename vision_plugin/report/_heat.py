"""Patch heat maps as tiny grey PNGs inside the page; the style sheet lays them over images."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
from jaxtyping import Float
from PIL import Image

LEVELS = 32


def heat_uri(values: Float[np.ndarray, " patches"], grid: tuple[int, int], scale: float) -> str:
    """Return a data URI with one grey pixel per patch: black at 0, white at ``scale``.

    Args:
        values: Activations of the patches, row by row.
        grid: Rows and columns of patches.
        scale: Activation that is shown white.
    """
    share = np.clip(values.astype(np.float32) / max(scale, 1e-30), 0, 1)
    levels = np.round(share * (LEVELS - 1)).astype(np.uint8).reshape(grid)
    return _uri(levels.tobytes(), grid)


def _uri(levels: bytes, grid: tuple[int, int]) -> str:
    image: Any = Image.frombytes("P", (grid[1], grid[0]), levels)
    image.putpalette([round(level * 255 / (LEVELS - 1)) for level in _TRIPLES])
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


_TRIPLES = [level for level in range(LEVELS) for _ in range(3)]
