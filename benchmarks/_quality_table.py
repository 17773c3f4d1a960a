"""The table and the plot of the quality benchmark, from its rows."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

COLUMNS = {
    "alive": "alive",
    "dense": "dense",
    "l0": "L0",
    "explained_variance": "explained variance",
    "explained_variance_at_k": "the same at L0 = k",
    "probing on 20": "probing",
    "stability": "stability",
    "cpu_seconds": "CPU seconds",
}
"""Columns of every table, and their headings."""
_DIGITS = {"alive": 0, "dense": 0, "l0": 1, "cpu_seconds": 0}

Row = dict[str, Any]


def write_table(rows: list[Row], path: Path) -> None:
    """Write a Markdown table for each set and kind of SAE: the mean over seeds, and the range."""
    groups: dict[tuple[str, str, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["set"], row["kind"], row["tokens"]].append(row)
    parts = [_HEAD]
    for (name, kind, tokens), of_group in sorted(groups.items()):
        first = of_group[0]
        judges = [key for key in first if key.startswith("monosemanticity by ")]
        headings = ["trainer", "seeds", *COLUMNS.values(), *judges]
        parts.append(
            f"\n## {name}, {kind}\n\n{first['d_sae']:,} latents, k {first['k']}, "
            f"{tokens:,} vectors drawn; probing by the largest group alone "
            f"{first.get('probing, largest group', math.nan):.3f}\n"
        )
        parts.append(f"| {' | '.join(headings)} |")
        parts.append(f"|{'---|' * len(headings)}")
        by_trainer: dict[str, list[Row]] = defaultdict(list)
        for row in of_group:
            by_trainer[row["trainer"]].append(row)
        for trainer, runs in by_trainer.items():
            cells = [_cell(runs, column) for column in (*COLUMNS, *judges)]
            parts.append(f"| {trainer} | {len(runs)} | {' | '.join(cells)} |")
    path.write_text("\n".join(parts) + "\n", encoding="utf-8")


_HEAD = """# SAEs by this package and by its peers

`python -m benchmarks.quality` makes this table. Every trainer has the same vectors, the same
number of them, the same width and k, and its own defaults for the rest. The scores are measured on
the 20,000 vectors of some of the images. `ours` stands for this package's defaults, `saelens` for
SAELens's (`--defaults saelens`). A cell is the mean over seeds, with the range behind it.

- alive: latents that fire on at least one of the vectors; dense: on more than a tenth of them.
- the same at L0 = k: the explained variance when the threshold of a BatchTopK, Matryoshka or
  JumpReLU SAE is set so that exactly k latents fire on a vector, on average.
- probing: test accuracy of a logistic regression on 20 latents for the images' groups.
- stability: mean cosine of a decoder direction with its nearest of another seed.
- monosemanticity: mean over latents, by the embeddings of the model that is named.

On the emoji CLIP `ours` takes a tenth to a third more CPU time than `dictionary_learning` (seed 0;
seeds 1 and 2 were timed before a step was made faster): its batches are small there (256 vectors,
where `dictionary_learning` takes 1,024), so it makes more steps. On 200,000 vectors, batches of
1,024 take six tenths of the time and explain .011 less (`trials.md`)."""


def _cell(runs: list[Row], column: str) -> str:
    values = [row[column] for row in runs if column in row]
    if not values:
        return ""
    digits = _DIGITS.get(column, 3)
    mean, low, high = sum(values) / len(values), min(values), max(values)
    if len(values) == 1 or column == "stability":
        return f"{values[-1]:,.{digits}f}"
    return f"{mean:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"


def write_plot(rows: list[Row], path: Path) -> None:
    """Explained variance against L0, and the share of latents alive beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    sets = sorted({row["set"] for row in rows})
    if not sets:
        return
    trainers = list(dict.fromkeys(row["trainer"] for row in rows))
    markers = dict(zip(sorted({row["kind"] for row in rows}), "osD^vP", strict=False))
    figure, axes = plt.subplots(
        len(sets), 2, figsize=(10, 3.4 * len(sets)), squeeze=False, layout="constrained"
    )
    for (explained, alive), name in zip(axes, sets, strict=True):
        for row in rows:
            if row["set"] != name:
                continue
            style = {
                "color": f"C{trainers.index(row['trainer'])}",
                "marker": markers[row["kind"]],
                "linestyle": "none",
            }
            explained.plot(row["l0"], row["explained_variance"], **style)
            alive.plot(row["l0"], row["alive"] / row["d_sae"], **style)
        explained.set(title=name, xlabel="L0", ylabel="explained variance")
        alive.set(title=name, xlabel="L0", ylabel="share of latents alive", ylim=(0, 1.03))
    handles = [
        plt.Line2D([], [], color=f"C{i}", marker="o", linestyle="none", label=trainer)
        for i, trainer in enumerate(trainers)
    ]
    handles += [
        plt.Line2D([], [], color="grey", marker=marker, linestyle="none", label=kind)
        for kind, marker in markers.items()
    ]
    figure.legend(handles=handles, loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
