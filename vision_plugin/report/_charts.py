"""Histograms as bars that a template can draw, without a drawing library or scripts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from vision_plugin.report._numbers import compact
from vision_plugin.report._statistics import BINS_PER_OCTAVE, LOWEST_OCTAVE

WIDTH, HEIGHT = 360, 96
N_BINS = 30


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


def frequency_chart(frequency: Float[np.ndarray, " n"], n_images: int) -> Chart | None:
    """Return the histogram of log10 firing frequency over the latents that fire."""
    alive = frequency[frequency > 0]
    if len(alive) == 0:
        return None
    low = math.log10(1 / max(1, n_images))
    return _chart("Firing frequency (log scale)", np.log10(alive), low, 0.0, power=True)


def score_chart(title: str, values: Float[np.ndarray, " n"]) -> Chart | None:
    """Return the histogram of a score over the latents that have one."""
    defined = values[np.isfinite(values)]
    if len(defined) == 0:
        return None
    return _chart(title, defined, float(defined.min()), float(defined.max()))


def _chart(
    title: str, values: Float[np.ndarray, " n"], low: float, high: float, *, power: bool = False
) -> Chart:
    if high <= low:
        low, high = low - 0.5, high + 0.5
    counts, cuts = np.histogram(np.clip(values, low, high), bins=N_BINS, range=(low, high))
    edges = [10**cut if power else cut for cut in cuts.tolist()]
    median = float(np.median(values))
    middle = 10**median if power else median
    return Chart(
        title=title,
        bars=_bars(counts.tolist(), edges, "feature"),
        ticks=_ticks(edges),
        description=f"{title} of {len(values):,} features, median {compact(middle)}",
        marker=round((median - low) / (high - low) * WIDTH, 2),
        marker_note=f"median {compact(middle)}",
    )


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
