"""What a saved checkpoint can do on images that it never saw, and how printed words fool it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers import AutoProcessor, CLIPModel

from vision_plugin.demo._captions import zero_shot_prompts
from vision_plugin.demo._factors import FACTORS, NO_WORD, Scene
from vision_plugin.demo._render import render
from vision_plugin.demo._world import draw

EVALUATION_SEED = 20_000_000


@dataclass(frozen=True, kw_only=True)
class WordAttack:
    """What a printed word that names another value does to zero-shot classification."""

    accuracy_without_word: float
    """The share of the same images, drawn without the word, that are named rightly."""
    accuracy_with_word: float
    """The share that are named rightly with the word."""
    word_wins: float
    """The share that are named as the word says."""


@dataclass(frozen=True, kw_only=True)
class ClipEvaluation:
    """Zero-shot accuracy of a checkpoint, one prompt per value, chance being one in the values."""

    images: int
    """How many images each figure is measured on."""
    seed: int
    """The seed of those images."""
    unseen_images: dict[str, float]
    """Accuracy by factor on new images of the pairs of shape and colour that were trained on."""
    unseen_pairs: dict[str, float]
    """Accuracy by factor on images of the pairs in `HELD_OUT`, which were never trained on."""
    printed_word: float
    """How often the printed word is named, among all words."""
    shape_words: WordAttack
    """Printed words that name another shape, scored on shape."""
    colour_words: WordAttack
    """Printed words that name another colour, scored on colour."""


def evaluate_checkpoint(
    folder: Path, *, images: int = 1000, seed: int = EVALUATION_SEED
) -> ClipEvaluation:
    """Measure a saved checkpoint as a user would load it, in float32.

    Args:
        folder: the checkpoint.
        images: how many images each figure is measured on.
        seed: names the images; any but the training seed gives images that were never seen.
    """
    judge = ZeroShot(folder)
    seen = draw(images, seed=seed, combinations="training").scenes
    new = draw(images, seed=seed + 1, combinations="held out").scenes
    by_shape = draw(images, seed=seed + 2, words=1.0, naming="shape", conflicting=True).scenes
    by_colour = draw(images, seed=seed + 3, words=1.0, naming="colour", conflicting=True).scenes
    words = judge.embed([*by_shape, *by_colour])
    return ClipEvaluation(
        images=images,
        seed=seed,
        unseen_images=judge.accuracies(seen),
        unseen_pairs=judge.accuracies(new),
        printed_word=judge.accuracy([*by_shape, *by_colour], words, "word"),
        shape_words=judge.attack(by_shape, words[:images], "shape"),
        colour_words=judge.attack(by_colour, words[images:], "colour"),
    )


class ZeroShot:
    """A checkpoint and its processor, loaded from a folder and nowhere else.

    Args:
        folder: a Hugging Face CLIP checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._model = CLIPModel.from_pretrained(
            folder, local_files_only=True, dtype=torch.float32
        ).eval()
        self._processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)

    @torch.no_grad()
    def embed(
        self, scenes: Sequence[Scene], *, batch_size: int = 250
    ) -> Float[Tensor, "n d_embed"]:
        """Unit image embeddings of scenes, drawn and preprocessed in batches."""
        embeddings = []
        for start in range(0, len(scenes), batch_size):
            images = [render(scene) for scene in scenes[start : start + batch_size]]
            inputs = self._processor(images=images, return_tensors="pt")
            pooled = self._model.vision_model(**inputs).pooler_output
            embeddings.append(self._model.visual_projection(pooled))
        return functional.normalize(torch.cat(embeddings), dim=-1)

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Float[Tensor, "n d_embed"]:
        """Unit text embeddings."""
        inputs = self._processor(text=list(texts), padding=True, return_tensors="pt")
        pooled = self._model.text_model(**inputs).pooler_output
        return functional.normalize(self._model.text_projection(pooled), dim=-1)

    def classify(self, embeddings: Float[Tensor, "n d_embed"], factor: str) -> list[str]:
        """The value of a factor whose prompt is nearest to each embedding."""
        texts, names = zero_shot_prompts(factor)
        nearest = (embeddings @ self.embed_texts(texts).T).argmax(1)
        return [names[index] for index in nearest.tolist()]

    def accuracy(
        self, scenes: Sequence[Scene], embeddings: Float[Tensor, "n d_embed"], factor: str
    ) -> float:
        """The share of scenes whose value of a factor is named rightly."""
        named = self.classify(embeddings, factor)
        return _share(n == scene.value(factor) for n, scene in zip(named, scenes, strict=True))

    def accuracies(self, scenes: Sequence[Scene]) -> dict[str, float]:
        """Accuracy on every factor that the scenes show."""
        embeddings = self.embed(scenes)
        shown = [f for f in FACTORS if all(scene.value(f) != NO_WORD for scene in scenes)]
        return {factor: self.accuracy(scenes, embeddings, factor) for factor in shown}

    def attack(
        self, scenes: Sequence[Scene], embeddings: Float[Tensor, "n d_embed"], factor: str
    ) -> WordAttack:
        """Compare scenes that carry a conflicting word with the same scenes without it."""
        bare = [replace(scene, word=None) for scene in scenes]
        named = self.classify(embeddings, factor)
        return WordAttack(
            accuracy_without_word=self.accuracy(bare, self.embed(bare), factor),
            accuracy_with_word=self.accuracy(scenes, embeddings, factor),
            word_wins=_share(n == scene.word for n, scene in zip(named, scenes, strict=True)),
        )


def _share(hits: Any) -> float:
    return round(float(np.mean(list(hits))), 4)
