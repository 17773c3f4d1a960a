"""The README's table of measurements, from the result files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = tuple[str, str, str]
"""What was measured, what came out, what was aimed at."""


def measured(results: Path) -> str:
    """Markdown of every result file that is there, a table for each command."""
    parts = []
    for file, (command, rows) in SOURCES.items():
        path = results / file
        if path.is_file():
            lines = [f"| {what} | {found} | {aim} |" for what, found, aim in rows(_read(path))]
            parts.append(
                "\n".join([f"`{command}`", "", "| | measured | aim |", "|---|---|---|", *lines])
            )
    return "\n\n".join(parts)


def _read(path: Path) -> Any:
    return json.loads(path.read_text())


def _kernel(found: Any) -> Iterator[Row]:
    aims = {
        "decode, uniform: SAELens dense / sparse kernel": "50 times",
        "decode, zipf: SAELens dense / sparse kernel": "50 times",
        "SAELens forward+backward, 0% dead: SAELens dense / drop-in class": "3.5 times",
        "SAELens trainer step, 0% dead: SAELens dense / drop-in class": "3.5 times",
        "SAELens trainer step, 20% dead: SAELens dense / drop-in class": "3.5 times",
    }
    for name, aim in aims.items():
        stage = name.partition(": ")[0].removeprefix("SAELens ")
        yield f"{stage}, SAELens dense against sparse", f"{found['ratios'][name]:.1f} times", aim
    step = found["stages"]["SAELens trainer step, 0% dead"]
    ours, dense = step["drop-in class"]["peak_mib"], step["SAELens dense"]["peak_mib"]
    yield "peak memory of a trainer step", f"{ours:.0f} of {dense:.0f} MiB", "no more than dense"
    shape = found["shape"]
    size = ", ".join(f"{name} {value}" for name, value in shape.items())
    yield f"({size}; {found['environment']['device']}, 2 threads)", "", ""


def _harvest(found: Any) -> Iterator[Row]:
    over = found["over_native"]
    yield "harvest of the last layer / native forward", f"{over['harvest last layer']:.3f}", "1.05"
    yield "harvest of every layer / native forward", f"{over['harvest every layer']:.3f}", ""
    gap = max(abs(row["measured"] - row["expected"]) for row in found["layer_share"])
    yield "cost of layer L of N less L/N, largest", f"{gap:.3f}", "0"
    yield "bridge / native forward", f"{over['bridge']:.3f}", ""
    yield "bridge caching everything / native forward", f"{over['bridge cache everything']:.3f}", ""


def _extraction(found: Any) -> Iterator[Row]:
    for name, model in found["models"].items():
        share = model["extraction"]["share_in_model"]
        yield f"{name}: share of extraction spent in the model", f"{share:.0%}", "85%"
        reading = model["reading"]
        faster = reading["times_as_fast_as_recomputing"]
        yield f"{name}: shuffled batches, against recomputing", f"{faster:.0f} times", "5 times"
        slower = reading["times_raw_sequential_read"]
        raw = "a raw read of the same bytes from the page cache"
        yield f"{name}: time over {raw}", f"{slower:.1f} times", "2 times"
        theirs = reading["saelens_seconds_over_ours"]
        yield f"{name}: SAELens's cached activations take", f"{theirs:.0f} times as long", ""
    if "memory" in found:
        ratio = found["memory"]["ratio_of_peak_anonymous"]
        yield "peak memory at 100,000 pictures / at 10,000", f"{ratio:.2f}", "1.10"
        ratio = found["memory"]["ratio_of_peak_rss"]
        yield "the same with the mapped picture table counted in", f"{ratio:.2f}", ""


SOURCES = {
    "kernel-cpu-cpu.json": ("python benchmarks/kernel.py --device cpu", _kernel),
    "harvest.json": ("python -m benchmarks.harvest", _harvest),
    "extraction.json": ("python -m benchmarks.extraction", _extraction),
}
