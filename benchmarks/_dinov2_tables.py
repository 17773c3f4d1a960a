"""Tables and paragraphs of the page of ``dinov2.py``."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from typing import Any

Cell = dict[str, Any]
SAES = ("BatchTopK", "Matryoshka")
CONTROLS = ("neurons", "PCA", "random")
WIDTH = 98
"""Characters of a line."""


def wrapped(block: str) -> str:
    """Return paragraphs and lists on lines that fit a page; tables and headings as they are."""
    if block.startswith(("|", "#", "!")):
        return block
    items: list[str] = []
    for line in block.splitlines():
        if items and not line.startswith("- "):
            items[-1] += f" {line.strip()}"
        else:
            items.append(line)
    return "\n".join(
        textwrap.fill(item, WIDTH, subsequent_indent="  " * item.startswith("- ")) for item in items
    )


def table(head: list[str], rows: list[list[str]]) -> str:
    """Return a table as Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    """Return a number, or a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _widths(cells: list[Cell]) -> list[int]:
    return sorted({cell["width"] for cell in cells})


def by_width(cells: list[Cell], show: Callable[[Cell], str]) -> str:
    """Return a table with a row for each layer and dictionary, and a column for each width."""
    widths = _widths(cells)
    rows = []
    for layer in sorted({cell["layer"] for cell in cells}):
        for name in (*SAES, *CONTROLS):
            own = {c["width"]: c for c in cells if (c["layer"], c["dictionary"]) == (layer, name)}
            if own:
                shown = [show(own[width]) if width in own else "" for width in widths]
                rows.append([str(layer), name, *shown])
    return table(["layer", "dictionary", *(f"x{width}" for width in widths)], rows)


def rings_of(grid: list[list[float]]) -> list[str]:
    """Return the mean L0 of the outermost ring, the one half way in, and the four in the middle."""
    side = len(grid)
    rings: dict[int, list[float]] = {}
    for row, line in enumerate(grid):
        for column, value in enumerate(line):
            ring = min(row, column, side - 1 - row, side - 1 - column)
            rings.setdefault(ring, []).append(value)
    chosen = (0, max(rings) // 2, max(rings))
    return [number(sum(rings[ring]) / len(rings[ring]), 1) for ring in chosen]


def said(verdict: str) -> str:
    """Return a verdict in words."""
    return {"above": "**above** random directions", "below": "**below** them"}.get(verdict, verdict)


def interval(found: dict[str, Any]) -> str:
    """Return a difference with its interval."""
    if found["verdict"] == "not comparable":
        return "not comparable"
    low, high = (number(found[end]) for end in ("low", "high"))
    return f"{found['difference']:+.3f} ({low} to {high})"
