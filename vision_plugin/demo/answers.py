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

from torch import Tensor

from vision_plugin.demo import Concept, Scene
from vision_plugin.models.dictionary import Dictionary
from vision_plugin.steering import steering_effect

LEAST_IMAGES = 20
"""Fewest images that a latent fires on to be steered."""
IMAGES = 40
"""Number of images to ask about."""
PER_QUESTION = 2
"""Most latents that are steered for one question."""


@dataclass(frozen=True)
class Naming:
    """Latents named by the concepts that set their images apart from all images."""

    concepts: tuple[Concept, ...]
    names: list[int]
    """The concept of each latent."""

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
    names: list[int] = (apart @ texts.double().T).argmax(1).tolist()
    return Naming(tuple(concepts), names)


def choose_latents(
    naming: Naming, top_concept: Tensor, score: Tensor, n_active: Tensor, n: int
) -> list[int]:
    """Return the most steerable latents whose names agree with what steering makes of them.

    A name says which images a latent fires on, and is not made by steering. Each name is taken
    once, and each question :data:`PER_QUESTION` times at most.

    Args:
        naming: Names of the latents.
        top_concept: Concept that steering each latent moves most, on a few images; -1 for none.
        score: Steerability of each latent on these, NaN where it is undefined.
        n_active: Number of images that each latent fires on.
        n: Number of latents to choose.
    """
    top, counts = top_concept.tolist(), n_active.tolist()
    chosen: dict[int, int] = {}
    asked: Counter[str] = Counter()
    for latent in score.nan_to_num(-1).argsort(descending=True).tolist():
        name = naming.names[latent]
        factor = naming.concepts[name].factor
        agrees = top[latent] == name and float(score[latent]) > 0
        if not agrees or counts[latent] < LEAST_IMAGES or name in chosen:
            continue
        if asked[factor] < PER_QUESTION and len(chosen) < n:
            chosen[name] = latent
            asked[factor] += 1
    return list(chosen.values())


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
    strength: float,
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
        strength: Value to hold the latent at.
        images: The images.
        scenes: What they show.
        texts: Embeddings of the concepts.
    """
    concept = naming.concepts[naming.names[latent]]
    lacking = [i for i, scene in enumerate(scenes) if not concept.shown_in(scene)][:IMAGES]
    pixels = model.preprocess([images[i] for i in lacking])

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
