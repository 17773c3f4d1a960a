"""The files of a report: the index with its data, a page per feature, styles and scripts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from vision_plugin._version import __version__
from vision_plugin.report._charts import Chart, frequency_chart, score_chart
from vision_plugin.report._content import Content
from vision_plugin.report._inputs import clean
from vision_plugin.report._numbers import compact, percent, plain

MADE_BY = f"Made by vision_plugin {__version__}"
N_INDEX_IMAGES, N_CHARTS, N_BAD_LISTED, N_INDEX_NAME = 8, 6, 50, 160
_ASSETS = ("report.css", "index.js", "feature.js")


def environment() -> Environment:
    """Return a Jinja2 environment that escapes everything and fails on missing names."""
    return Environment(
        autoescape=True,
        loader=PackageLoader("vision_plugin.report", "templates"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_assets(folder: Path) -> None:
    """Copy the style sheet and the scripts."""
    assets = folder / "assets"
    assets.mkdir()
    for name in _ASSETS:
        with (
            files("vision_plugin.report").joinpath("templates", name).open("rb") as source,
            (assets / name).open("wb") as target,
        ):
            shutil.copyfileobj(source, target)


def write_features(folder: Path, pages: Iterator[dict[str, Any]]) -> None:
    """Write ``features/<number>.html`` for each page."""
    template = environment().get_template("feature.html")
    (folder / "features").mkdir()
    for page in pages:
        text = template.render(page, root="../", made_by=MADE_BY)
        path = folder / "features" / f"{page['number']}.html"
        path.write_text(text, encoding="utf-8", newline="\n")


def write_index(folder: Path, content: Content) -> None:
    """Write ``index.html`` and ``data.js``."""
    bad = sorted(content.reader.bad.items())
    charts = _charts(content)
    text = (
        environment()
        .get_template("index.html")
        .render(
            root="",
            made_by=MADE_BY,
            title=content.title,
            facts=content.facts,
            tiles=_tiles(content),
            charts_shown=charts,
            charts_open=len(charts) <= 4,
            n_features=f"{len(content.features):,}",
            n_images=f"{content.n_images:,}",
            n_all=f"{len(content.reader):,}",
            n_bad=f"{len(bad):,}",
            bad=[(clean(content.reader.id(n)), clean(why)) for n, why in bad[:N_BAD_LISTED]],
            has_names=content.names is not None,
            given=content.tokens is None,
            tokens_noun=_tokens_noun(content.tokens),
        )
    )
    (folder / "index.html").write_text(text, encoding="utf-8", newline="\n")
    (folder / "data.js").write_text(data_script(content), encoding="ascii", newline="\n")


def data_script(content: Content) -> str:
    """Return the rows of the index as a script that assigns one constant.

    It is a script because pages opened from a file may not fetch one another.
    """
    chosen = np.array(content.features)
    columns = _columns(content)
    data = {
        "schema": 1,
        "suffix": content.writer.suffix,
        "sort": columns[0]["key"],
        "columns": [
            {key: column[key] for key in ("key", "title", "kind", "note")} for column in columns
        ],
        "ids": content.features,
        "names": None
        if content.names is None
        else [content.names[latent][:N_INDEX_NAME] for latent in content.features],
        "values": [[plain(float(v)) for v in column["values"][chosen]] for column in columns],
        "images": [content.top_images(row, N_INDEX_IMAGES) for row in range(len(content.features))],
    }
    return f'"use strict";\nconst REPORT = {_script_json(data)};\n'


def _script_json(data: Any) -> str:
    """Return JSON in ASCII without the characters that could end a script or start markup."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _columns(content: Content) -> list[dict[str, Any]]:
    """Return the sortable numbers of the index, scores first."""
    summary = content.summary
    columns = [
        {"key": f"score{place}", "title": name, "kind": "number", "note": "", "values": values}
        for place, (name, values) in enumerate(content.scores.items())
    ]
    columns.append(
        {
            "key": "frequency",
            "title": "Images",
            "kind": "share",
            "note": "Share of images on which the feature fires",
            "values": summary.frequency.numpy(),
        }
    )
    if summary.token_frequency is not None:
        columns.append(
            {
                "key": "tokens",
                "title": "Tokens",
                "kind": "share",
                "note": "Share of tokens on which the feature fires",
                "values": summary.token_frequency.numpy(),
            }
        )
    columns.append(
        {
            "key": "max",
            "title": "Max",
            "kind": "number",
            "note": "Largest activation on any image",
            "values": summary.top.values[:, 0].numpy().astype(np.float64),
        }
    )
    return columns


def _tiles(content: Content) -> list[dict[str, str]]:
    chosen = np.array(content.features)
    fired = content.summary.n_fired.numpy()[chosen]
    dead, alive = int((fired == 0).sum()), int((fired > 0).sum())
    tiles = [
        {"label": "Features", "value": f"{len(chosen):,}", "note": _of(content)},
        {"label": "Dead", "value": f"{dead:,}", "note": percent(dead / len(chosen))},
    ]
    if alive:
        share = content.summary.frequency.numpy()[chosen][fired > 0]
        value = percent(float(np.median(share)))
        tiles.append({"label": "Median frequency", "value": value, "note": "of those alive"})
    if content.n_images:
        mean = float(fired.sum()) / content.n_images
        tiles.append({"label": "Active per image", "value": compact(mean), "note": ""})
    for name, values in list(content.scores.items())[:N_CHARTS]:
        defined = values[chosen][np.isfinite(values[chosen])]
        median = compact(float(np.median(defined))) if len(defined) else compact(None)
        tiles.append({"label": f"Median {name}", "value": median, "note": ""})
    return tiles


def _of(content: Content) -> str:
    d_sae = content.summary.d_sae
    return "" if len(content.features) == d_sae else f"of {d_sae:,}"


def _charts(content: Content) -> list[Chart]:
    chosen = np.array(content.features)
    charts = [frequency_chart(content.summary.frequency.numpy()[chosen], content.n_images)]
    charts += [
        score_chart(name, values[chosen])
        for name, values in list(content.scores.items())[: N_CHARTS - 1]
    ]
    return [chart for chart in charts if chart is not None]


def _tokens_noun(tokens: str | None) -> str:
    return {"cls": "CLS token", "patch": "patches", "register": "registers"}.get(
        tokens or "", "tokens"
    )
