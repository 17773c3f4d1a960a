"""What the metrics cost: monosemanticity and uniqueness at full size, and VISAEBench beside ours.

    python -m benchmarks.metrics                 # full size, a few minutes on two cores
    python -m benchmarks.metrics --small         # seconds, to see that it works

Each section runs in a process of its own, so that its peak memory is its own. A table goes to the
terminal and JSON to ``benchmarks/results/metrics.json``.
"""

from __future__ import annotations

import functools
import gc
import json
import math
import multiprocessing
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

from benchmarks._machine import machine
from benchmarks._metrics_visaebench import compare
from vision_plugin import metrics

RESULTS = Path(__file__).parent / "results" / "metrics.json"


@dataclass(frozen=True)
class Config:
    """Sizes of the benchmark."""

    n_images: int = 50_000
    """Images."""
    n_features: int = 65_536
    """Latents."""
    k: int = 32
    """Non-zero latents per image."""
    d_embed: int = 512
    """Width of the embeddings."""
    pair_images: int = 64
    """Images for the pairwise loop, which is extrapolated to all of them."""
    repetitions: int = 5
    """Runs of each measurement; medians are reported."""
    threads: int = 2
    """Threads of torch."""
    seed: int = 0
    """Seed of all data."""
    small: bool = False
    """Shrink everything to seconds; writes no file unless --out is given."""
    out: Path | None = None
    """JSON file, by default benchmarks/results/metrics.json."""


Row = dict[str, Any]


def latents_csr(cfg: Config, n_images: int, k: int, *, skewed: bool = False) -> Tensor:
    """Draw CSR latents with ``k`` non-zeros an image, one in each of ``k`` strata of latents."""
    generator = torch.Generator().manual_seed(cfg.seed)
    width = cfg.n_features // k
    drawn = torch.rand(n_images, k, generator=generator)
    inside = ((drawn**3 if skewed else drawn) * width).long().clamp(max=width - 1)
    columns = (inside + torch.arange(k) * width).reshape(-1)
    values = torch.rand(n_images * k, generator=generator) + 0.01
    rows = torch.arange(0, n_images * k + 1, k)
    return torch.sparse_csr_tensor(rows, columns, values, size=(n_images, cfg.n_features))


def embeddings(cfg: Config, n_images: int) -> Tensor:
    """Draw embeddings with a common direction, as image encoders give them."""
    generator = torch.Generator().manual_seed(cfg.seed + 1)
    return torch.randn(n_images, cfg.d_embed, generator=generator) + 0.5


def seconds(function: Callable[[], object], repetitions: int) -> dict[str, float]:
    """Time a function: median, smallest and largest of several runs after one to warm up."""
    (taken,) = interleaved([function], repetitions)
    return {"seconds": statistics.median(taken), "min": min(taken), "max": max(taken)}


def interleaved(functions: Sequence[Callable[[], object]], repetitions: int) -> list[list[float]]:
    """Time functions in turn, each several times after one to warm up."""
    taken: list[list[float]] = [[] for _ in functions]
    for round_number in range(repetitions + 1):
        for function, times in zip(functions, taken, strict=True):
            gc.collect()
            start = time.perf_counter()
            function()
            if round_number:
                times.append(time.perf_counter() - start)
    return taken


