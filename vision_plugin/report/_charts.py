"""Charts of bars and lines that a template can draw, without a drawing library or scripts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from vision_plugin.report._inputs import clean
from vision_plugin.report._numbers import compact
from vision_plugin.report._statistics import BINS_PER_OCTAVE, LOWEST_OCTAVE
from vision_plugin.report._steering import Curve

WIDTH, HEIGHT = 360, 96


@dataclass(frozen=True)
class Bar:
    """One bar: its place and size in the drawing's units, and the note shown on hovering."""

    x: float
    y: float
    width: float
    height: float
    note: str


@dataclass(frozen=True)
class Tick:
    """A label below the bars."""

    x: float
    text: str
    anchor: str


@dataclass(frozen=True)
class Chart:
    """A histogram of ``width`` x ``height`` units, with a sentence that describes it."""

    title: str
    bars: tuple[Bar, ...]
    ticks: tuple[Tick, ...]
    description: str
    marker: float | None = None
    marker_note: str = ""
    width: int = WIDTH
    height: int = HEIGHT


def activation_chart(
    counts: Int[np.ndarray, " n_bins"], *, lowest_shown: float | None
) -> Chart | None:
    """Return the histogram of a latent's positive values in half octaves; None if it never fires.

    Args:
        counts: Number of images per half octave.
        lowest_shown: Activation of the last of the top images, which the chart marks.
    """
    filled = np.flatnonzero(counts)
    if len(filled) == 0:
        return None
    first, last = int(filled[0]), int(filled[-1]) + 1
    edges = [2 ** (LOWEST_OCTAVE + b / BINS_PER_OCTAVE) for b in range(first, last + 1)]
    marker, note = None, ""
    if lowest_shown is not None and lowest_shown > 0:
        place = (math.log2(lowest_shown) - LOWEST_OCTAVE) * BINS_PER_OCTAVE - first
        marker = round(min(max(place / (last - first), 0.0), 1.0) * WIDTH, 2)
        note = f"the top images shown are at {compact(lowest_shown)} and above"
    return Chart(
        title="Activation on images",
        bars=_bars(counts[first:last].tolist(), edges, "image"),
        ticks=_ticks(edges),
        description=(
            f"Fires on {int(counts.sum()):,} images with values from {compact(edges[0])} to "
            f"{compact(edges[-1])}, on a logarithmic axis"
        ),
        marker=marker,
        marker_note=note,
    )


@dataclass(frozen=True)
class Line:
    """A line through points, as an SVG path's ``points``."""

    title: str
    points: str
    last: str
    """Value at the right end."""
    colour: int


@dataclass(frozen=True)
class LineChart:
    """Lines over one axis, ``width`` x ``height`` units, with a sentence that describes them."""

    title: str
    lines: tuple[Line, ...]
    ticks: tuple[Tick, ...]
    description: str
    low: str
    high: str
    width: int = WIDTH
    height: int = HEIGHT


def curves_chart(curve: Curve) -> LineChart:
    """Return the concepts' mean probabilities over the values that a latent is held at."""
    series = {clean(c): list(s) for c, s in zip(curve.concepts, curve.shares, strict=True)}
    ends = f"{compact(curve.strengths[0])} to {compact(curve.strengths[-1])}"
    return line_chart(
        "Mean probability over strengths",
        [float(place) for place in range(len(curve.strengths))],
        [compact(s) for s in curve.strengths],
        series,
        low=0.0,
        high=1.0,
        about=f"Mean probability of {', '.join(series)} with the feature held at {ends}",
    )


def line_chart(
    title: str,
    x: Sequence[float],
    labels: Sequence[str],
    series: Mapping[str, Sequence[float]],
    *,
    about: str,
    low: float | None = None,
    high: float | None = None,
) -> LineChart:
    """Return lines through points of the same places.

    Args:
        title: Heading.
        x: Places, ascending.
        labels: Text of each place.
        series: Values by the name of a line; those that are not finite are left out.
        about: A sentence that describes the chart.
        low: Value at the bottom; by default the smallest.
        high: Value at the top; by default the largest.
    """
    values = [v for line in series.values() for v in line if math.isfinite(v)]
    low = min(values, default=0.0) if low is None else low
    high = max(values, default=1.0) if high is None else high
    span, width = (high - low) or 1.0, (x[-1] - x[0]) or 1.0
    lines = []
    for colour, (name, line) in enumerate(series.items()):
        points = [
            f"{(place - x[0]) / width * WIDTH:.1f},{(1 - (value - low) / span) * HEIGHT:.1f}"
            for place, value in zip(x, line, strict=True)
            if math.isfinite(value)
        ]
        last = next((v for v in reversed(list(line)) if math.isfinite(v)), math.nan)
        lines.append(Line(name, " ".join(points), compact(last), colour))
    n = len(labels)
    shown = range(n) if n <= 6 else (0, n // 2, n - 1)
    ticks = tuple(
        Tick(
            round((x[i] - x[0]) / width * WIDTH, 1),
            labels[i],
            "start" if i == 0 else "end" if i == n - 1 else "middle",
        )
        for i in shown
    )
    return LineChart(title, tuple(lines), ticks, about, compact(low), compact(high))


def _bars(counts: Sequence[int], edges: Sequence[float], noun: str) -> tuple[Bar, ...]:
    step, top = WIDTH / len(counts), max(counts)
    bars = []
    for place, count in enumerate(counts):
        if count == 0:
            continue
        # Keep a bar of one image among thousands visible.
        height = max(1.5, count / top * HEIGHT)
        span = f"{compact(edges[place])} to {compact(edges[place + 1])}"
        plural = noun if count == 1 else noun + "s"
        bars.append(
            Bar(
                x=round(place * step + 0.5, 2),
                y=round(HEIGHT - height, 2),
                width=round(min(max(step - 1, 0.5), WIDTH / 6), 2),
                height=round(height, 2),
                note=f"{span}: {count:,} {plural}",
            )
        )
    return tuple(bars)


def _ticks(edges: Sequence[float]) -> tuple[Tick, ...]:
    middle = len(edges) // 2
    ticks = [Tick(0.0, compact(edges[0]), "start"), Tick(float(WIDTH), compact(edges[-1]), "end")]
    if len(edges) > 4:
        x = round(middle / (len(edges) - 1) * WIDTH, 2)
        ticks.insert(1, Tick(x, compact(edges[middle]), "middle"))
    return tuple(ticks)
