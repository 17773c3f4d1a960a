"""Average precision of every latent for every label, over the entries that fire alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin.lens._firing import Firing

MIN_IMAGES = 5
"""Images that a label needs, so that it can be a name."""


@dataclass(frozen=True, eq=False)
class BestLabels:
    """The label with the best average precision of each latent.

    Attributes:
        labels: Number of the label, -1 for a latent that never fires.
        precision: Its average precision; NaN for a latent that never fires.
    """

    labels: Int[Tensor, " d_sae"]
    precision: Float[Tensor, " d_sae"]


def average_precision(
    latents: Tensor | Firing, labels: Int[Tensor, " n"], n_labels: int
) -> Float[Tensor, "d_sae labels"]:
    """Return how well each latent ranks the images of each label before the others.

    It is scikit-learn's ``average_precision_score``: images of equal value count as one threshold,
    and so do all images on which the latent does not fire.

    Args:
        latents: Latents of the images, ``[n, d_sae]``; entries at or below 0 do not fire.
        labels: Number of each image's label; -1 for an image without one, which has no label and
            still counts as an image of no label.
        n_labels: Number of labels.

    Returns:
        Average precision; NaN for a label without images.

    Examples:
        >>> latents = torch.tensor([[3.0], [2.0], [0.0]])  # 3 images, 1 latent
        >>> vp.lens.average_precision(latents, torch.tensor([0, 1, 1]), 2).tolist()
        [[1.0, 0.5833333333333333]]
    """
    firing = latents if isinstance(latents, Firing) else Firing.of(latents)
    sizes = torch.bincount(labels[labels >= 0], minlength=n_labels).double()
    latent, label = firing.latents, labels[firing.images]
    last = _last_of_ties(latent, firing.values)
    has_label = torch.nonzero(label >= 0).flatten()
    # Within a latent and a label, entries keep their order, the largest first.
    pair = latent[has_label] * n_labels + label[has_label]
    grouped = torch.sort(pair, stable=True)
    entries, pair = has_label[grouped.indices], grouped.values
    new = torch.ones_like(pair, dtype=torch.bool)
    new[1:] = pair[1:] != pair[:-1]
    places = torch.arange(len(pair))
    hits = places - torch.cummax(torch.where(new, places, 0), 0).values + 1
    ties = _last_of_ties(pair, firing.values[entries])
    precision = hits[ties].double() / (firing.ranks[last[entries]] + 1)
    total = torch.zeros(firing.d_sae * n_labels, dtype=torch.float64)
    total.index_add_(0, pair, precision)
    found = torch.bincount(pair, minlength=len(total)).double()
    total, found = total.view(firing.d_sae, -1), found.view(firing.d_sae, -1)
    return (total + (sizes - found) * sizes / firing.n_images) / sizes


def best_labels(
    firing: Firing, columns: Sequence[Sequence[str]], *, min_images: int = MIN_IMAGES
) -> tuple[list[str], BestLabels]:
    """Return the labels of all columns, and the best one of each latent.

    Args:
        firing: Where latents fire.
        columns: Labels of the images, one text for each image in each column; empty for none.
        min_images: Images that a label needs.

    Raises:
        ValueError: no label has as many images.
    """
    names: list[str] = []
    best = torch.full((firing.d_sae,), -1)
    precision = torch.full((firing.d_sae,), -torch.inf, dtype=torch.float64)
    for column in columns:
        known = sorted({text for text in column if text})
        number = {text: place for place, text in enumerate(known)} | {"": -1}
        labels = torch.tensor([number[text] for text in column])
        found = average_precision(firing, labels, len(known)) if known else torch.empty(0, 0)
        few = torch.bincount(labels[labels >= 0], minlength=len(known)) < min_images
        if bool(few.all()):
            continue
        value, place = found.masked_fill(few, -torch.inf).max(1)
        better = value > precision
        best = torch.where(better, place + len(names), best)
        precision = torch.where(better, value, precision)
        names += known
    if not names:
        raise ValueError(
            f"no label has {min_images} images to take names from: give more images, name another "
            "column with labels=, or lower min_images="
        )
    silent = firing.counts == 0
    return names, BestLabels(best.masked_fill(silent, -1), precision.masked_fill(silent, torch.nan))


def _last_of_ties(group: Tensor, values: Tensor) -> Tensor:
    """Return for each entry the place of the last one of its group that has the same value."""
    if len(group) == 0:
        return torch.empty(0, dtype=torch.int64)
    ends = torch.ones(len(group), dtype=torch.bool)
    ends[:-1] = (group[1:] != group[:-1]) | (values[1:] != values[:-1])
    after = torch.where(ends, torch.arange(len(group)), len(group))
    return after.flip(0).cummin(0).values.flip(0)
