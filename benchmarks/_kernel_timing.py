"""Interleaved timing and peak memory for the kernel benchmark. Needs torch alone."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks._live_memory import peak_bytes

Work = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """One variant of one stage.

    Attributes:
        median_ms, min_ms: over the repetitions.
        spread: (third quartile - first) / median.
        peak_mib: memory of tensors at the peak, above what was held before.
        repetitions: how many times it ran after warming up.
    """

    median_ms: float
    min_ms: float
    spread: float
    peak_mib: float
    repetitions: int


def interleaved(variants: dict[str, Work], *, repetitions: int, device: str) -> dict[str, Timing]:
    """Time the variants in turn, round after round, so that a busy spell hits all of them.

    Args:
        variants: what to run, by name.
        repetitions: rounds after one that warms up and measures peak memory.
        device: ``"cpu"`` or ``"cuda"``.
    """
    peaks = {name: _peak_mib(work, device) for name, work in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repetitions):
        for name, work in variants.items():
            times[name].append(_once(work, device))
    return {name: _summary(ms, peaks[name]) for name, ms in times.items()}


def _summary(ms: list[float], peak: float) -> Timing:
    median = statistics.median(ms)
    quartiles = statistics.quantiles(ms, n=4) if len(ms) > 1 else [median] * 3
    return Timing(median, min(ms), (quartiles[2] - quartiles[0]) / median, peak, len(ms))


def _once(work: Work, device: str) -> float:
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _peak_mib(work: Work, device: str) -> float:
    work()  # the first run may compile and fill caches
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return peak_bytes(work) / 2**20


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
