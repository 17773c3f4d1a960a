"""The factors of the demo world: what varies between images, and how values are drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

import numpy as np
from jaxtyping import Float32

Combinations: TypeAlias = Literal["all", "training", "held out"]
"""Pairs of shape and colour that may appear: every pair, those that the packaged checkpoint was
trained on, or those that it never saw."""

TRAINING_SEED = 0
"""The seed of the images that the packaged checkpoint was trained on.

Examples:
    >>> vp.demo.TRAINING_SEED
    0
"""

NO_WORD = "no word"
"""The value of the factor `word` of an image without a printed word, in `factor_codes`.

Examples:
    >>> vp.demo.FACTORS["word"][0] == vp.demo.NO_WORD
    True
"""

SHAPE_GROUPS = MappingProxyType(
    {
        "round": ("circle", "ring", "moon"),
        "polygon": ("square", "triangle", "diamond"),
        "symbol": ("star", "heart", "cross"),
    }
)
"""The nine shapes by group, the first level of `taxonomy`.

Examples:
    >>> vp.demo.SHAPE_GROUPS["round"]
    ('circle', 'ring', 'moon')
"""

SHAPES = tuple(shape for shapes in SHAPE_GROUPS.values() for shape in shapes)
"""The values of the factor `shape`, in the order of the one-hot codes.

Examples:
    >>> len(vp.demo.SHAPES)
    9
"""

COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
"""The values of the factor `colour`, in the order of the one-hot codes.

Examples:
    >>> vp.demo.COLOURS[:3]
    ('red', 'orange', 'yellow')
"""

WORDS = SHAPES + COLOURS
"""The words that a label may show: every shape and every colour.

Examples:
    >>> len(vp.demo.WORDS)
    17
"""

FACTORS = MappingProxyType(
    {
        "shape": SHAPES,
        "colour": COLOURS,
        "texture": ("plain", "striped", "dotted", "checked"),
        "background": ("paper", "night", "grass", "sand", "water", "bricks"),
        "position": (
            *("top left", "top", "top right"),
            *("left", "centre", "right"),
            *("bottom left", "bottom", "bottom right"),
        ),
        "size": ("small", "large"),
        "word": (NO_WORD, *WORDS),
    }
)
"""Every factor with its values, in the order of the one-hot codes.

Examples:
    >>> vp.demo.FACTORS["texture"]
    ('plain', 'striped', 'dotted', 'checked')
"""

HELD_OUT = frozenset(
    (shape, COLOURS[(3 * index + 1) % len(COLOURS)]) for index, shape in enumerate(SHAPES)
)
"""One colour per shape that the packaged checkpoint was never trained on.

Examples:
    >>> sorted(vp.demo.HELD_OUT)[:2]
    [('circle', 'orange'), ('cross', 'orange')]
"""

_PAIRS = tuple((shape, colour) for shape in SHAPES for colour in COLOURS)
_PAIRS_OF = MappingProxyType(
    {
        "all": _PAIRS,
        "training": tuple(pair for pair in _PAIRS if pair not in HELD_OUT),
        "held out": tuple(pair for pair in _PAIRS if pair in HELD_OUT),
    }
)


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The factors of one image. The same scene is always the same image.

    Attributes:
        shape: One of `SHAPES`.
        colour: One of `COLOURS`.
        texture: How the object is filled.
        background: What is behind it.
        position: One of nine places.
        size: ``"small"`` or ``"large"``.

    Raises:
        ValueError: a value is not one of its factor's values in `FACTORS`.

    Examples:
        >>> scene = vp.demo.Scene(shape="star", colour="red", word="blue")
        >>> scene.value("position"), scene.conflicting
        ('centre', True)
    """

    shape: str
    colour: str
    texture: str = "plain"
    background: str = "paper"
    position: str = "centre"
    size: str = "large"
    word: str | None = None
    """The word printed on a label in the image, one of `WORDS`, or None."""
    variation: int = 0
    """Seed of what the factors leave open: exact place and angle, grain, place of the label. Two
    scenes that differ in one factor and share the variation differ in nothing else."""

    def __post_init__(self) -> None:
        for factor in FACTORS:
            value = self.value(factor)
            if value not in FACTORS[factor] or getattr(self, factor) == NO_WORD:
                allowed = WORDS if factor == "word" else FACTORS[factor]
                raise ValueError(
                    f"Scene({factor}={getattr(self, factor)!r}): not a {factor} of the demo world. "
                    f"Use one of: {', '.join(allowed)}"
                    + (", or None." if factor == "word" else ".")
                )
        if self.variation < 0:
            raise ValueError(f"Scene(variation={self.variation}): use a whole number from 0 up.")

    def value(self, factor: str) -> str:
        """Return this scene's value of a factor, as `FACTORS` names it.

        Raises:
            ValueError: there is no such factor.
        """
        _check_factor(factor)
        value = getattr(self, factor)
        return NO_WORD if value is None else str(value)

    @property
    def conflicting(self) -> bool:
        """Return whether a word is printed that names neither the object's shape nor its colour."""
        return self.word is not None and self.word not in (self.shape, self.colour)


