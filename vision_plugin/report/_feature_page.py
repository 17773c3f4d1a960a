"""The page of a feature."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import numpy as np

from vision_plugin.report._charts import activation_chart, curves_chart
from vision_plugin.report._columns import STATES
from vision_plugin.report._content import Content
from vision_plugin.report._heat import heat_uris
from vision_plugin.report._inputs import clean
from vision_plugin.report._numbers import compact, percent
from vision_plugin.report._places import NAMES
from vision_plugin.report._steering import ConceptShift, Steered, shifts

N_LABELS, N_PARTNER_IMAGES, N_FIFTHS = 6, 4, 5
_DARK = 0.02
"""Largest share of the feature's scale at a patch, below which a heat map would only be black."""


def feature_pages(content: Content, effects: Iterator[Steered | None]) -> Iterator[dict[str, Any]]:
    """Yield the data of each feature's page, in order."""
    rows = {latent: row for row, latent in enumerate(content.features)}
    for row, (latent, effect) in enumerate(zip(content.features, effects, strict=True)):
        yield {
            **_figures(content, latent),
            "title": content.title,
            "image_pages": content.image_pages,
            "before": content.features[row - 1] if row else None,
            "after": content.features[row + 1] if row + 1 < len(content.features) else None,
            **_images(content, row, latent),
            **_where(content, latent),
            "names": [n.row() for n in content.names[latent]] if content.names else [],
            "answers": _answers(content, latent),
            "labels": _labels(content, row),
            "neighbours": _partners(content, rows, _near(content, row)),
            "together": _partners(content, rows, _beside(content, row)),
            "n_together": f"{content.together.n_images:,}" if content.together else "",
            **_steering(content, effect),
        }


def _figures(content: Content, latent: int) -> dict[str, Any]:
    summary = content.summary
    n_fired = int(summary.n_fired[latent])
    tiles = []
    for column in content.columns:
        value = float(column.values[latent])
        if column.kind == "category":
            named = column.names[int(value)] if np.isfinite(value) else compact(None)
            tiles.append(_tile(column.title, named, "", column.note))
        elif column.key == "frequency":
            of = f"{n_fired:,} of {content.n_images:,}"
            tiles.append(_tile("Fires on images", percent(value), of, column.note))
        elif column.kind == "share":
            tiles.append(_tile(f"Fires on {column.title.lower()}", percent(value), "", column.note))
        else:
            shown = compact(value if n_fired or column.ranks else None)
            rank = _rank(column.values, latent) if column.ranks else ""
            tiles.append(_tile(column.title, shown, rank, column.note))
    n_top = int((summary.top.images[latent, : content.n_top] >= 0).sum())
    lowest = float(summary.top.values[latent, n_top - 1]) if n_top else None
    return {
        "number": latent,
        "name": content.name(latent),
        "state": STATES[int(content.states[latent])],
        "n_images": f"{content.n_images:,}",
        "n_fired": f"{n_fired:,}",
        "tiles": tiles,
        "chart": activation_chart(summary.histogram[latent].numpy(), lowest_shown=lowest),
    }


def _tile(label: str, value: str, note: str = "", about: str = "") -> dict[str, str]:
    return {"label": label, "value": value, "note": note, "about": about}


def _rank(values: np.ndarray[Any, np.dtype[np.float64]], latent: int) -> str:
    """Return a latent's rank among all that have the score, as text."""
    if not np.isfinite(values[latent]):
        return ""
    above = int((values > values[latent]).sum())
    return f"rank {above + 1:,} of {int(np.isfinite(values).sum()):,}"


def _images(content: Content, row: int, latent: int) -> dict[str, Any]:
    summary = content.summary
    both = [summary.top.values[latent].numpy(), summary.sample.values[latent].numpy()]
    values = np.concatenate(both)
    places = [place for place in range(content.shown.shape[1]) if content.shown[row, place] >= 0]
    heat = _heat(content, row, places, values)
    shown = {place: _image(content, row, place, float(values[place]), heat) for place in places}
    top = [shown[place] for place in places if place < content.n_top]
    sample = [shown[place] for place in places if place >= content.n_top]
    n_elsewhere = sum(image["elsewhere"] for image in shown.values())
    # If the latent fires on few images, the sample would only repeat the top ones.
    few = int(summary.n_fired[latent]) <= content.n_top
    return {
        "top": top,
        "fifths": [] if few else _fifths(sample),
        "mapped": any(image["heat"] for image in shown.values()),
        "n_elsewhere": n_elsewhere,
        "n_shown": len(shown),
    }


