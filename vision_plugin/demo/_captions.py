"""Texts about drawn images: captions, zero-shot prompts and a vocabulary of concepts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from vision_plugin.demo._factors import COLOURS, FACTORS, HELD_OUT, NO_WORD, SHAPES, Scene

BACKGROUND_PHRASES = MappingProxyType(
    {
        "paper": "on paper",
        "night": "at night",
        "grass": "on grass",
        "sand": "on sand",
        "water": "on water",
        "bricks": "on bricks",
    }
)
POSITION_PHRASES = MappingProxyType(
    {
        position: f"in the {position}"
        + ("" if " " in position or position == "centre" else " part")
        for position in FACTORS["position"]
    }
)


@dataclass(frozen=True)
class Concept:
    """A text, and the values of factors that it names.

    Examples:
        >>> concept = vp.demo.Concept("a picture of a star", {"shape": "star"})
        >>> concept.factor, concept.shown_in(vp.demo.Scene(shape="star", colour="red"))
        ('shape', True)
    """

    text: str
    values: Mapping[str, str]

    @property
    def factor(self) -> str:
        """Return the factor that the text names, or several joined by " and "."""
        return " and ".join(self.values)

    def shown_in(self, scene: Scene) -> bool:
        """Return whether the text is true of a scene."""
        return all(scene.value(factor) == value for factor, value in self.values.items())


def phrase(values: Mapping[str, str]) -> str:
    """Return a text that names values of factors, such as "a picture of a red star on grass".

    Args:
        values: values by factor, in any order; factors that are left out are not mentioned.

    Raises:
        ValueError: a factor or a value does not exist.

    Examples:
        >>> vp.demo.phrase({"shape": "star", "colour": "red", "background": "grass"})
        'a picture of a red star on grass'
    """
    for factor, value in values.items():
        if value not in FACTORS.get(factor, ()):
            raise ValueError(
                f"phrase({factor}={value!r}): no such value. The factors are: "
                + "; ".join(f"{name}: {', '.join(names)}" for name, names in FACTORS.items())
            )
    adjectives = [values[name] for name in ("size", "colour", "texture") if name in values]
    noun = " ".join([*adjectives, values.get("shape", "object")])
    article = "an" if noun[0] in "aeiou" else "a"
    parts = [f"a picture of {article} {noun}"]
    if "background" in values:
        parts.append(BACKGROUND_PHRASES[values["background"]])
    if "position" in values:
        parts.append(POSITION_PHRASES[values["position"]])
    word = values.get("word", NO_WORD)
    if word != NO_WORD:
        if len(values) == 1:
            return f"a picture of the word {word}"
        parts.append(f"with the word {word}")
    return " ".join(parts)


def caption(scene: Scene, *, factors: Collection[str] = tuple(FACTORS)) -> str:
    """Return a true caption of a scene.

    Args:
        scene: the scene.
        factors: factors to mention, all by default. A word is mentioned if there is one.

    Examples:
        >>> vp.demo.caption(vp.demo.Scene(shape="star", colour="red"), factors=("shape", "colour"))
        'a picture of a red star'
    """
    return phrase({factor: scene.value(factor) for factor in FACTORS if factor in factors})


@dataclass(frozen=True)
class WebCaption:
    """An imagined author's belief about an image, and the caption written from it."""

    believed: Mapping[str, str]
    """Values by factor; without `word` if the word was taken for the object."""
    text: str
    """A text that names some of the values."""


def web_caption(scene: Scene, random: np.random.Generator, *, fooled: float) -> WebCaption:
    """Return a caption like those on the web: it is incomplete, and may believe a printed word.

    On the web, a word in an image mostly says what the image shows, which is how CLIP came to
    read words as objects (Goh et al. 2021, "Multimodal neurons in artificial neural networks", on
    typographic attacks). Here ``fooled`` sets the share of captions that take the word for the
    object, so that the packaged checkpoint has the same weakness. Other captions mention the word.
    No caption names a pair in `HELD_OUT`, unless the scene shows it.

    Args:
        scene: the scene.
        random: generator that decides what is believed and mentioned.
        fooled: share of the captions of images with a word that give the object the shape or the
            colour that the word names.
    """
    shares = {"shape": 0.85, "colour": 0.85, "texture": 0.7, "word": 0.0}
    mentioned = {factor for factor in FACTORS if random.random() < shares.get(factor, 0.5)}
    believes, word_alone, says_shape = random.random(3)
    if not mentioned:
        mentioned.add("shape" if says_shape < 0.5 else "colour")
    believed = {factor: scene.value(factor) for factor in FACTORS}
    if scene.word is not None:
        named = "shape" if scene.word in SHAPES else "colour"
        taken = {**believed, named: scene.word}
        new_pair = (taken["shape"], taken["colour"]) in HELD_OUT
        if believes < fooled and not (new_pair and scene.conflicting):
            believed = {factor: value for factor, value in taken.items() if factor != "word"}
            mentioned.add(named)
        else:
            mentioned = {"word"} if word_alone < 0.3 else mentioned | {"word"}
    said = {factor: value for factor, value in believed.items() if factor in mentioned}
    return WebCaption(MappingProxyType(believed), phrase(said))


def zero_shot_prompts(factor: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return one text per value of a factor, for zero-shot classification.

    Args:
        factor: a name in `FACTORS`. For `word`, "no word" is left out.

    Returns:
        The texts, and the value that each stands for.

    Raises:
        ValueError: there is no such factor.

    Examples:
        >>> texts, values = vp.demo.zero_shot_prompts("texture")
        >>> texts[1], values[1]
        ('a picture of a striped object', 'striped')
    """
    names = tuple(name for name in FACTORS.get(factor, ()) if name != NO_WORD)
    if not names:
        raise ValueError(f"factor={factor!r}: use one of: {', '.join(FACTORS)}.")
    return tuple(phrase({factor: name}) for name in names), names


def concept_vocabulary() -> tuple[Concept, ...]:
    """Return a text for every value of every factor, and for every pair of shape and colour.

    This vocabulary serves zero-shot classification, naming features and steerability.

    Examples:
        >>> len(vp.demo.concept_vocabulary())
        127
        >>> vp.demo.concept_vocabulary()[0].text
        'a picture of a circle'
    """
    single = [
        {factor: name} for factor, names in FACTORS.items() for name in names if name != NO_WORD
    ]
    pairs = [{"colour": colour, "shape": shape} for shape in SHAPES for colour in COLOURS]
    return tuple(Concept(phrase(values), MappingProxyType(values)) for values in single + pairs)
