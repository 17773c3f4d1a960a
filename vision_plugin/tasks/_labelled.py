"""Typographic attacks on any labelled images: words printed on them name other classes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from PIL import Image

from vision_plugin.images import ImageSource, open_images, read_batches
from vision_plugin.tasks._attack import Attack, TypographicData
from vision_plugin.tasks._evidence import as_pixels
from vision_plugin.tasks._measure import LEAST
from vision_plugin.tasks._printing import PrintStyle

TEMPLATE = "a photo of a {}."
FEWEST_CLASSES = 4
MAX_BAD = 100
"""Most images that may be unreadable; they are left out."""


class LabelledImages:
    """Images of known classes in three parts, on which words are printed.

    No image is in two parts. Words name classes; an image never carries its own class's name.

    Args:
        model: A VisionBridge, whose input's size and preprocessing the images take.
        images: Whatever ``vp.open_images`` takes.
        label_column: Column of the labels, which are what words say; by default the source's own.
        template: Sentence about a class, with ``{}`` for its name.
        train: Most pairs in which latents are found.
        validation: Most pairs on which is chosen.
        test: Most pairs that are reported on. Where images are fewer than all three, the parts keep
            these proportions.
        style: What printed words look like.
        kind: What the words name, for tables.
        seed: Seed of the parts and the words.

    Raises:
        ValueError: there are no labels, too few classes, or too few images for an interval.

    Examples:
        >>> images = vp.open_images("demo:120")
        >>> labelled = vp.tasks.LabelledImages(
        ...     model, images, label_column="shape", train=30, validation=30, test=40
        ... )
        >>> labelled.data().classes[:2]
        ('circle', 'cross')
    """

    def __init__(
        self,
        model: Any,
        images: Any,
        *,
        label_column: str | None = None,
        template: str = TEMPLATE,
        train: int = 600,
        validation: int = 400,
        test: int = 1000,
        style: PrintStyle | None = None,
        kind: str = "class",
        seed: int = 0,
    ) -> None:
        self.model, self.style, self.kind, self.seed = model, style or PrintStyle(), kind, seed
        self.source = open_images(images, label_column=label_column)
        labels = _labels(self.source)
        self.classes = tuple(sorted({label for label in labels if label}))
        if len(self.classes) < FEWEST_CLASSES:
            raise ValueError(
                f"{self.source!r} has labels of {len(self.classes)} "
                f"class{'' if len(self.classes) == 1 else 'es'} in the column "
                f"{self.source.label_column!r}: words that mislead need {FEWEST_CLASSES} classes "
                "or more; name another column with label_column="
            )
        check_template(template)
        self.prompts = tuple(template.format(name) for name in self.classes)
        number = {name: i for i, name in enumerate(self.classes)}
        self._label = {i: number[label] for i, label in enumerate(labels) if label}
        self._parts = parts(list(self._label), (train, validation, test), seed)

    def data(self) -> TypographicData:
        """Return pairs of each image without and with one word, in three splits."""
        train, validation, test = (
            self._attack(part, np.random.default_rng([self.seed, 1 + i]))
            for i, part in enumerate(self._parts)
        )
        return TypographicData(self.kind, self.classes, self.prompts, train, validation, test)

    def for_training(self, n: int) -> list[Image.Image]:
        """Return images of the training part for an SAE, every other one with a word.

        Each image comes again, with another word, until there are ``n``.
        """
        random = np.random.default_rng([self.seed, 0])
        found = self._images(self._parts[0])
        places, made = list(found), []
        for i in range(n):
            place = places[(i // 2) % len(places)]
            image = found[place]
            made.append(self._with_word(image, place, random)[0] if i % 2 else image)
        return made

    def _attack(self, part: Sequence[int], random: np.random.Generator) -> Attack:
        found = self._images(part)
        printed = [self._with_word(image, place, random) for place, image in found.items()]
        return Attack(
            clean=as_pixels(self.model, list(found.values())),
            attacked=as_pixels(self.model, [image for image, _ in printed]),
            labels=torch.tensor([self._label[place] for place in found]),
            printed=torch.tensor([word for _, word in printed]),
        )

    def _with_word(
        self, image: Image.Image, place: int, random: np.random.Generator
    ) -> tuple[Image.Image, int]:
        word = int(random.integers(len(self.classes) - 1))
        word += word >= self._label[place]
        return self.style.print_on(image, self.classes[word], random), word

    def _images(self, part: Sequence[int]) -> dict[int, Image.Image]:
        """Return images cut to the model's input, so that no word is cut off later."""
        height, width = self.model.adapter.tower_dimensions.image_size
        bad: dict[str, str] = {}
        batches = read_batches(self.source, 64, bad, indices=sorted(part), max_bad=MAX_BAD)
        return {
            place: cut(image, (width, height))
            for batch in batches
            for place, image in batch.items()
        }


def cut(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the middle of an image in the proportions of a size, resized to it."""
    width, height = size
    scale = max(width / image.width, height / image.height)
    inner = min(image.width, width / scale), min(image.height, height / scale)
    left, top = (image.width - inner[0]) / 2, (image.height - inner[1]) / 2
    box = (left, top, left + inner[0], top + inner[1])
    return image.resize(size, Image.Resampling.BICUBIC, box=box)


def check_template(template: str) -> None:
    """Raise ValueError unless a template has one place for a name."""
    if template.count("{}") != 1 or template.replace("{}", "").count("{"):
        raise ValueError(f"template={template!r} needs one {{}}, for the name of a class")


def _labels(source: ImageSource) -> list[str]:
    if source.labels is None:
        raise ValueError(
            f"{source!r} has no labels, so no word can name another class: name a column with "
            f"label_column=; there are {', '.join(source.column_names) or 'no columns'}"
        )
    return [label.strip() for label in source.labels]


def parts(
    places: list[int],
    sizes: Sequence[int],
    seed: int,
    names: Sequence[str] = ("train", "validation", "test"),
) -> list[list[int]]:
    """Return the images of each part: as many as asked for, or in these proportions."""
    share = min(1.0, len(places) / max(1, sum(sizes)))
    counts = [int(size * share) for size in sizes]
    few = [(n, name) for n, name in zip(counts, names, strict=True) if n < LEAST]
    if few:
        n, name = few[0]
        raise ValueError(
            f"the {name} split has {n} of {len(places)} labelled images, too few for an interval, "
            f"which needs {LEAST}: give more images, or another share of them"
        )
    order = np.random.default_rng([seed, 99]).permutation(len(places)).tolist()
    edges = np.cumsum([0, *counts]).tolist()
    return [[places[i] for i in order[a:b]] for a, b in pairwise(edges)]
