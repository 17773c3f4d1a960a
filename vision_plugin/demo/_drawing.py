"""Drawing of one object: its outline as polygons, its texture, its exact coverage of pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8
from PIL import Image, ImageChops, ImageDraw

from vision_plugin.demo._factors import Scene

Contour: TypeAlias = Float[np.ndarray, "points 2"]

# Antialiasing: each pixel is split into SAMPLES x SAMPLES, so coverage comes in steps of 1/16, and
# any covered pixel has at least one sixteenth.
SAMPLES = 4
OUTLINE = 0.014
MANY_POINTS = 40
TEXTURE_PERIOD = 0.094
RADIUS = MappingProxyType({"small": 0.15, "large": 0.225})
GRID = (0.265, 0.5, 0.735)

# Any two differ by more than 64 in some channel. A covered pixel then changes with the colour even
# where a sixteenth of it is covered by the lightest tone (a quarter of the colour).
PALETTE = MappingProxyType(
    {
        "red": (222, 38, 44),
        "orange": (250, 135, 20),
        "yellow": (255, 214, 24),
        "green": (42, 160, 60),
        "cyan": (32, 196, 208),
        "blue": (36, 84, 214),
        "purple": (134, 54, 180),
        "pink": (248, 118, 182),
    }
)


@dataclass(frozen=True)
class Placement:
    """Place of an object in shares of the image's side, and its rotation in radians."""

    x: float
    y: float
    radius: float
    angle: float
    texture_phase: tuple[float, float]


@dataclass(frozen=True)
class Coverage:
    """Share of each pixel that an object covers, inside a crop of the image.

    `inside` is the whole object; `second` and `outline` are the parts of it that are drawn in the
    texture's second tone and in the outline's tone. Each is a share from 0 to 1.
    """

    left: int
    top: int
    inside: Float32[np.ndarray, "h w"]
    second: Float32[np.ndarray, "h w"]
    outline: Float32[np.ndarray, "h w"]


def place(scene: Scene) -> Placement:
    """Return the place of a scene's object: its cell of the grid and its size, slightly varied."""
    random = np.random.default_rng([scene.variation, 0])
    words = scene.position.split()
    row = 0 if "top" in words else 2 if "bottom" in words else 1
    column = 0 if "left" in words else 2 if "right" in words else 1
    jitter_x, jitter_y, scale, angle, phase_x, phase_y = random.uniform(-1, 1, 6)
    return Placement(
        x=GRID[column] + 0.016 * float(jitter_x),
        y=GRID[row] + 0.016 * float(jitter_y),
        radius=RADIUS[scene.size] * (1 + 0.06 * float(scale)),
        angle=0.15 * float(angle),
        texture_phase=(float(phase_x), float(phase_y)),
    )


def contours(shape: str, placement: Placement) -> list[Contour]:
    """Return the outlines of a placed shape, in shares of the image's side; a second is a hole."""
    cos, sin = math.cos(placement.angle), math.sin(placement.angle)
    turn = np.array([[cos, sin], [-sin, cos]])
    centre = np.array([placement.x, placement.y])
    return [points @ turn * placement.radius + centre for points in _SHAPES[shape]()]


def cover(scene: Scene, image_size: int) -> Coverage:
    """Return the share of each pixel of a square image that the scene's object covers.

    Args:
        scene: the scene.
        image_size: the side of the image in pixels.
    """
    placement = place(scene)
    outlines = contours(scene.shape, placement)
    corners = np.concatenate(outlines) * image_size
    left, top = (int(v) for v in np.floor(corners.min(0)).clip(0))
    right, bottom = (int(v) for v in np.ceil(corners.max(0)).clip(max=image_size))
    size = ((right - left) * SAMPLES, (bottom - top) * SAMPLES)
    filled, edge = Image.new("L", size), Image.new("L", size)
    fill, stroke = ImageDraw.Draw(filled), ImageDraw.Draw(edge)
    for index, outline in enumerate(outlines):
        points = [tuple(p) for p in (outline * image_size - (left, top)) * SAMPLES - 0.5]
        fill.polygon(points, fill=0 if index else 255)
        width = max(2, round(2 * OUTLINE * image_size * SAMPLES))
        joint = "curve" if len(points) < MANY_POINTS else None  # on a curve there is no gap to fill
        stroke.line([*points, *points[:2]], fill=255, width=width, joint=joint)
    border = ImageChops.darker(edge, filled)
    inner = ImageChops.subtract(filled, border)
    pattern = _pattern(scene.texture, placement, left, top, size, image_size)
    second = ImageChops.darker(inner, Image.fromarray(pattern))
    return Coverage(left, top, *(_share(part) for part in (filled, second, border)))


def paint(
    canvas: Float32[np.ndarray, "size size 3"], coverage: Coverage, colour: str
) -> UInt8[np.ndarray, "size size 3"]:
    """Return an image of an object of one colour over a background.

    Args:
        canvas: the background, channels from 0 to 255; it is changed in place.
        coverage: coverage of the pixels by the object.
        colour: a name in `PALETTE`.
    """
    base = np.array(PALETTE[colour], dtype=np.float32)
    inside, second, border = (
        part[..., None] for part in (coverage.inside, coverage.second, coverage.outline)
    )
    height, width = coverage.inside.shape
    window = canvas[coverage.top : coverage.top + height, coverage.left : coverage.left + width]
    window *= 1 - inside
    window += base * (inside - second - border)
    window += (0.28 * base + 0.72 * 255) * second
    window += 0.42 * base * border
    canvas += 0.5
    return canvas.clip(0, 255, out=canvas).astype(np.uint8)


