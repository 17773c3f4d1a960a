"""The content of a report, gathered before any page is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vision_plugin.report._charts import activation_chart
from vision_plugin.report._heat import heat_uri
from vision_plugin.report._images import ImageReader, ImageWriter
from vision_plugin.report._inputs import clean
from vision_plugin.report._neighbours import Neighbours
from vision_plugin.report._numbers import compact, percent
from vision_plugin.report._passes import HeatMaps
from vision_plugin.report._statistics import LatentSummary
from vision_plugin.report._steering import ConceptShift, Steered, shifts

N_LABELS, N_NEIGHBOUR_IMAGES = 6, 4


@dataclass(frozen=True)
class Content:
    """The data that the pages are made from."""

    title: str
    facts: tuple[str, ...]
    """Short statements about SAE, model and images."""
    tokens: str | None
    """Kind of token that was encoded; None where latents were given."""
    features: list[int]
    """Numbers of the latents in the report, ascending."""
    names: list[str] | None
    """One text per latent of the SAE."""
    scores: dict[str, np.ndarray[Any, np.dtype[np.float64]]]
    """Column by name, one number per latent of the SAE."""
    summary: LatentSummary
    shown: np.ndarray[Any, np.dtype[np.int64]]
    """[features, n_top + n_sample]: image numbers or -1."""
    n_top: int
    reader: ImageReader
    writer: ImageWriter
    heat: HeatMaps | None
    neighbours: Neighbours | None

    @property
    def n_images(self) -> int:
        """Return the number of images that could be read."""
        return self.summary.n_images

    def name(self, latent: int) -> str:
        """Return a latent's name, or an empty text."""
        return "" if self.names is None else self.names[latent]

    def source(self, number: int) -> str | None:
        """Return the path of an image's small copy inside the report; None if it was not read."""
        if number not in self.writer.written:
            return None
        return f"images/{number}.{self.writer.suffix}"

    def top_images(self, row: int, n: int) -> list[int]:
        """Return the numbers of the first ``n`` top images that can be shown."""
        numbers = self.shown[row, : self.n_top].tolist()
        return [number for number in numbers if number in self.writer.written][:n]


def feature_pages(content: Content, effects: Iterator[Steered | None]) -> Iterator[dict[str, Any]]:
    """Yield the data of each feature's page, in order."""
    rows = {latent: row for row, latent in enumerate(content.features)}
    for row, (latent, effect) in enumerate(zip(content.features, effects, strict=True)):
        yield {
            **_figures(content, latent),
            "title": content.title,
            "before": content.features[row - 1] if row else None,
            "after": content.features[row + 1] if row + 1 < len(content.features) else None,
            **_images(content, row, latent),
            "labels": _labels(content, row),
            "neighbours": _neighbours(content, row, rows),
            **_steering(effect),
        }


def _figures(content: Content, latent: int) -> dict[str, Any]:
    summary = content.summary
    n_fired = int(summary.n_fired[latent])
    share, count = (
        percent(float(summary.frequency[latent])),
        f"{n_fired:,} of {content.n_images:,}",
    )
    tiles = [_tile("Fires on images", share, count)]
    if summary.token_frequency is not None:
        tiles.append(_tile("Fires on tokens", percent(float(summary.token_frequency[latent]))))
    largest = float(summary.top.values[latent, 0]) if n_fired else None
    tiles.append(_tile("Max activation", compact(largest)))
    for name, values in content.scores.items():
        tiles.append(_tile(name, compact(float(values[latent])), _rank(values, latent)))
    n_top = int((summary.top.images[latent, : content.n_top] >= 0).sum())
    lowest = float(summary.top.values[latent, n_top - 1]) if n_top else None
    return {
        "number": latent,
        "name": content.name(latent),
        "dead": n_fired == 0,
        "n_images": f"{content.n_images:,}",
        "tiles": tiles,
        "chart": activation_chart(summary.histogram[latent].numpy(), lowest_shown=lowest),
    }


