"""``vision-plugin eval``: score an SAE beside the neurons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from vision_plugin.cli._flags import parse


def run(arguments: Sequence[str]) -> None:
    """Score an SAE from flags, print the table, and say where the results are."""
    from vision_plugin.metrics.evaluation import EvaluationConfig, evaluate

    cfg = parse(
        EvaluationConfig,
        arguments,
        command="eval",
        description="Score an SAE for fidelity, monosemanticity and steerability, beside the "
        "raw neurons at the same hook.",
    )
    console = Console()
    result = evaluate(cfg, progress=console.is_terminal)
    console.print(scores_table(result))
    for note in notes(result):
        console.print(note, highlight=False)


def scores_table(result: Any) -> Table:
    """SAE and neurons side by side."""
    table = Table(title=f"{len(result.encoded.ids)} images, {result.encoded.tokens} tokens")
    table.add_column("")
    table.add_column("SAE", justify="right")
    table.add_column("neurons", justify="right")
    fidelity = result.encoded.fidelity
    table.add_row("explained variance", f"{fidelity['explained_variance']:.3f}", "1.000")
    table.add_row("L0 per token", f"{fidelity['l0']:.1f}", str(result.encoded.neurons.shape[1]))
    for label, metric, key, form in _ROWS:
        results = getattr(result, metric)
        if results is not None:
            summaries = [results[name].summary() for name in ("sae", "neurons")]
            table.add_row(label, *(form.format(summary[key]) for summary in summaries))
    return table


_ROWS = (
    ("latents", "monosemanticity", "n_features", "{}"),
    ("dead", "monosemanticity", "n_dead", "{}"),
    ("monosemanticity, mean", "monosemanticity", "mean_score", "{:.3f}"),
    ("monosemanticity, median", "monosemanticity", "median_score", "{:.3f}"),
    ("steerability, mean", "steerability", "mean_score", "{:.4f}"),
    ("steerable latents", "steerability", "n_steerable", "{}"),
    ("distinct concepts", "steerability", "coverage", "{}"),
)


def notes(result: Any) -> list[str]:
    """What a reader has to know beside the table."""
    similarity = result.monosemanticity["sae"].mean_similarity
    lines = [
        f"Mean similarity of the images: {similarity:.3f}, the score of a latent that fires at "
        "random."
    ]
    if result.own_embeddings:
        lines.append(
            "Similarities are the model's own embeddings; --embedder names an outside encoder."
        )
    if result.steerability is None:
        lines.append(
            "Steerability was left out: --concepts labels, column:NAME or a file names concepts."
        )
    if result.encoded.bad_images:
        lines.append(f"{len(result.encoded.bad_images)} images could not be read; see the JSON.")
    path = result.config.output_path or f"{result.config.sae}/evaluation.json"
    return [*lines, f"All numbers, per latent as well: {path}"]