def _share(mask: Image.Image) -> Float32[np.ndarray, "h w"]:
    """Return the exact share of each pixel that a supersampled mask covers, in steps of 1/16."""
    covered = np.asarray(mask.reduce(SAMPLES), dtype=np.float32) * (SAMPLES**2 / 255)
    return np.asarray(np.rint(covered) / SAMPLES**2)


def _pattern(
    texture: str,
    placement: Placement,
    left: int,
    top: int,
    size: tuple[int, int],
    image_size: int,
) -> UInt8[np.ndarray, "h w"]:
    """Return a crop's samples: 255 where a texture shows its second tone, else 0."""
    step = 1 / (image_size * SAMPLES * TEXTURE_PERIOD)
    width, height = size
    x = (
        np.arange(width, dtype=np.float32) + 0.5 + left * SAMPLES
    ) * step + placement.texture_phase[0]
    y = (
        np.arange(height, dtype=np.float32) + 0.5 + top * SAMPLES
    ) * step + placement.texture_phase[1]
    return _TEXTURES[texture](x[None, :], y[:, None]).astype(np.uint8) * 255


def _plain(x: np.ndarray, y: np.ndarray) -> Bool[np.ndarray, "h w"]:
    return np.zeros(np.broadcast_shapes(x.shape, y.shape), dtype=bool)


def _striped(x: np.ndarray, y: np.ndarray) -> Bool[np.ndarray, "h w"]:
    return np.asarray((0.75 * (x + y)) % 1 < 0.45)


def _dotted(x: np.ndarray, y: np.ndarray) -> Bool[np.ndarray, "h w"]:
    shifted = x + 0.5 * (np.floor(y) % 2)
    return np.asarray((shifted % 1 - 0.5) ** 2 + (y % 1 - 0.5) ** 2 < 0.29**2)


def _checked(x: np.ndarray, y: np.ndarray) -> Bool[np.ndarray, "h w"]:
    return np.asarray((np.floor(1.5 * x) + np.floor(1.5 * y)) % 2 < 1)


_TEXTURES: Mapping[str, Callable[[np.ndarray, np.ndarray], Bool[np.ndarray, "h w"]]] = (
    MappingProxyType({"plain": _plain, "striped": _striped, "dotted": _dotted, "checked": _checked})
)


def _arc(
    radius: float, *, start: float = 0.0, stop: float = 1.0, x: float = 0.0, y: float = 0.0
) -> Contour:
    """Return points on a circle, from one share of a full turn to another, clockwise from right."""
    turns = np.linspace(start, stop, 64, endpoint=stop - start < 1) * 2 * np.pi
    return np.stack([x + radius * np.cos(turns), y + radius * np.sin(turns)], axis=1)


def _regular(*radii: float, corners: int) -> Contour:
    """Return a polygon with a corner straight up, whose corners take the given radii in turn."""
    turns = np.arange(corners) / corners * 2 * np.pi - np.pi / 2
    radius = np.resize(radii, corners)
    return np.stack([radius * np.cos(turns), radius * np.sin(turns)], axis=1)


def _moon() -> Contour:
    # Two arcs between the same two tips: the outer circle, and a smaller one shifted to the right.
    outer = _arc(1.0, start=0.13, stop=0.87)
    tip = outer[0]
    shift = 0.45
    inner_radius = math.hypot(tip[0] - shift, tip[1])
    tip_turn = math.atan2(tip[1], tip[0] - shift) / (2 * math.pi)
    inner = _arc(inner_radius, start=1 - tip_turn, stop=tip_turn, x=shift)
    return np.asarray(np.concatenate([outer, inner]) + np.array([0.18, 0.0]))


def _heart() -> Contour:
    turns = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    x = 16 * np.sin(turns) ** 3
    y = 13 * np.cos(turns) - 5 * np.cos(2 * turns) - 2 * np.cos(3 * turns) - np.cos(4 * turns)
    return np.stack([x / 16, -(y + 2.2) / 15], axis=1)


def _cross() -> Contour:
    arm, reach = 0.33, 0.97
    quarter = np.array([[arm, -reach], [arm, -arm], [reach, -arm]])
    turn = np.array([[0.0, 1.0], [-1.0, 0.0]])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


_SHAPES: Mapping[str, Callable[[], list[Contour]]] = MappingProxyType(
    {
        "circle": lambda: [_arc(0.94)],
        "ring": lambda: [_arc(1.0), _arc(0.46)],
        "moon": lambda: [_moon()],
        "square": lambda: [0.84 * np.array([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]])],
        "triangle": lambda: [_regular(1.12, corners=3) + np.array([0.0, 0.2])],
        "diamond": lambda: [_regular(1.05, 0.74, corners=4)],
        "star": lambda: [_regular(1.12, 0.5, corners=10)],
        "heart": lambda: [_heart()],
        "cross": lambda: [_cross()],
    }
)
