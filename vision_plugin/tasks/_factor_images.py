"""Factors from the columns of any labelled images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vision_plugin.images import ImageSource, open_images, read_batches
from vision_plugin.tasks._factors import FactorData, FactorSplit
from vision_plugin.tasks._labelled import MAX_BAD, check_template, parts

SPLITS = ("readers", "train", "validation", "test")


def read_factors(
    model: Any,
    images: Any,
    factors: Sequence[str],
    *,
    prompts: Mapping[str, str] | None = None,
    least: int = 30,
    readers: int = 600,
    train: int = 600,
    validation: int = 300,
    test: int = 500,
    seed: int = 0,
) -> FactorData:
    """Read images whose columns are factors, in splits of different images.

    Args:
        model: A VisionBridge, which prepares the images.
        images: Whatever ``vp.open_images`` takes.
        factors: Names of the columns; an image whose value is empty in one is left out.
        prompts: Sentence about a value with ``{}`` for it, by factor, for zero-shot reading; None
            fits a linear probe for each factor on images of their own.
        least: Fewest images of a value; images of rarer values are left out.
        readers: Most images that probes are fitted on.
        train: Most images in which latents, directions and rotations are found.
        validation: Most images on which is chosen.
        test: Most images that are reported on. Where images are fewer than all together, the splits
            keep these proportions.
        seed: Seed of the splits.

    Raises:
        ValueError: there is no such column, a factor has fewer than two values, or images are too
            few for an interval.

    Examples:
        >>> sizes = {"readers": 60, "train": 60, "validation": 30, "test": 50, "least": 5}
        >>> data = vp.tasks.read_factors(model, "demo:200", ["texture", "size"], **sizes)
        >>> data.factors["size"], len(data.train.pixels)
        (('large', 'small'), 60)
    """
    source = open_images(images)
    if len(factors) < 2:
        raise ValueError(
            f"factors= names {len(factors)} of the columns of {source!r}, and swapping one while "
            f"the others stay needs two: there are {', '.join(source.column_names) or 'none'}"
        )
    if prompts is not None:
        lacking = [factor for factor in factors if factor not in prompts]
        if lacking:
            raise ValueError(f"prompts= has no sentence for the factor {lacking[0]!r}")
        for factor in factors:
            check_template(prompts[factor])
    columns = {factor: [_text(value) for value in source.column(factor)] for factor in factors}
    rows = _frequent(columns, least)
    names = {factor: tuple(sorted({columns[factor][row] for row in rows})) for factor in factors}
    few = [factor for factor, values in names.items() if len(values) < 2]
    if few:  # a column of rare values leaves no image for the others, so it is the one to name
        worst = min(few, key=lambda factor: max(Counter(columns[factor]).values(), default=0))
        raise ValueError(
            f"the column {worst!r} of {source!r} leaves too few images: fewer than two of its "
            f"values have {least} images or more, so there is nothing to swap: name another "
            "column, or take rarer values with least="
        )
    sizes = (readers if prompts is None else 0, train, validation, test)
    wanted = {name: size for name, size in zip(SPLITS, sizes, strict=True) if size}
    split_rows = parts(rows, tuple(wanted.values()), seed, names=tuple(wanted))
    splits = {
        name: _split(model, source, part, columns, names)
        for name, part in zip(wanted, split_rows, strict=True)
    }
    sentences = {
        factor: tuple(prompt.replace("{}", value) for value in names[factor])
        for factor, prompt in (prompts or {}).items()
    }
    return FactorData(
        names, splits["train"], splits["validation"], splits["test"], splits.get("readers"),
        sentences,
    )  # fmt: skip


def _text(value: object) -> str:
    return "" if value is None else str(value).strip()


def _frequent(columns: Mapping[str, list[str]], least: int) -> list[int]:
    """Return the rows whose every value has enough rows, counted again until none is left out."""
    n = min(map(len, columns.values()))
    rows = [row for row in range(n) if all(column[row] for column in columns.values())]
    while True:
        counts = {
            factor: Counter(column[row] for row in rows) for factor, column in columns.items()
        }
        kept = [
            row
            for row in rows
            if all(counts[factor][column[row]] >= least for factor, column in columns.items())
        ]
        if len(kept) == len(rows):
            return rows
        rows = kept


def _split(
    model: Any,
    source: ImageSource,
    rows: Sequence[int],
    columns: Mapping[str, list[str]],
    names: Mapping[str, tuple[str, ...]],
) -> FactorSplit:
    bad: dict[str, str] = {}
    found: list[int] = []
    pixels = []
    for batch in read_batches(source, 64, bad, indices=sorted(rows), max_bad=MAX_BAD):
        pixels.append(model.preprocess(list(batch.values())))
        found += batch
    values = {
        factor: torch.tensor([names[factor].index(column[row]) for row in found])
        for factor, column in columns.items()
    }
    return FactorSplit(torch.cat(pixels), values)