def _tile(label: str, value: str, note: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def _rank(values: np.ndarray[Any, np.dtype[np.float64]], latent: int) -> str:
    """Return a latent's rank among all that have the score, as text."""
    if not np.isfinite(values[latent]):
        return ""
    return (
        f"rank {int((values > values[latent]).sum()) + 1:,} of {int(np.isfinite(values).sum()):,}"
    )


def _images(content: Content, row: int, latent: int) -> dict[str, Any]:
    summary = content.summary
    values = np.concatenate(
        [summary.top.values[latent].numpy(), summary.sample.values[latent].numpy()]
    )
    places = [place for place in range(content.shown.shape[1]) if content.shown[row, place] >= 0]
    scale = 0.0
    if content.heat is not None and places:
        # One scale for all images of a feature, so that they can be compared.
        scale = float(content.heat.values[row, places].max())
    shown = {place: _image(content, row, place, float(values[place]), scale) for place in places}
    top = [shown[place] for place in places if place < content.n_top]
    sample = [shown[place] for place in places if place >= content.n_top]
    # If the latent fires on few images, the sample would only repeat the top ones.
    few = int(summary.n_fired[latent]) <= content.n_top
    mapped = any(image["heat"] for image in shown.values())
    return {"top": top, "sample": [] if few else sample, "mapped": mapped}


def _image(content: Content, row: int, place: int, value: float, scale: float) -> dict[str, Any]:
    number = int(content.shown[row, place])
    source, heat, elsewhere = content.source(number), None, False
    if content.heat is not None and source is not None:
        elsewhere = bool(content.heat.elsewhere[row, place])
        if scale > 0:
            heat = heat_uri(content.heat.values[row, place], content.heat.grid, scale)
    return {
        "source": source,
        "value": compact(value),
        "id": clean(content.reader.id(number)),
        "label": clean(content.reader.label(number)),
        "heat": heat,
        "elsewhere": elsewhere,
    }


def _labels(content: Content, row: int) -> list[dict[str, Any]]:
    """Return the commonest labels of the top images, where there are labels."""
    numbers = [number for number in content.shown[row, : content.n_top].tolist() if number >= 0]
    labels = Counter(label for number in numbers if (label := content.reader.label(number)))
    ranked = sorted(labels.items(), key=lambda item: (-item[1], item[0]))[:N_LABELS]
    return [
        {"text": clean(text), "count": count, "width": round(100 * count / len(numbers), 1)}
        for text, count in ranked
    ]


def _neighbours(content: Content, row: int, rows: dict[int, int]) -> list[dict[str, Any]]:
    if content.neighbours is None:
        return []
    found = []
    pairs = zip(content.neighbours.latents[row], content.neighbours.cosines[row], strict=True)
    for latent, cosine in pairs:
        number = int(latent)
        images = []
        if number in rows:
            images = content.top_images(rows[number], N_NEIGHBOUR_IMAGES)
        found.append(
            {
                "number": number,
                "linked": number in rows,
                "name": content.name(number),
                "cosine": f"{float(cosine) + 0.0:.3f}",
                "sources": [content.source(image) for image in images],
            }
        )
    return found


def _steering(steered: Steered | None) -> dict[str, Any]:
    if steered is None:
        return {"shifts": []}
    effect, strength = steered.effect, steered.strength
    moved: Sequence[ConceptShift] = shifts(effect)
    held = "steered" if strength is None else f"held at {compact(strength)}"
    return {
        "n_steered": len(effect.before),
        "held": held,
        "fallen": any(shift.after < shift.before for shift in moved),
        "shifts": [
            {
                "concept": clean(shift.concept),
                "before": percent(shift.before),
                "after": percent(shift.after),
                "before_width": round(100 * shift.before, 2),
                "after_width": round(100 * shift.after, 2),
            }
            for shift in moved
        ],
    }