def peak_bytes() -> int:
    """Return the largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def streamed(cfg: Config, latents: Tensor, embedded: Tensor, batch: int) -> None:
    """Score in batches of images."""
    metric = metrics.Monosemanticity(n_features=cfg.n_features, d_embed=cfg.d_embed)
    for start in range(0, len(embedded), batch):
        metric.update(latents_rows(latents, start, start + batch), embedded[start : start + batch])
    metric.compute()


def latents_rows(latents: Tensor, start: int, stop: int) -> Tensor:
    """Return a slice of CSR rows."""
    crow = latents.crow_indices()[start : stop + 1]
    inside = slice(int(crow[0]), int(crow[-1]))
    return torch.sparse_csr_tensor(
        crow - crow[0],
        latents.col_indices()[inside],
        latents.values()[inside],
        size=(len(crow) - 1, latents.shape[1]),
    )


def measure_monosemanticity(cfg: Config, batch: int | None = None) -> list[Row]:
    """One pass over everything, whole or in batches, in time and memory."""
    before = peak_bytes()
    latents, embedded = latents_csr(cfg, cfg.n_images, cfg.k), embeddings(cfg, cfg.n_images)
    batch = batch or cfg.n_images
    timed = seconds(lambda: streamed(cfg, latents, embedded, batch), cfg.repetitions)
    return [
        {
            "what": f"monosemanticity, {batch:,} images an update",
            "size": f"N={cfg.n_images:,} K={cfg.n_features:,} k={cfg.k} d={cfg.d_embed}",
            **timed,
            "peak_bytes": peak_bytes(),
            "imports_bytes": before,
            "target_seconds": 5,
            "target_peak_bytes": 2e9,
        }
    ]


def measure_slopes(cfg: Config) -> list[Row]:
    """How the time grows with images and with non-zeros, as exponents of a power law.

    Time that the varied amount has no part in is measured too and taken off: for images, that of
    two images (making and reading the states); for non-zeros, that of as many images without any
    (their norms and the Gram matrix of their embeddings). Images come in updates of one size, as
    they do when there are many.
    """
    shares = (1, 2, 4, 8)
    batch = cfg.n_images // 8
    latents, embedded = latents_csr(cfg, cfg.n_images, cfg.k), embeddings(cfg, cfg.n_images)
    by_images = [
        (latents_rows(latents, 0, n), embedded[:n], batch)
        for n in (2, *(batch * s for s in shares))
    ]
    by_non_zeros = [(without_entries(latents), embedded, cfg.n_images)]
    by_non_zeros += [
        (latents_csr(cfg, cfg.n_images, cfg.k * s // 8), embedded, cfg.n_images) for s in shares
    ]
    rows = []
    for name, cases in (("images", by_images), ("non-zeros", by_non_zeros)):
        runs = [functools.partial(streamed, cfg, *case) for case in cases]
        # The least of many runs: what another process takes would not cancel in a difference.
        times = [min(found) for found in interleaved(runs, 2 * cfg.repetitions)]
        fixed, *all_seconds = times
        amounts = [case[0].values().numel() for case in cases[1:]]
        beyond = [max(time - fixed, 1e-9) for time in all_seconds]
        rows.append(
            {
                "what": f"slope of log time over log {name}, beyond fixed costs (1 is linear)",
                "size": ", ".join(f"{amount:,}" for amount in amounts) + " non-zeros",
                "slope": slope(amounts, beyond),
                "all_seconds": all_seconds,
                "fixed_seconds": fixed,
                "nanoseconds_per_non_zero": 1e9 * beyond[-1] / amounts[-1],
            }
        )
    return rows


def without_entries(latents: Tensor) -> Tensor:
    """Return CSR latents of the same shape in which nothing fires."""
    none = latents.col_indices()[:0]
    crow = torch.zeros_like(latents.crow_indices())
    return torch.sparse_csr_tensor(crow, none, latents.values()[:0], size=latents.shape)


def slope(amounts: list[int], times: list[float]) -> float:
    """Fit a line to the logarithms."""
    x, y = [math.log(amount) for amount in amounts], [math.log(value) for value in times]
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def pair_loop(dense: Tensor, unit: Tensor) -> Tensor:
    """The pairwise algorithm: every pair of images once, vectorised over latents, float32."""
    low = dense.amin(0)
    weights = (dense - low) / (dense.amax(0) - low).clamp(min=1e-12)
    similarity = unit @ unit.T
    numerator, denominator = torch.zeros_like(low), torch.zeros_like(low)
    for first in range(len(dense)):
        for second in range(first + 1, len(dense)):
            product = weights[first] * weights[second]
            numerator += product * similarity[first, second]
            denominator += product
    return numerator / denominator


def pair_matrix(dense: Tensor, unit: Tensor) -> Tensor:
    """The same sums as matrix products, the strongest pairwise form: sum of w * (S w)."""
    low = dense.amin(0)
    weights = (dense - low) / (dense.amax(0) - low).clamp(min=1e-12)
    squares = (weights * weights).sum(0)
    numerator = (weights * (unit @ unit.T @ weights)).sum(0) - squares
    return numerator / (weights.sum(0) ** 2 - squares)


def measure_pairs(cfg: Config) -> list[Row]:
    """Time the pairwise algorithms on few images and extrapolate with the number of pairs."""
    rows = []
    for name, function, n in (
        ("pairwise loop", pair_loop, cfg.pair_images),
        ("pairwise matrix products", pair_matrix, 16 * cfg.pair_images),
    ):
        n = min(n, cfg.n_images)
        latents, embedded = latents_csr(cfg, n, cfg.k).to_dense(), embeddings(cfg, n)
        unit = torch.nn.functional.normalize(embedded, dim=1)
        repetitions = min(3, cfg.repetitions)
        timed = seconds(lambda f=function, a=latents, u=unit: f(a, u), repetitions)
        ours = metrics.monosemanticity(latents, embedded).score
        theirs = function(latents, unit).double()
        both = ~ours.isnan() & ~theirs.isnan()
        growth = cfg.n_images * (cfg.n_images - 1) / (n * (n - 1))
        rows.append(
            {
                "what": f"{name}, N={n:,}",
                "size": f"K={cfg.n_features:,} d={cfg.d_embed}",
                **timed,
                "extrapolated_seconds": timed["seconds"] * growth,
                **({"target_times_faster": 10_000} if function is pair_loop else {}),
                "largest_difference": float((ours - theirs)[both].abs().max()),
            }
        )
    return rows


def measure_uniqueness(cfg: Config) -> list[Row]:
    """All pairs of latents, images used evenly and unevenly."""
    generator = torch.Generator().manual_seed(cfg.seed)
    rows = []
    for name, power in (("even", 1), ("uneven", 2)):
        drawn = torch.rand(cfg.n_features, 16, generator=generator) ** power
        top = (drawn * cfg.n_images).long()
        result = metrics.uniqueness(top)
        rows.append(
            {
                "what": f"uniqueness, images used {name}ly",
                "size": f"K={cfg.n_features:,} latents, 16 of {cfg.n_images:,} images each",
                **seconds(lambda t=top: metrics.uniqueness(t), min(3, cfg.repetitions)),
                "peak_bytes": peak_bytes(),
                "share_above_0": result.share_above[0],
                "target_seconds": 30,
            }
        )
    return rows


def measure_visaebench(cfg: Config) -> list[Row]:
    """The benchmark's seven metrics: its time and ours."""
    repetitions = min(3, cfg.repetitions)
    return compare(small=cfg.small, seed=cfg.seed, repetitions=repetitions, seconds=seconds)


