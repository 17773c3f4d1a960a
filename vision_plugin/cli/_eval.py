"""``vision-plugin eval``: score an SAE beside controls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from vision_plugin.cli._flags import as_flags, parse


def run(arguments: Sequence[str]) -> None:
    """Score an SAE from flags, print the table, and say where the results are."""
    from vision_plugin.evaluation import EvaluationConfig

    cfg = parse(
        EvaluationConfig,
        arguments,
        command="eval",
        description="Score an SAE by any of the registered metrics, beside the raw neurons at the "
        "same hook and other controls, in one table. `vision-plugin info` lists the metrics.",
    )
    from vision_plugin.evaluation import evaluate_config

    console = Console()
    result = evaluate_config(cfg)
    console.print(scores_table(result))
    for note in notes(result):
        console.print(note, highlight=False)


HEADINGS = {
    "sae": "SAE",
    "pca": "PCA",
    "random": "random directions",
    "random_model": "random model's neurons",
}

LABELS = {
    "fvu/explained_variance": "explained variance",
    "sparsity/l0": "L0 per token",
    "monosemanticity/mean_score": "monosemanticity, mean",
    "monosemanticity/median_score": "monosemanticity, median",
    "steerability/mean_score": "steerability, mean",
    "steerability/max_score": "steerability, largest",
    "steerability/n_steerable": "steerable latents",
    "steerability/share_steerable": "steerable latents, share",
    "steerability/coverage": "distinct concepts",
}


def scores_table(result: Any) -> Table:
    """Return a table of the SAE and its controls, with a row for each number of each metric."""
    from vision_plugin.metrics import headline_of

    table = Table(title=f"{len(result.encoded.ids)} images, {result.encoded.tokens} tokens")
    table.add_column("")
    columns = result.dictionaries
    for key in columns:
        table.add_column(HEADINGS.get(key, key), justify="right")
    for metric, by_dictionary in result.results.items():
        numbers = {key: headline_of(found) for key, found in by_dictionary.items()}
        names = dict.fromkeys(name for found in numbers.values() for name in found)
        for name in names:
            cells = [_cell(numbers.get(key, {}).get(name)) for key in columns]
            table.add_row(row_label(metric, name, result.embedders), *cells)
    return table


def row_label(metric: str, name: str, embedders: dict[str, bool]) -> str:
    """Return the label of a row; it marks an embedder that is the model under study."""
    metric, _, embedder = metric.partition("@")
    label = LABELS.get(f"{metric}/{name}", f"{metric.replace('_', ' ')}, {name.replace('_', ' ')}")
    if not embedder:
        return label
    return f"{label} ({'the model itself' if embedders[embedder] else embedder})"


def notes(result: Any) -> list[str]:
    """Return the notes that a reader needs beside the table."""
    lines = []
    if result.monosemanticity:
        similarity = next(iter(result.monosemanticity.values())).mean_similarity
        lines.append(
            f"Mean similarity of the images: {similarity:.3f}, the score of a latent that fires "
            "at random."
        )
        if result.own_embeddings:
            lines.append(
                "Similarities are the model's own embeddings; --embedder names an outside encoder."
            )
    lines += [
        f"Left out: {name}: {as_flags(why, type(result.config))}"
        for name, why in result.left_out.items()
    ]
    if result.encoded.bad_images:
        lines.append(f"{len(result.encoded.bad_images)} images could not be read; see the JSON.")
    where = result.path or "not written: --output-path names a file for them"
    return [*lines, f"All numbers, per latent as well: {where}"]


def _cell(value: float | int | None) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}"
