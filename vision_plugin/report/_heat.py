"""Patch heat maps as tiny grey PNGs inside the page; the style sheet lays them over images.

The page's script reads the value under the pointer from the same pixels.
"""

from __future__ import annotations

import base64
import io

import numpy as np
from jaxtyping import Float
from PIL import Image

LEVELS = 128


def heat_uri(values: Float[np.ndarray, " patches"], grid: tuple[int, int], scale: float) -> str:
    """Return a data URI with one grey pixel per patch: black at 0, white at ``scale``.

    Values are rounded to 128 levels.

    Args:
        values: Activations of the patches, row by row.
        grid: Rows and columns of patches.
        scale: Activation that is shown white.
    """
    share = np.clip(values.astype(np.float32) / max(scale, 1e-30), 0, 1)
    levels = np.round(share * (LEVELS - 1)) * (255 / (LEVELS - 1))
    image = Image.fromarray(np.round(levels).astype(np.uint8).reshape(grid))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
