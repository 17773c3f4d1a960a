"""Image embeddings as sparse sums of words: SpLiCE (Bhalla et al. 2024, arXiv 2402.10376)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vision_plugin._inputs import check_template, sentences
from vision_plugin._progress import Progress
from vision_plugin.evaluation import class_of_images, embed
from vision_plugin.images import open_images, read_batches
from vision_plugin.lens._shares import Share, mean_of, share_of
from vision_plugin.lens._splice_result import Splice, SplicePoint
from vision_plugin.lens._splice_solvers import SOLVERS, Solver, sparse_codes
from vision_plugin.lens._splice_words import (
    WordDictionary,
    centred_images,
    require_text,
    uncentred_images,
)


@dataclass(frozen=True, kw_only=True)
class SpliceSettings:
    """How images are written as words.

    Examples:
        >>> vp.lens.SpliceSettings(l1=(0.1, 0.2)).solver
        'fista'
    """

    l1: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.5)
    """Factors of the sum of the weights; each is a point of the curve."""
    chosen: float = 0.2
    """The factor whose codes are kept; it joins the curve."""
    solver: Solver = "fista"
    """``fista``, batched; or ``sklearn``, one image after the other."""
    labels: str | None = None
    """Classes of the images, as ``column:NAME``, for zero-shot with what the words compose; by
    default the labels of the images, where they have some."""
    template: str = "{}"
    """Sentence around a word and a class."""
    control: bool = True
    """Whether random directions stand beside the words, as many of them."""
    batch_size: int = 64
    """Images per forward pass."""
    seed: int = 0
    """Seed of the random directions."""

    def __post_init__(self) -> None:
        check_template(self.template, argument="template")
        if min((*self.l1, self.chosen)) <= 0:
            raise ValueError(f"l1={self.l1} and chosen={self.chosen}: give numbers above 0")
        if self.solver not in SOLVERS:
            raise ValueError(f"solver={self.solver!r}: use {' or '.join(SOLVERS)}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")


def splice(
    model: Any,
    images: Any,
    vocabulary: WordDictionary | Sequence[str] | str | Path,
    *,
    image_mean: Float[Tensor, " d"] | None = None,
    settings: SpliceSettings | None = None,
    progress: bool = True,
) -> Splice:
    """Write image embeddings as non-negative sparse sums of words.

    Embeddings of images and of words are scaled to norm one, their means are subtracted, and they
    are scaled again: images and words lie apart in the joint space, and the means hold that gap.

    Args:
        model: A VisionBridge with a text tower.
        images: Whatever ``vp.open_images`` takes.
        vocabulary: Words, a text file with one a line, or words that :class:`WordDictionary`
            embedded before.
        image_mean: Mean of unit embeddings of other images, ``[d]``; None takes these images'.
        settings: Penalties, solver, classes.
        progress: Show how far the images are.

    Raises:
        ValueError: the vocabulary is empty or another model's, the model has no text tower, or no
            image could be read.

    Examples:
        >>> found = vp.lens.splice(
        ...     model, world.images, ["red", "blue", "a star", "a circle"], progress=False
        ... )
        >>> found.codes.shape
        torch.Size([8, 4])
    """
    cfg = settings or SpliceSettings()
    require_text(model)
    words = vocabulary
    if not isinstance(words, WordDictionary):
        words = WordDictionary.of(model, words, template=cfg.template)
    words.check_model(model)
    source = open_images(images)
    places, embeddings, bad = _embedded(model, source, cfg.batch_size, progress)
    unit = nn.functional.normalize(embeddings.double(), dim=1)
    mean = unit.mean(0) if image_mean is None else image_mean.double()
    if mean.shape != unit.shape[1:] or not bool(mean.isfinite().all()):
        raise ValueError(
            f"image_mean= has shape {list(mean.shape)}, and embeddings are {unit.shape[1]} wide: "
            "give the mean of unit image embeddings of this model"
        )
    if len(unit) == 1 and image_mean is None:
        mean = torch.zeros_like(mean)  # an image minus itself would leave nothing to compose
    targets = centred_images(unit, mean)
    classes, labels, texts = _classes(model, source, places, cfg)
    curve: list[SplicePoint] = []
    codes: Tensor | None = None
    dictionaries = {"words": words.centred}
    if cfg.control:
        dictionaries["random"] = _random_directions(words.centred, cfg.seed)
    for name, rows in dictionaries.items():
        for l1 in sorted({*cfg.l1, cfg.chosen}):
            found = sparse_codes(targets, rows, l1, solver=cfg.solver)
            made = uncentred_images(found @ rows, mean)
            accuracy = None if texts is None else _accuracy(model, made, texts, labels)
            curve.append(_point(name, l1, found, found @ rows, targets, accuracy))
            if name == "words" and l1 == cfg.chosen:
                codes = found
    assert codes is not None
    return Splice(
        model=str(model.cfg.model_name),
        settings=cfg,
        words=words,
        ids=[source.ids[place] for place in places],
        embeddings=unit,
        image_mean=mean,
        codes=codes,
        curve=curve,
        classes=classes,
        labels=labels,
        class_texts=texts,
        plain_accuracy=None if texts is None else _accuracy(model, unit, texts, labels),
        bad_images=bad,
    )


def _embedded(
    model: Any, source: Any, batch_size: int, progress: bool
) -> tuple[list[int], Tensor, dict[str, str]]:
    places: list[int] = []
    parts: list[Tensor] = []
    bad: dict[str, str] = {}
    with Progress(len(source), "embedding", shown=progress) as shown:
        for batch in read_batches(source, batch_size, bad):
            images = list(batch.values())
            parts.append(embed(model, model, images, model.preprocess(images)))
            places += list(batch)
            shown.advance(len(batch))
    if not parts:
        raise ValueError("none of the images could be read: mend images=")
    return places, torch.cat(parts), bad


def _classes(
    model: Any, source: Any, places: list[int], cfg: SpliceSettings
) -> tuple[list[str], Tensor | None, Tensor | None]:
    """Return the classes, each image's class (-1 for none) and the classes' text embeddings."""
    if cfg.labels is None and (source.labels is None or not any(source.labels)):
        return [], None, None
    every = class_of_images(source, cfg.labels)
    names = [every[place] for place in places]
    classes = sorted(set(names) - {""})
    if len(classes) < 2:
        return [], None, None
    number = {"": -1} | {name: place for place, name in enumerate(classes)}
    texts = model.encode_text(sentences(cfg.template, classes, argument="template"))
    return classes, torch.tensor([number[name] for name in names]), texts.double().cpu()


def _accuracy(model: Any, embeddings: Tensor, texts: Tensor, labels: Tensor | None) -> Share:
    assert labels is not None
    known = labels >= 0
    answers = model.zero_shot_logits(embeddings[known], texts).argmax(1)
    return share_of(answers == labels[known])


def _random_directions(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(like.shape, generator=generator, dtype=torch.float64)
    return nn.functional.normalize(drawn, dim=1)


def _point(
    name: str, l1: float, codes: Tensor, made: Tensor, targets: Tensor, accuracy: Share | None
) -> SplicePoint:
    cosine = nn.functional.cosine_similarity(made, targets, dim=1)  # 0 where no word is taken
    return SplicePoint(name, l1, mean_of((codes > 0).sum(1)), mean_of(cosine), accuracy)
