"""Drawing of many images as arrays, on every core. The worker processes need no torch."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vision_plugin.demo._factors import Scene
from vision_plugin.demo._render import render

PIECE = 500


def draw_pixels(
    scenes: Sequence[Scene], image_size: int, *, workers: int | None = None
) -> UInt8[np.ndarray, "n size size 3"]:
    """Draw scenes on every core, and shrink the images as the checkpoint's preprocessor does.

    Args:
        scenes: n scenes.
        image_size: the side of the shrunken images in pixels.
        workers: number of processes; None takes one per core.
    """
    pieces = [scenes[start : start + PIECE] for start in range(0, len(scenes), PIECE)]
    if len(pieces) == 1:
        return _draw_piece(scenes, image_size)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        drawn = list(pool.map(partial(_draw_piece, image_size=image_size), pieces))
    return np.concatenate(drawn)


def _draw_piece(scenes: Sequence[Scene], image_size: int) -> UInt8[np.ndarray, "n size size 3"]:
    size = (image_size, image_size)
    return np.stack(
        [np.asarray(render(scene).resize(size, Image.Resampling.BICUBIC)) for scene in scenes]
    )