@dataclass(frozen=True, kw_only=True)
class SceneRule:
    """Limits on the scenes that `draw` draws."""

    words: float = 0.0
    """Share of images with a printed word, from 0 to 1."""
    naming: Literal["shape", "colour", "either"] = "either"
    """Factor that the printed words name."""
    conflicting: bool = False
    """Whether a printed word must name another value than the object's own."""
    combinations: Combinations = "all"
    """Pairs of shape and colour that may appear."""

    def __post_init__(self) -> None:
        if not 0 <= self.words <= 1:
            raise ValueError(
                f"words={self.words!r}: the share of images with a printed word runs from 0 to 1."
            )
        if self.naming not in ("shape", "colour", "either"):
            raise ValueError(f"naming={self.naming!r}: use 'shape', 'colour' or 'either'.")
        if self.combinations not in get_args(Combinations):
            raise ValueError(
                f"combinations={self.combinations!r}: use 'all', 'training' or 'held out'."
            )


def sample_scene(seed: int, index: int, rule: SceneRule) -> Scene:
    """Return the scene of image `index` in the sequence of a seed.

    Every index has its own random generator, so an image does not depend on the number drawn. Each
    decision is drawn whether it is used or not, so two rules that differ in `words` alone give the
    same images with and without their labels.
    """
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,)))
    pairs = _PAIRS_OF[rule.combinations]
    shape, colour = pairs[random.integers(len(pairs))]
    texture, background, position, size = (
        FACTORS[factor][random.integers(len(FACTORS[factor]))]
        for factor in ("texture", "background", "position", "size")
    )
    variation = int(random.integers(2**32))
    printed = random.random() < rule.words
    names_shape = rule.naming == "shape" or (rule.naming == "either" and random.random() < 0.5)
    candidates = [
        word
        for word in (SHAPES if names_shape else COLOURS)
        if not (rule.conflicting and word in (shape, colour))
    ]
    word = candidates[random.integers(len(candidates))]
    return Scene(
        shape=shape,
        colour=colour,
        texture=texture,
        background=background,
        position=position,
        size=size,
        word=word if printed else None,
        variation=variation,
    )


def factor_codes(
    scenes: Sequence[Scene], factor: str
) -> tuple[Float32[np.ndarray, "n v"], tuple[str, ...]]:
    """Return one-hot codes of a factor: a perfect embedding of it, and perfect latents for it.

    Args:
        scenes: n scenes.
        factor: a name in `FACTORS`. For `word`, the first value stands for "no word".

    Returns:
        The codes [n, v], each row with a single 1, and the v names of the columns.

    Raises:
        ValueError: there is no such factor.

    Examples:
        >>> codes, names = vp.demo.factor_codes(world.scenes, "texture")
        >>> codes.shape, names
        ((8, 4), ('plain', 'striped', 'dotted', 'checked'))
    """
    _check_factor(factor)
    names = FACTORS[factor]
    column = {name: index for index, name in enumerate(names)}
    codes = np.zeros((len(scenes), len(names)), dtype=np.float32)
    codes[np.arange(len(scenes)), [column[scene.value(factor)] for scene in scenes]] = 1
    return codes, names


def taxonomy(scenes: Iterable[Scene]) -> list[tuple[str, str, str, str]]:
    """Return the path of each image in a tree four levels deep, from the root down.

    Args:
        scenes: The scenes of the images.

    Returns:
        One path per scene: (group of shapes, shape, colour, texture), such as
        ("round", "circle", "red", "striped").

    Examples:
        >>> vp.demo.taxonomy([vp.demo.Scene(shape="star", colour="red")])
        [('symbol', 'star', 'red', 'plain')]
    """
    group_of = {shape: group for group, shapes in SHAPE_GROUPS.items() for shape in shapes}
    return [(group_of[s.shape], s.shape, s.colour, s.texture) for s in scenes]


def _check_factor(factor: str) -> None:
    if factor not in FACTORS:
        raise ValueError(
            f"factor={factor!r}: the demo world has no such factor. Use one of: "
            f"{', '.join(FACTORS)}."
        )
