"""Images that tests of several folders read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image


def image(seed: int = 0, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """An image of random colours."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def photo_folder(root: Path) -> Path:
    """Six images in the sub-folders ``cat`` and ``dog``."""
    for place, label in enumerate(("dog", "cat")):
        (root / label).mkdir(parents=True)
        for i in range(3):
            image(10 * place + i).save(root / label / f"{i}.png")
    return root
