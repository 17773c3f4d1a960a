"""An evaluation's JSON as score columns and as a table; training and layers as charts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from vision_plugin._private import Places, without_paths
from vision_plugin.evaluation import DICTIONARY_TITLES, summary_by_metric
from vision_plugin.report._charts import LineChart, line_chart
from vision_plugin.report._inputs import clean
from vision_plugin.report._numbers import compact

N_CURVES = 24


def scores_of(evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the scores per latent of an evaluation's JSON, by column name.

    Of monosemanticity there are ``z``, the lower end of its interval where it has one, and the
    score that chance gives as well.
    """
    found: dict[str, Any] = {}
    places = _places(evaluation or {})
    for metric, by_dictionary in (evaluation or {}).get("per_latent", {}).items():
        of_sae = by_dictionary.get("sae") or {}
        if not of_sae:
            continue
        column = places.name_of(metric)
        found[column] = of_sae["score"]
        if metric.partition("@")[0] == "monosemanticity":
            for extra in ("z", "low"):
                if of_sae.get(extra):
                    found[f"{column} {extra}"] = of_sae[extra]
    return found


def chance_of(evaluation: Mapping[str, Any] | None) -> float:
    """Return the monosemanticity of a latent that fires at random; NaN where it is not known."""
    found = (evaluation or {}).get("per_latent", {}).get("monosemanticity", {}).get("sae") or {}
    value = found.get("mean_similarity")
    return float(value) if _is_number(value) and value is not None else math.nan


def score_table(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summaries of all metrics, a row for each number and a column per dictionary."""
    dictionaries, by_metric = summary_by_metric(evaluation.get("summary", {}))
    groups, places = [], _places(evaluation)
    for metric, numbers in by_metric.items():
        rows = [
            {
                "name": clean(name.replace("_", " ")),
                "cells": [_cell(of.get(dictionary)) for dictionary in dictionaries],
            }
            for name, of in numbers.items()
        ]
        groups.append({"metric": clean(places.name_of(metric).replace("_", " ")), "rows": rows})
    return {
        "dictionaries": [clean(DICTIONARY_TITLES.get(name, name)) for name in dictionaries],
        "groups": groups,
        "n_images": _count(evaluation.get("n_images")),
        "verdicts": _verdicts(evaluation, places),
        "left_out": [
            (clean(places.score_name(name)), clean(without_paths(str(why))))
            for name, why in (evaluation.get("left_out") or {}).items()
        ],
        "seen_in_training": bool(evaluation.get("seen_in_training")),
        "own_embeddings": evaluation.get("embeddings") == "model",
    }


def _places(evaluation: Mapping[str, Any]) -> Places:
    """Return names of the judges' folders, the same on every page."""
    places = Places()
    for name in (*(evaluation.get("embedders") or ()), *evaluation.get("per_latent", {})):
        places.name_of(name)
    return places


def _verdicts(evaluation: Mapping[str, Any], places: Places) -> list[dict[str, str]]:
    """Return the comparison at equal firing with its interval, by judge."""
    found = []
    for embedder, result in (evaluation.get("equal_firing") or {}).items():
        low, high = result.get("low"), result.get("high")
        own = (evaluation.get("embedders") or {}).get(embedder) == "model"
        found.append(
            {
                "judge": "the model itself" if own else clean(places.name_of(embedder)),
                "difference": _cell(result.get("difference")),
                "interval": "" if low is None or high is None else f"{_cell(low)} to {_cell(high)}",
                "n": _count(result.get("n_latents")),
                "verdict": clean(result.get("verdict") or ""),
            }
        )
    return found


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _cell(value: Any) -> str:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return compact(float(value)) if is_number else compact(None) if value is None else clean(value)


def training_charts(records: Sequence[Mapping[str, Any]]) -> list[LineChart]:
    """Return a line for each number that validation wrote during training.

    Args:
        records: The lines of ``validation.jsonl``, in order.
    """
    rows = [record for record in records if isinstance(record, Mapping)]
    if len(rows) < 2:
        return []
    axis = next((k for k in rows[0] if "step" in k or "token" in k), None)
    x = [float(row.get(axis) or 0) if axis else float(i) for i, row in enumerate(rows)]
    if any(later <= earlier for earlier, later in itertools.pairwise(x)):
        axis, x = None, [float(i) for i in range(len(rows))]
    names = [
        name for name in rows[0] if name != axis and all(_is_number(row.get(name)) for row in rows)
    ]
    return [
        line_chart(
            clean(name.replace("_", " ")),
            x,
            [compact(place) for place in x],
            {clean(name): [_float(row.get(name)) for row in rows]},
            about=f"{clean(name)} over {axis or 'validations'}",
        )
        for name in names[:N_CURVES]
    ]


def layer_charts(study: Mapping[str, Any]) -> list[LineChart]:
    """Return L0 and explained variance over layers, a line for each kind of token.

    Args:
        study: The JSON of a sparsity study.
    """
    saes = [sae for sae in study.get("saes", []) if sae.get("layer") is not None]
    saes.sort(key=lambda sae: sae["layer"])
    kinds = dict.fromkeys(kind["kind"] for sae in saes for kind in sae["kinds"])
    titles = {"l0": "L0 by layer", "explained_variance": "Explained variance by layer"}
    if len(saes) < 2:
        return []
    charts = []
    for key, title in titles.items():
        series = {
            clean(kind): [
                _float(next((k.get(key) for k in sae["kinds"] if k["kind"] == kind), None))
                for sae in saes
            ]
            for kind in kinds
        }
        layers = [float(place) for place in range(len(saes))]
        names = [str(sae["layer"]) for sae in saes]
        charts.append(line_chart(title, layers, names, series, about=f"{title}, by kind of token"))
    return charts


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)
