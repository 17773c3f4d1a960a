"""Steer latents by their names, and see whether the model's answers follow.

The world's factors are known, so a latent's name is a claim that can be put to the test. A latent
named "a picture of a red object" is held at a value while the model looks at objects that are not
red and is asked which colour they have.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vision_plugin.demo import Concept, Scene
from vision_plugin.models.dictionary import Dictionary
from vision_plugin.steering import steering_effect

LEAST_IMAGES = 20
"""Fewest images that a latent fires on to be steered."""
IMAGES = 40
"""Number of images to ask about."""
TIMES = 3.0
"""Value that a latent is held at, as a multiple of its largest on any image."""


@dataclass(frozen=True)
class Naming:
    """Latents named by the concepts that set their images apart from all images."""

    concepts: tuple[Concept, ...]
    names: list[int]
    """The concept of each latent."""
    margin: list[float]
    """Cosine by which the concept is ahead of the next that answers the same question."""

    def question(self, latent: int) -> list[int]:
        """Return the concepts that answer one question: those that name the same factors."""
        factor = self.concepts[self.names[latent]].factor
        return [i for i, concept in enumerate(self.concepts) if concept.factor == factor]


def name_latents(
    latents: Tensor, embeddings: Tensor, texts: Tensor, concepts: Sequence[Concept]
) -> Naming:
    """Name each latent by the concept that sets its images apart from all images best.

    That is the concept most similar to the mean of the embeddings of the latent's images, weighted
    by the latent, minus the mean of all embeddings.

    Args:
        latents: Image-level latents, sparse [n, d_sae].
        embeddings: Embeddings of the images, [n, d].
        texts: Embeddings of the concepts, [concepts, d].
        concepts: The concepts.
    """
    weights = latents.to_dense().double()
    weights = weights / weights.sum(0).clamp(min=1e-12)
    apart = weights.T @ embeddings.double() - embeddings.double().mean(0)
    similarity = torch.nn.functional.normalize(apart, dim=1) @ texts.double().T
    names: list[int] = similarity.argmax(1).tolist()
    margins = []
    for row, name in zip(similarity, names, strict=True):
        factor = concepts[name].factor
        others = [i for i, c in enumerate(concepts) if c.factor == factor and i != name]
        margins.append(float(row[name] - row[others].max()) if others else 0.0)
    return Naming(tuple(concepts), names, margins)


def choose_latents(naming: Naming, n_active: Tensor, n: int) -> list[int]:
    """Return the latents that their names single out best, as many of each question as can be.

    Args:
        naming: Names of the latents.
        n_active: Number of images that each latent fires on.
        n: Number of latents to choose.
    """
    common = [k for k, count in enumerate(n_active.tolist()) if count >= LEAST_IMAGES]
    ranked = sorted(common, key=lambda k: -naming.margin[k])
    best: dict[int, int] = {}
    for latent in ranked:  # one latent for each name
        best.setdefault(naming.names[latent], latent)
    turn: Counter[str] = Counter()
    in_turn = []
    for name, latent in best.items():
        factor = naming.concepts[name].factor
        in_turn.append((turn[factor], -naming.margin[latent], latent))
        turn[factor] += 1
    return [latent for *_, latent in sorted(in_turn)[:n]]


@dataclass(frozen=True)
class Answers:
    """What a model answers while a latent is held at a value, about images that lack its name."""

    name: str
    """Name of the latent."""
    factor: str
    """Factors that the name is about: what is asked for."""
    strength: float
    """Value that the latent is held at."""
    n_images: int
    choices: int
    """Number of answers that there are."""
    usual: str
    """The most frequent answer before."""
    before: float
    """Share of the images about which the name is the answer."""
    after: float
    """The same share while the latent is held."""
    kept: float
    """Share of the answers to other questions that stay as they are while the latent is held."""


def ask(
    model: Any,
    sae: Dictionary,
    latent: int,
    *,
    naming: Naming,
    largest: float,
    images: Any,
    scenes: Sequence[Scene],
    texts: Tensor,
) -> Answers:
    """Hold a latent at a value and ask about images that do not show what it is named after.

    Args:
        model: The model.
        sae: The SAE.
        latent: Number of the latent.
        naming: Names of the latents.
        largest: Largest value of the latent on any image.
        images: The images.
        scenes: What they show.
        texts: Embeddings of the concepts.
    """
    concept = naming.concepts[naming.names[latent]]
    lacking = [i for i, scene in enumerate(scenes) if not concept.shown_in(scene)][:IMAGES]
    pixels = model.preprocess([images[i] for i in lacking])
    strength = TIMES * largest

    def answers(question: list[int]) -> tuple[Tensor, Tensor]:
        found = steering_effect(
            model,
            sae,
            pixels,
            texts[question],
            {latent: strength},
            concepts=[naming.concepts[i].text for i in question],
            tokens="cls",
        )
        return found.before.argmax(1), found.after.argmax(1)

    question = naming.question(latent)
    before, after = answers(question)
    wanted = question.index(naming.names[latent])
    kept = []
    for factor in ("shape", "colour", "background"):
        if factor not in concept.values:
            was, now = answers([i for i, c in enumerate(naming.concepts) if c.factor == factor])
            kept.append(float((was == now).double().mean()))
    usual = Counter(before.tolist()).most_common(1)[0][0]
    return Answers(
        name=concept.text,
        factor=concept.factor,
        strength=strength,
        n_images=len(lacking),
        choices=len(question),
        usual=naming.concepts[question[usual]].text,
        before=float((before == wanted).double().mean()),
        after=float((after == wanted).double().mean()),
        kept=sum(kept) / len(kept),
    )
