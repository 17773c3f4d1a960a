"""Six backgrounds for the object, and the label with a printed word."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import cache
from types import MappingProxyType

import numpy as np
from jaxtyping import Float32
from PIL import Image, ImageDraw, ImageFont

from vision_plugin.demo._drawing import contours, place
from vision_plugin.demo._factors import Scene

LETTER_SIZE = 0.158
MARGIN = 0.016
# A label has this many possible places along a side.
PLACES = 16


def backdrop(scene: Scene, image_size: int) -> Float32[np.ndarray, "size size 3"]:
    """Return a scene's background, channels from 0 to 255.

    Args:
        scene: the scene.
        image_size: the side of the image in pixels.
    """
    random = np.random.default_rng([scene.variation, 1])
    axis = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size
    return _BACKDROPS[scene.background](random, axis[None, :], axis[:, None])


def hang_label(image: Image.Image, scene: Scene) -> None:
    """Print the scene's word on a white label, above or below the object and never over it.

    The letters are Pillow's own built-in font.
    """
    if scene.word is None:
        return
    size = image.width
    font = _font(round(LETTER_SIZE * size))
    ascent, descent = font.getmetrics()
    pad = round(0.03 * size)
    width = round(font.getlength(scene.word)) + 2 * pad
    height = ascent + descent + max(0, pad - descent)
    random = np.random.default_rng([scene.variation, 2])
    margin = round(MARGIN * size)
    step = max(1, size // PLACES)
    columns = range(margin, size - margin - width + 1, step)
    left = int(columns[random.integers(len(columns))])
    top = _free_row(scene, size, height, margin, random)
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle(
        (left, top, left + width - 1, top + height - 1),
        radius=0.03 * size,
        fill=(255, 255, 255),
        outline=(60, 60, 68),
        width=max(1, round(size / 128)),
    )
    baseline = (
        top + (height + font.getbbox("x", anchor="ls")[3] - font.getbbox("d", anchor="ls")[1]) / 2
    )
    draw.text((left + pad, round(baseline)), scene.word, fill=(20, 20, 26), font=font, anchor="ls")


def _free_row(
    scene: Scene, size: int, height: int, margin: int, random: np.random.Generator
) -> int:
    """Return a top row for a label of the given height, all of it above or below the object.

    Possible rows lie in even steps from the upper edge and from the lower edge.
    """
    rows = np.concatenate(contours(scene.shape, place(scene)))[:, 1] * size
    first, last = margin, size - margin - height
    step = max(1, size // PLACES)
    above, below = int(np.floor(rows.min())) - height, int(np.ceil(rows.max()))
    steps = sorted({*range(first, last + 1, step), *range(last, first - 1, -step)})
    free = [row for row in steps if row <= above or row >= below]
    assert free, f"no room for a label of {height} pixels beside {scene}"
    return int(free[random.integers(len(free))])


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError(
            "Pillow was built without FreeType, so its built-in letters have one size only and no "
            "word can be printed. Install a Pillow wheel from the package index, or draw images "
            "without words (words=0)."
        )
    return font


def _mix(
    low: tuple[int, int, int], high: tuple[int, int, int], share: Float32[np.ndarray, "h w"]
) -> Float32[np.ndarray, "h w 3"]:
    """Return a blend of two colours (share 0 to 1); other shares extrapolate."""
    mixed = np.empty((*share.shape, 3), dtype=np.float32)
    for channel, (start, stop) in enumerate(zip(low, high, strict=True)):
        mixed[..., channel] = start + share * (stop - start)
    return mixed


def _grain(random: np.random.Generator, x: np.ndarray, y: np.ndarray) -> Float32[np.ndarray, "h w"]:
    """Return noise from -1 to 1, one value per pixel."""
    return 2 * random.random((y.shape[0], x.shape[1]), dtype=np.float32) - 1


def _paper(random: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _mix((240, 236, 226), (250, 248, 242), 0.5 + 0.35 * _grain(random, x, y))


def _night(random: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    sky = _mix((16, 20, 46), (52, 52, 98), np.broadcast_to(y, (y.shape[0], x.shape[1])))
    for _ in range(16):
        star_x, star_y, brightness = random.uniform((0.02, 0.02, 0.5), (0.98, 0.98, 1.0)).tolist()
        column, row = (slice(int(v * y.shape[0]), None) for v in (star_x, star_y))
        reach = 3 * max(1, y.shape[0] // 64)
        near_x, near_y = x[:, column][:, :reach], y[row][:reach]
        glow = np.exp(-((near_x - star_x) ** 2 + (near_y - star_y) ** 2) / 0.008**2)
        patch = sky[row, column][:reach, :reach]
        patch += brightness * glow[..., None] * (np.array([255.0, 250.0, 225.0]) - patch)
    return sky


def _grass(random: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Noise averaged along the vertical looks like blades.
    noise = _grain(random, x, y)
    run = max(2, y.shape[0] // 12)
    total = np.cumsum(np.concatenate([noise, noise[:run]]), axis=0)
    blades = (total[run:] - total[:-run]) / math.sqrt(run)
    return _mix((118, 158, 84), (164, 196, 118), 0.5 + 0.5 * blades)


def _sand(random: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    phase, bend = random.uniform(0, 2 * np.pi, 2).tolist()
    ripples = np.sin(2 * np.pi * 6 * y + phase + 1.4 * np.sin(2 * np.pi * 1.3 * x + bend))
    return _mix(
        (222, 194, 144), (242, 220, 176), 0.5 + 0.32 * ripples + 0.22 * _grain(random, x, y)
    )


def _water(random: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    phase, bend = random.uniform(0, 2 * np.pi, 2).tolist()
    waves = np.sin(2 * np.pi * 7 * y + phase + 1.1 * np.sin(2 * np.pi * 3.5 * x + bend))
    return _mix((112, 166, 196), (190, 222, 234), 0.25 + 0.75 * waves.clip(0) ** 3)


def _bricks(random: np.random.Generator, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    rows, columns, joint = 8, 4, 0.012
    slide = float(random.uniform())
    row = np.floor(rows * y + slide).astype(int)
    along = columns * x + 0.5 * (row % 2)
    tone = random.random((rows + 1, columns + 2), dtype=np.float32)[
        row, np.floor(along).astype(int)
    ]
    wall = _mix((150, 96, 80), (182, 126, 106), tone)
    mortar = (along % 1 < joint * columns) | ((rows * y + slide) % 1 < joint * rows)
    wall[mortar] = (206, 196, 186)
    return wall


_BACKDROPS: Mapping[
    str, Callable[[np.random.Generator, np.ndarray, np.ndarray], Float32[np.ndarray, "h w 3"]]
] = MappingProxyType(
    {
        "paper": _paper,
        "night": _night,
        "grass": _grass,
        "sand": _sand,
        "water": _water,
        "bricks": _bricks,
    }
)
