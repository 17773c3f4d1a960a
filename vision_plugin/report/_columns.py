"""The columns that features are sorted and filtered by, and the order they are first shown in."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vision_plugin._intervals import wilson
from vision_plugin.report._images import ImageReader
from vision_plugin.report._names import Name
from vision_plugin.report._passes import Counted
from vision_plugin.report._places import MIXED, NAMES

FEW = 10
"""Images below which a score rests on too few to be ranked with the others."""
DENSE = 0.1
"""Share of tokens above which a feature is dense; as in a sparsity study."""
DENSE_ON_IMAGES = 0.9
"""The same for images."""
Z = 1.645
"""Standard deviations below the score at which its one-sided 95% bound lies."""
STATES = ("usual", "few", "dense", "dead")
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Column:
    """A number, or a category, per latent of the SAE."""

    key: str
    title: str
    values: Float[np.ndarray, " d_sae"]
    kind: str = "number"
    """``number``, ``share``, ``count`` or ``category``."""
    note: str = ""
    ranks: bool = False
    """Whether it is a score, by which features on too few images are not ranked."""
    names: tuple[str, ...] = ()
    """Names of the categories; a value is a place here."""


def states_of(counted: Counted) -> Int[np.ndarray, " d_sae"]:
    """Return every latent's place in ``STATES``."""
    summary = counted.summary
    fired, on_images = summary.n_fired.numpy(), summary.frequency.numpy()
    dense = on_images > DENSE_ON_IMAGES
    if counted.places is not None:
        dense |= counted.places.frequency.numpy() > DENSE
    states = np.where(dense, 2, 0)
    # A hundred images and fewer cannot hold anything on ten of them rare.
    few = min(FEW, max(2, summary.n_images // 10))
    states = np.where(fired < few, 1, states)
    return np.where(fired == 0, 3, states)


def make_columns(
    counted: Counted,
    scores: Mapping[str, Array],
    names: Sequence[tuple[Name, ...]] | None,
    reader: ImageReader,
    *,
    chance: float = math.nan,
) -> list[Column]:
    """Return all columns; the first one is the order in which features are first shown.

    Args:
        counted: What the first pass found.
        scores: A score per latent by name.
        names: Names of every latent.
        reader: The images.
        chance: Monosemanticity of a latent that fires at random, where it is known.
    """
    columns = [
        Column(f"score{place}", name, values, ranks=True)
        for place, (name, values) in enumerate(scores.items())
        if not name.endswith(" low")
    ]
    bound = _cautious(counted, scores, chance)
    columns = [*([bound] if bound else []), *columns]
    agreement = _agreement(counted, reader)
    columns += [agreement] if agreement else []
    columns += _checks(names)
    return columns + _counts(counted)


def _counts(counted: Counted) -> list[Column]:
    summary, places = counted.summary, counted.places
    on_images = summary.frequency.numpy()
    fired = summary.n_fired.numpy()
    found = [
        Column("frequency", "Images", on_images, "share", "Share of images on which it fires"),
    ]
    if places is not None:
        note = "Share of tokens on which it fires"
        found.append(Column("tokens", "Tokens", places.frequency.numpy(), "share", note))
    largest = summary.top.values[:, 0].numpy().astype(np.float64)
    mean = np.where(fired > 0, summary.total.numpy() / np.maximum(fired, 1), np.nan)
    found.append(Column("max", "Max", largest, note="Largest value on any image"))
    found.append(Column("mean", "Mean", mean, note="Mean value on the images on which it fires"))
    if places is not None and len(places.kinds_there) > 1:
        kinds = (*(NAMES.get(kind, kind) for kind in places.kinds_there), MIXED)
        number = {name: float(place) for place, name in enumerate(kinds)}
        values = np.array([number.get(kind, np.nan) for kind in places.main_kind()])
        note = "Kind of token that has at least 80% of its activation"
        found.append(Column("kind", "Token kind", values, "category", note, names=kinds))
    return found


def _checks(names: Sequence[tuple[Name, ...]] | None) -> list[Column]:
    """Return the check of each feature's name, where names have one."""
    if names is None or not any(each and each[0].is_checked for each in names):
        return []
    values = np.array([each[0].auroc if each else np.nan for each in names])
    note = "AUROC of the name on images that it was not found on; 0.5 is chance"
    return [Column("check", "Name check", values, note=note, ranks=True)]


def _cautious(counted: Counted, scores: Mapping[str, Array], chance: float) -> Column | None:
    """Return a lower bound of monosemanticity that knows on how many images it rests.

    It is the interval's lower end where there is one. Otherwise the spread of the score under
    shuffling, which ``z`` tells, stands for its error; otherwise the score is drawn towards the
    mean as if ten more images scored the mean.
    """
    score = scores.get("monosemanticity")
    if score is None:
        return None
    low, z = scores.get("monosemanticity low"), scores.get("monosemanticity z")
    n = counted.summary.n_fired.numpy().astype(np.float64)
    defined = np.isfinite(score)
    mean = float(np.median(score[defined])) if defined.any() else 0.0
    bound, how = mean + (score - mean) * n / (n + FEW), "drawn to the median by ten images"
    if low is not None and np.isfinite(low).any():
        bound, how = low, "lower end of its interval"
    elif z is not None and np.isfinite(z).any():
        start = chance if np.isfinite(chance) else mean
        with np.errstate(divide="ignore", invalid="ignore"):
            spread = np.abs((score - start) / z)
        spread = np.where(np.isfinite(spread), spread, np.nan)
        bound, how = score - Z * spread, "score less 1.645 deviations under shuffling"
    note = f"Monosemanticity that it has at least: {how}"
    return Column("cautious", "At least", bound, note=note, ranks=True)


def _agreement(counted: Counted, reader: ImageReader) -> Column | None:
    """Return how many of a feature's top images share a text, beyond what all images do.

    It is the Wilson lower bound (one-sided, 95%) of the share of the top images with the commonest
    text of any column, less that text's share of all images.
    """
    if not reader.columns and reader.label(0) == "":
        return None
    values = np.full(counted.summary.d_sae, np.nan)
    everywhere: Counter[tuple[str, str]] = Counter()
    texts_of = [tuple(reader.texts(number).items()) for number in range(len(reader))]
    for texts in texts_of:
        everywhere.update(texts)
    if len(everywhere) >= 0.9 * len(reader) * max(1, len(reader.columns)):
        return None  # texts are as good as ids: none is shared
    for latent, images in enumerate(counted.summary.top.images.tolist()):
        shown = [number for number in images if number >= 0]
        if len(shown) < 2:
            continue
        counts = Counter(item for number in shown for item in texts_of[number])
        gains = [
            wilson(count / len(shown), len(shown), Z)[0] - everywhere[text] / len(reader)
            for text, count in counts.items()
        ]
        values[latent] = max(gains, default=np.nan)
    note = (
        "Share of the top images that have a text in common (lower bound), less that text's share "
        "of all images"
    )
    return Column("agreement", "Labels agree", values, note=note, ranks=True)