SECTIONS: tuple[Callable[[Config], list[Row]], ...] = (
    measure_monosemanticity,
    functools.partial(measure_monosemanticity, batch=10_000),
    functools.partial(measure_monosemanticity, batch=2_048),
    functools.partial(measure_monosemanticity, batch=256),
    measure_slopes,
    measure_pairs,
    measure_uniqueness,
    measure_visaebench,
)


def title(section: Callable[[Config], list[Row]]) -> str:
    """Name a section, with what it was given beside the settings."""
    if isinstance(section, functools.partial):
        given = ", ".join(f"{name}={value}" for name, value in section.keywords.items())
        return f"{section.func.__name__} ({given})"
    return section.__name__


def start_process(threads: int) -> None:
    """Prepare a process for a section."""
    warnings.filterwarnings("ignore", message="Sparse (CSR tensor support|invariant checks)")
    torch.set_num_threads(threads)


def table(rows: list[Row]) -> Table:
    """Lay the rows out for a terminal."""
    shown = Table("what", "size", "median", "spread", "peak memory", "and", show_lines=True)
    for row in rows:
        spread = f"{row['min']:.2f} to {row['max']:.2f} s" if "min" in row else ""
        rest = {
            "extrapolated_seconds": "whole data: {:,.0f} s",
            "times_faster": "{:,.0f} times slower than one pass",
            "largest_difference": "differs by {:.1e}",
            "visaebench_seconds": "visaebench {:.2f} s",
            "difference": "differs by {:.1e}",
            "slope": "slope {:.2f}",
            "fixed_seconds": "{:.2f} s fixed",
            "nanoseconds_per_non_zero": "{:.0f} ns per non-zero",
            "target_seconds": "to be below {:g} s",
            "target_peak_bytes": "and {:.0e} bytes",
            "target_times_faster": "to be {:,} times at least",
        }
        notes = [text.format(row[name]) for name, text in rest.items() if name in row]
        shown.add_row(
            row["what"],
            row["size"],
            f"{row['seconds']:.2f} s" if "seconds" in row else "",
            spread,
            f"{row['peak_bytes'] / 1e9:.2f} GB" if "peak_bytes" in row else "",
            "; ".join(notes),
        )
    return shown


def main(cfg: Config) -> None:
    """Run every section, print the table and write the JSON."""
    if cfg.small:
        cfg = Config(1_000, 2_048, 16, 64, 32, 2, cfg.threads, cfg.seed, True, cfg.out)
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=160)
    rows: list[Row] = []
    for section in SECTIONS:
        console.log(title(section))
        with ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), start_process, (cfg.threads,)
        ) as pool:
            rows += pool.submit(section, cfg).result()
    one_pass = next(row["seconds"] for row in rows if row["what"].startswith("monosemanticity"))
    for row in rows:
        if "extrapolated_seconds" in row:
            row["times_faster"] = row["extrapolated_seconds"] / one_pass
    console.print(table(rows))
    out = cfg.out or (None if cfg.small else RESULTS)
    if out is not None:
        packages = ("torchmetrics", "numpy", "scipy", "scikit-learn", "visaebench")
        environment = machine(*packages) | {"threads": cfg.threads}
        settings = {name: value for name, value in asdict(cfg).items() if name != "out"}
        content = {"environment": environment, "settings": settings, "rows": rows}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        console.log(f"wrote {out.name}")


if __name__ == "__main__":
    main(tyro.cli(Config))
