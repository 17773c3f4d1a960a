"""Figures of a task: methods beside each other, and what validation saw of each size and layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vision_plugin.tasks._row import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas


def plots(rows: Sequence[Row], search: Sequence[Mapping[str, Any]]) -> dict[str, Canvas]:
    """Return the figures by name."""
    return {"methods": _methods(rows), "search": _search(search)}


def _methods(rows: Sequence[Row]) -> Canvas:
    groups = list(dict.fromkeys((row.kind, row.split) for row in rows))
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(4.2 * max(1, len(groups)), 4.0), layout="constrained")
    for place, (kind, split) in enumerate(groups):
        axes = canvas.add_subplot(1, len(groups), place + 1)
        chosen = [row for row in rows if (row.kind, row.split) == (kind, split)]
        names = [row.method for row in chosen]
        for figure, colour in (("fooled", "#c0392b"), ("clean_accuracy", "#2c7fb8")):
            found = [row.figures[figure] for row in chosen if figure in row.figures]
            if not found:
                continue
            low = [f.value - f.low for f in found]
            high = [f.high - f.value for f in found]
            axes.errorbar(
                [f.value for f in found], range(len(found)),
                xerr=[[max(0.0, v) for v in low], [max(0.0, v) for v in high]],
                fmt="o", color=colour, markersize=4, label=figure.replace("_", " "),
            )  # fmt: skip
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(-0.02, 1.02)
        axes.set_title(f"{kind}, {split.replace('_', ' ')}", fontsize=10)
        if place == 0:
            axes.legend(fontsize=8)
    return canvas


def _search(search: Sequence[Mapping[str, Any]]) -> Canvas:
    kinds = list(dict.fromkeys(entry["kind"] for entry in search))
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(4.6 * max(1, len(kinds)), 3.6), layout="constrained")
    for place, kind in enumerate(kinds):
        axes = canvas.add_subplot(1, len(kinds), place + 1)
        lines: dict[str, list[tuple[int, float]]] = {}
        for entry in search:
            if entry["kind"] == kind and entry["method"] == "sae":
                name = f"layer {entry['layer']}: {entry['how']}"
                lines.setdefault(name, []).append((entry["size"], entry["accuracy"]))
        for name, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=name)
        axes.set_xscale("symlog")
        axes.set_xlabel("latents")
        axes.set_ylabel("accuracy on attacked images, validation")
        axes.set_title(kind, fontsize=10)
        axes.legend(fontsize=7)
    return canvas
