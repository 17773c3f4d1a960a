"""The data of the index, which the map and the comparison read as well."""

from __future__ import annotations

from typing import Any

import numpy as np

from vision_plugin.report._columns import STATES
from vision_plugin.report._content import Content
from vision_plugin.report._numbers import compact, percent, plain

N_LIST_IMAGES, N_LIST_NAME, N_LIST_TEXT = 16, 160, 160
N_TILES = 6


def index_data(content: Content) -> dict[str, Any]:
    """Return the rows of the index."""
    chosen = np.array(content.features)
    order = content.writer.order
    slots = content.writer.small.slots
    n_shown = len(content.features)
    images = [
        [slots[number] for number in content.top_images(row, N_LIST_IMAGES)]
        for row in range(n_shown)
    ]
    return {
        "schema": 2,
        "title": content.title,
        "sort": content.columns[0].key,
        "columns": [
            {
                "key": column.key,
                "title": column.title,
                "kind": column.kind,
                "note": column.note,
                "ranks": column.ranks,
                "names": list(column.names),
            }
            for column in content.columns
        ],
        "ids": content.features,
        "states": content.states[chosen].tolist(),
        "names": None
        if content.names is None
        else [content.name(latent)[:N_LIST_NAME] for latent in content.features],
        "values": [[plain(float(v)) for v in column.values[chosen]] for column in content.columns],
        "images": images,
        "thumbs": thumbs(content),
        "pictures": {
            "numbers": order,
            "labels": [content.label(number)[:N_LIST_NAME] for number in order],
            "texts": _texts(content),
            "files": file_names(content),
            "pages": [slots[number] for number in order if number in content.image_pages],
        },
    }


def thumbs(content: Content) -> dict[str, Any]:
    """Return how the small copies lie on their sheets."""
    small = content.writer.small
    return {
        "tile": small.tile,
        "across": small.across,
        "suffix": small.suffix,
        "sizes": [list(small.sizes.get(number, (0, 0))) for number in content.writer.order],
    }


def _texts(content: Content) -> dict[str, Any]:
    """Return the texts of the images shown, each once: ``all``, and its places by image."""
    place: dict[str, int] = {}
    of_image = []
    for number in content.writer.order:
        texts = (text[:N_LIST_TEXT] for text in content.reader.texts(number).values())
        of_image.append(sorted({place.setdefault(text, len(place)) for text in texts}))
    return {"all": list(place), "of": of_image}


def file_names(content: Content) -> list[str]:
    """Return the images' file names, or other ids; none where the ids are plain numbers."""
    ids = [content.id(number) for number in content.writer.order]
    return ids if any(not each.isdecimal() for each in ids) else []


def tiles(content: Content) -> list[dict[str, str]]:
    """Return the figures at the head of the index."""
    chosen = np.array(content.features)
    counts = np.bincount(content.states[chosen], minlength=len(STATES))
    fired = content.summary.n_fired.numpy()[chosen]
    d_sae = content.summary.d_sae
    of = "" if len(chosen) == d_sae else f"of {d_sae:,}"
    found = [
        {"label": "Features", "value": f"{len(chosen):,}", "note": of},
        {"label": "Dead", "value": f"{counts[3]:,}", "note": percent(counts[3] / len(chosen))},
    ]
    if (fired > 0).any():
        share = content.summary.frequency.numpy()[chosen][fired > 0]
        value = percent(float(np.median(share)))
        found.append({"label": "Median frequency", "value": value, "note": "of those alive"})
    if content.n_images:
        mean = float(fired.sum()) / content.n_images
        found.append({"label": "Active per image", "value": compact(mean), "note": ""})
    for column in [column for column in content.columns if column.ranks][:N_TILES]:
        values = column.values[chosen]
        defined = values[np.isfinite(values)]
        median = compact(float(np.median(defined))) if len(defined) else compact(None)
        found.append({"label": f"Median {column.title}", "value": median, "note": ""})
    return found
