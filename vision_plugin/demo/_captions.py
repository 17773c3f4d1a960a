"""Saying what a picture shows: captions, zero-shot prompts and a vocabulary of concepts."""

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
    """A text, and the values of the factors that it names."""

    text: str
    values: Mapping[str, str]

    @property
    def factor(self) -> str:
        """The factor that the text names; names joined by " and " where it names several."""
        return " and ".join(self.values)

    def shown_in(self, scene: Scene) -> bool:
        """Whether the text is true of a scene."""
        return all(scene.value(factor) == value for factor, value in self.values.items())


def phrase(values: Mapping[str, str]) -> str:
    """The text that names the given values of factors, such as "a picture of a red star on grass".

    Args:
        values: values by factor, in any order; factors that are left out are not mentioned.

    Raises:
        ValueError: if a factor or a value does not exist.
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
    """A true caption of a scene.

    Args:
        scene: the scene.
        factors: what to mention; everything by default. A word is mentioned if there is one.
    """
    return phrase({factor: scene.value(factor) for factor in FACTORS if factor in factors})


@dataclass(frozen=True)
class WebCaption:
    """What somebody who captioned a picture took it to show, and what they wrote down."""

    believed: Mapping[str, str]
    """Values by factor; a word that was taken for the object is not in it as a word."""
    text: str
    """A text that names some of them."""


def web_caption(scene: Scene, random: np.random.Generator, *, fooled: float) -> WebCaption:
    """A caption of the kind found on the web: it mentions some things, and may believe a word.

    On the web, a word in a picture mostly says what the picture shows, which is how CLIP came to
    read words as objects (Goh et al. 2021, "Multimodal neurons in artificial neural networks", on
    typographic attacks). Here the share of captions that take the word for the object is chosen, so
    that the packaged checkpoint has the same weakness. A caption that is not fooled mentions the
    word. None names a pair in `HELD_OUT`, unless the scene shows it.

    Args:
        scene: the scene.
        random: decides what is believed and mentioned.
        fooled: the share of captions, where a word is printed, that give the object the shape or
            the colour that the word names.
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
    """One text per value of a factor, for zero-shot classification.

    Args:
        factor: a name in `FACTORS`. For `word`, "no word" is left out.

    Returns:
        The texts, and the value that each stands for.
    """
    names = tuple(name for name in FACTORS.get(factor, ()) if name != NO_WORD)
    if not names:
        raise ValueError(f"factor={factor!r}: use one of: {', '.join(FACTORS)}.")
    return tuple(phrase({factor: name}) for name in names), names


def concept_vocabulary() -> tuple[Concept, ...]:
    """Every value of every factor as a text, and every pair of shape and colour.

    This is the vocabulary for zero-shot classification, for naming features and for steerability.
    """
    single = [
        {factor: name} for factor, names in FACTORS.items() for name in names if name != NO_WORD
    ]
    pairs = [{"colour": colour, "shape": shape} for shape in SHAPES for colour in COLOURS]
    return tuple(Concept(phrase(values), MappingProxyType(values)) for values in single + pairs)
