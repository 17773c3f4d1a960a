"""Figures of a task: methods beside each other, and what validation saw of each size and layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vision_plugin.tasks._row import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

CURVES = 8
"""Most curves over numbers of latents that are drawn, the best ones."""


def plots(
    rows: Sequence[Row],
    search: Sequence[Mapping[str, Any]],
    *,
    drawn: tuple[str, str],
    raised: str,
) -> dict[str, Canvas]:
    """Return the figures by name.

    Args:
        rows: Rows of the table.
        search: What validation saw of each candidate.
        drawn: Names of the two figures to draw of each method.
        raised: Name of the figure that validation chose by.
    """
    return {"methods": _methods(rows, drawn), "search": _search(search, raised)}


def _methods(rows: Sequence[Row], drawn: tuple[str, str]) -> Canvas:
    groups = list(dict.fromkeys((row.kind, row.split) for row in rows))
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(4.2 * max(1, len(groups)), 4.0), layout="constrained")
    for place, (kind, split) in enumerate(groups):
        axes = canvas.add_subplot(1, len(groups), place + 1)
        chosen = [row for row in rows if (row.kind, row.split) == (kind, split)]
        names = [row.method for row in chosen]
        for figure, colour in zip(drawn, ("#c0392b", "#2c7fb8"), strict=True):
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


def _search(search: Sequence[Mapping[str, Any]], raised: str) -> Canvas:
    """Return curves over numbers of latents above maps over layers, a column for each kind."""
    kinds = list(dict.fromkeys(entry["kind"] for entry in search))
    from matplotlib.figure import Figure as Canvas

    n = max(1, len(kinds))
    canvas = Canvas(figsize=(4.6 * n, 7.0), layout="constrained")
    for place, kind in enumerate(kinds):
        entries = [entry for entry in search if entry["kind"] == kind]
        curves = canvas.add_subplot(2, n, place + 1)
        lines: dict[str, dict[int, float]] = {}
        for entry in entries:
            if entry["method"] == "sae":
                points = lines.setdefault(f"layer {entry['layer']}: {entry['how']}", {})
                points[entry["size"]] = max(entry[raised], points.get(entry["size"], 0.0))
        best = sorted(lines, key=lambda name: -max(lines[name].values()))[:CURVES]
        for name in (name for name in lines if name in best):
            curves.plot(*zip(*sorted(lines[name].items()), strict=True), marker="o", markersize=3,
                        label=name)  # fmt: skip
        curves.set_xscale("symlog")
        curves.set_xlabel("latents")
        curves.set_ylabel(f"{raised.replace('_', ' ')}, validation")
        curves.set_title(kind, fontsize=10)
        if best:
            curves.legend(fontsize=7)
        _map(canvas.add_subplot(2, n, n + place + 1), entries, raised)
    return canvas


def _map(axes: Any, entries: Sequence[Mapping[str, Any]], raised: str) -> None:
    """Draw the best that validation saw of each method at each layer."""
    entries = [entry for entry in entries if entry["layer"] is not None]
    methods = list(dict.fromkeys(entry["method"] for entry in entries))
    layers = sorted({entry["layer"] for entry in entries})
    best: dict[tuple[int, str], float] = {}
    for entry in entries:
        at = entry["layer"], entry["method"]
        best[at] = max(entry[raised], best.get(at, 0.0))
    nothing = float("nan")
    values = [[best.get((layer, method), nothing) for layer in layers] for method in methods]
    if not values:
        axes.set_axis_off()
        return
    axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for row, column in ((r, c) for r in range(len(methods)) for c in range(len(layers))):
        if (layers[column], methods[row]) in best:
            text = f"{values[row][column]:.2f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color="#c0392b")
    axes.set_xticks(range(len(layers)), layers)
    axes.set_yticks(range(len(methods)), methods, fontsize=8)
    axes.set_xlabel("layer")
    axes.set_title(f"best {raised.replace('_', ' ')}, validation", fontsize=10)
