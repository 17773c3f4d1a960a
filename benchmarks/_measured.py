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
    rate = found["stages"]["decode, uniform"]["sparse kernel"]["GBps"]
    copy = found["ceiling"]["copy_GBps"]
    what = "bytes that decode reads and writes in a second, beside those of a plain copy"
    yield what, f"{rate:.0f} GB, a copy {copy:.0f} GB: memory is the limit", ""
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
        slower = reading["times_raw_read_into_fresh_memory"]
        yield f"{name}: time over such a read into fresh memory", f"{slower:.1f} times", ""
        slower = reading["times_raw_read_then_one_gather"]
        yield f"{name}: time over such a read and one gather", f"{slower:.1f} times", ""
        theirs = reading["saelens_seconds_over_ours"]
        yield f"{name}: SAELens's cached activations take", f"{theirs:.0f} times as long", ""
    if "memory" in found:
        ratio = found["memory"]["ratio_of_peak_anonymous"]
        yield "peak memory at 100,000 images / at 10,000", f"{ratio:.2f}", "1.10"
        ratio = found["memory"]["ratio_of_peak_rss"]
        yield "the same with the mapped image table counted in", f"{ratio:.2f}", ""


def _metrics(found: Any) -> Iterator[Row]:
    for row in found["rows"]:
        what = f"{row['what']} ({row['size']})"
        if "visaebench_seconds" in row:
            theirs = row["visaebench_seconds"]
            yield what, f"{row['seconds']:.2f} s, visaebench {theirs:.2f} s", ""
        elif "times_faster" in row:
            aim = row.get("target_times_faster")
            slower = f"{row['times_faster']:,.0f} times the one pass, extrapolated"
            yield what, slower, "" if aim is None else f"{aim:,} times"
        elif "target_seconds" in row:
            cost, aim = f"{row['seconds']:.1f} s", f"{row['target_seconds']:g} s"
            if "target_peak_bytes" in row:
                cost += f", {row['peak_bytes'] / 1e9:.2f} GB"
                aim += f", {row['target_peak_bytes'] / 1e9:g} GB"
            yield what, cost, aim
        elif "slope" in row:
            yield what, f"slope {row['slope']:.2f} in the logarithms", "1"


def _steerability(found: Any) -> Iterator[Row]:
    last = found["last_layer"]
    what = f"last layer, {last['n_latents']:,} latents, against a full forward per latent"
    yield what, f"{last['speedup']:,.0f} times faster", f"{last['target_speedup']} times"
    for row in found["middle_layers"]:
        left = row["share_of_layers_that_remain"]
        what = f"layer {row['layer']} of 12: share of a full forward, where {left:.2f} remains"
        fixed = sum(row["fixed_share_of_full_forward"].values())
        measured = f"{row['share_of_time']:.3f}, of which editing and concepts {fixed:.3f}"
        yield what, measured, f"{left * row['target_time_over_share']:.3f}"
    adaptive = found["adaptive"]
    for row in adaptive["thresholds"]:
        what = (
            f"adaptive mode, layer {adaptive['layer']} of {adaptive['n_layers']}, threshold "
            f"{row['threshold']:.3f} ({row['share_steerable']:.0%} of latents above it)"
        )
        missed = f"{row['missed']} of {row['n_steerable'] * row['orders']} missed"
        yield what, f"{row['speedup']:.1f} times faster, {missed}", "5 times, below 1%"


def _evaluation(found: Any) -> Iterator[Row]:
    setting, over = found["setting"], found["dense_over_sparse"]
    what = f"scoring {setting['d_sae']:,} latents, dense against sparse"
    yield f"{what}: time", f"{over['time']:.1f} times", "more than 1"
    yield f"{what}: peak memory", f"{over['peak']:.1f} times", "more than 1"


SOURCES = {
    "kernel-cpu-cpu.json": ("python benchmarks/kernel.py --device cpu", _kernel),
    "evaluation.json": ("python -m benchmarks.evaluation", _evaluation),
    "harvest.json": ("python -m benchmarks.harvest", _harvest),
    "extraction.json": ("python -m benchmarks.extraction", _extraction),
    "metrics.json": ("python -m benchmarks.metrics", _metrics),
    "steerability.json": ("python -m benchmarks.steerability", _steerability),
}