def _fifths(sample: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the sample, largest value first, in fifths."""
    parts = [part.tolist() for part in np.array_split(np.arange(len(sample)), N_FIFTHS)]
    titles = ("Highest fifth", "Second fifth", "Middle fifth", "Fourth fifth", "Lowest fifth")
    return [
        {"title": title, "images": [sample[place] for place in part]}
        for title, part in zip(titles, parts, strict=True)
        if part
    ]


@dataclass(frozen=True)
class _Heat:
    """The heat maps of a feature."""

    scale: float
    """Activation that is shown white."""
    uris: dict[int, str]
    """Maps by place; none where one would be black all over and hide the image."""
    elsewhere: frozenset[int]
    """Places where the feature is largest on a token that is no patch."""


def _heat(
    content: Content, row: int, places: list[int], values: np.ndarray[Any, np.dtype[np.float32]]
) -> _Heat:
    if content.heat is None or not places:
        return _Heat(0.0, {}, frozenset())
    maps, elsewhere = content.heat.of(row, content.shown[row, places])
    highest = maps.max(1).astype(np.float64)
    # One scale for all images of a feature, so that they can be compared.
    scale = float(highest.max())
    lit = (scale > 0) & (highest > _DARK * np.maximum(scale, values[places]))
    there = [place for place, is_lit in zip(places, lit.tolist(), strict=True) if is_lit]
    uris = heat_uris(maps[lit], content.heat.grid, scale)
    beside = [place for place, at in zip(places, elsewhere.tolist(), strict=True) if at]
    return _Heat(scale, dict(zip(there, uris, strict=True)), frozenset(beside))


def _image(content: Content, row: int, place: int, value: float, heat: _Heat) -> dict[str, Any]:
    number = int(content.shown[row, place])
    tile = content.tile(number)
    return {
        "tile": tile,
        "number": number,
        "value": compact(value),
        "id": content.id(number),
        "label": content.label(number),
        "heat": None if tile is None else heat.uris.get(place),
        "scale": f"{heat.scale:.6g}",
        "rows": content.heat.grid[0] if content.heat else 0,
        "columns": content.heat.grid[1] if content.heat else 0,
        "elsewhere": tile is not None and place in heat.elsewhere,
    }


def _where(content: Content, latent: int) -> dict[str, Any]:
    """Return where on the grid and at which kind of token a latent fires."""
    places = content.counted.places
    if places is None or not bool(places.total[latent].any()):
        return {"kinds": [], "grid_map": None}
    shares = places.shares[latent].tolist()
    kinds = []
    for kind, share in zip(places.kinds_there, shares, strict=True):
        columns = places.of_kind(kind)
        fires = float(places.fired[latent, columns].sum()) / (len(columns) * places.n_images)
        kinds.append(
            {
                "text": NAMES.get(kind, kind),
                "share": percent(share),
                "width": round(100 * share, 1),
                "fires": percent(fires),
            }
        )
    return {"kinds": kinds, "grid_map": _grid(content, latent)}


def _grid(content: Content, latent: int) -> dict[str, Any] | None:
    """Return the mean value at each patch of the grid as a small picture."""
    places = content.counted.places
    if places is None or content.heat is None:
        return None
    patches = places.of_kind("patch")
    rows, columns = content.heat.grid
    if len(patches) != rows * columns:
        return None
    mean = places.total[latent, patches].numpy() / places.n_images
    if mean.max() <= 0:
        return None
    return {
        "uri": heat_uris(mean[None], (rows, columns), float(mean.max()))[0],
        "rows": rows,
        "columns": columns,
        "scale": f"{float(mean.max()):.6g}",
        "largest": compact(float(mean.max())),
    }


def _labels(content: Content, row: int) -> list[dict[str, Any]]:
    """Return the commonest texts of the top images, whatever their column."""
    numbers = [number for number in content.shown[row, : content.n_top].tolist() if number >= 0]
    texts: Counter[tuple[str, str]] = Counter()
    for number in numbers:
        texts.update(content.reader.texts(number).items())
    once = len(content.reader.columns) > 1
    ranked = sorted(texts.items(), key=lambda item: (-item[1], item[0]))
    found: dict[str, dict[str, Any]] = {}
    for (column, text), count in ranked:
        if len(found) == N_LABELS or (once and count == 1 and found):
            break
        found.setdefault(
            clean(text),
            {
                "text": clean(text),
                "query": _query(clean(text)),
                "column": column if once else "",
                "count": count,
                "width": round(100 * count / len(numbers), 1),
            },
        )
    return list(found.values())


def _query(text: str) -> str:
    """Return a text for an address, without a character that could mean anything there."""
    return quote(text.casefold(), safe="").replace(".", "%2E")


def _near(content: Content, row: int) -> list[tuple[int, float]]:
    near = content.neighbours
    if near is None:
        return []
    return list(zip(near.latents[row].tolist(), near.cosines[row].tolist(), strict=True))


def _beside(content: Content, row: int) -> list[tuple[int, float]]:
    found = content.together
    if found is None:
        return []
    pairs = zip(found.latents[row].tolist(), found.correlations[row].tolist(), strict=True)
    return [(latent, value) for latent, value in pairs if value > 0]


def _partners(
    content: Content, rows: dict[int, int], pairs: Sequence[tuple[int, float]]
) -> list[dict[str, Any]]:
    found = []
    for number, closeness in pairs:
        images = content.top_images(rows[number], N_PARTNER_IMAGES) if number in rows else []
        found.append(
            {
                "number": number,
                "linked": number in rows,
                "name": content.name(number),
                "closeness": f"{closeness + 0.0:.3f}",
                "tiles": [content.tile(image, small=True) for image in images],
            }
        )
    return found


def _answers(content: Content, latent: int) -> list[dict[str, Any]]:
    """Return what the language model says, with the image that each answer is about."""
    return [
        {
            **row,
            "tile": None if row["image"] is None else content.tile(row["image"], small=True),
            "changed": row["before"] != row["after"],
        }
        for row in content.answers.get(latent, [])
    ]


def _steering(content: Content, steered: Steered | None) -> dict[str, Any]:
    if steered is None:
        return {"shifts": [], "steered_images": [], "curves": None}
    effect, strength = steered.effect, steered.strength
    moved: Sequence[ConceptShift] = shifts(effect)
    held = "steered" if strength is None else f"held at {compact(strength)}"
    if steered.edit is not None:
        held = f"edited: {clean(str(steered.edit))}"
    return {
        "n_steered": len(effect.before),
        "held": held,
        "fallen": any(shift.after < shift.before for shift in moved),
        "curves": curves_chart(steered.curve) if steered.curve else None,
        "steered_images": _steered_images(content, steered),
        "shifts": shift_rows(moved),
    }


def shift_rows(moved: Sequence[ConceptShift]) -> list[dict[str, Any]]:
    """Return what a page shows of how concepts moved."""
    return [
        {
            "concept": clean(shift.concept),
            "before": percent(shift.before),
            "after": percent(shift.after),
            "before_width": round(100 * shift.before, 2),
            "after_width": round(100 * shift.after, 2),
        }
        for shift in moved
    ]


def _steered_images(content: Content, steered: Steered) -> list[dict[str, Any]]:
    """Return what each image is taken for, before and after."""
    effect = steered.effect
    if len(steered.numbers) != len(effect.before):
        return []
    before, after = effect.top(effect.before), effect.top(effect.after)
    return [
        {
            "tile": content.tile(number, small=True),
            "label": content.label(number) or content.id(number),
            "before": clean(was),
            "before_share": percent(p_was),
            "after": clean(now),
            "after_share": percent(p_now),
            "changed": was != now,
        }
        for number, (was, p_was), (now, p_now) in zip(steered.numbers, before, after, strict=True)
    ]
