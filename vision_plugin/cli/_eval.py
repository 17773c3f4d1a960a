"""``vision-plugin eval``: score an SAE beside controls."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vision_plugin._paths import local_path
from vision_plugin._rich import Table
from vision_plugin.cli._console import console
from vision_plugin.cli._engine import EngineFlags, opened
from vision_plugin.cli._flags import as_flags, parse_two, pick
from vision_plugin.cli._name import names_beside, resolve_latents


def run(arguments: Sequence[str]) -> None:
    """Score an SAE from flags, print the table, and say where the results are."""
    from vision_plugin.evaluation import EvaluationConfig

    @dataclass(frozen=True, kw_only=True)
    class EvalConfig(EvaluationConfig):
        """What to score, and latents to show one by one."""

        latents: tuple[int | str, ...] = ()
        """Latents whose scores are printed one by one: by number, or as ``name:WORD`` for all whose
        name in ``names.json`` beside the SAE has that word."""

    flags, engine_flags = parse_two(
        EvalConfig,
        EngineFlags,
        arguments,
        command="eval",
        description="Score an SAE by any of the registered metrics, beside the raw neurons at the "
        "same hook and other controls, in one table. `vision-plugin info` lists the metrics.",
    )
    from vision_plugin.evaluation import evaluate_config

    out = console()
    cfg, sae = pick(EvaluationConfig, flags), None
    if flags.latents:
        sae = cfg.open_sae(cfg.sae)
        shown = resolve_latents(flags.latents, sae, cfg.sae)
    with opened(engine_flags) as engine:
        result = evaluate_config(cfg, sae=sae, engine=engine)
    out.print(scores_table(result))
    if flags.latents:
        out.print(latents_table(result, shown, names_beside(cfg.sae, sae)))
    for embedder in result.equal_firing:
        out.print(equal_firing_table(result, embedder))
    for note in [*equal_firing_notes(result), *notes(result)]:
        out.print(note)
    if result.path is not None:
        out.print(report_line(cfg), soft_wrap=True)


def report_line(cfg: Any) -> str:
    """Return where the report of an SAE is, or the command that writes it."""
    written = local_path(cfg.sae) / "report" / "index.html"
    if written.is_file():
        return f"Open {written} in a browser."
    return (
        f"See its features: vision-plugin report --sae {shlex.quote(cfg.sae)} "
        f"--images {shlex.quote(cfg.images)} --evaluation {shlex.quote(str(result_path(cfg)))}"
    )


def result_path(cfg: Any) -> Path:
    """Return where the JSON of an evaluation is."""
    return Path(cfg.output_path) if cfg.output_path else Path(cfg.sae) / "evaluation.json"


def latents_table(result: Any, latents: Sequence[int], names: dict[int, str]) -> Table:
    """Return a table of some latents, with their names and a column for each metric's scores."""
    scores = {
        metric: found.score
        for metric, by_dictionary in result.results.items()
        if getattr(found := by_dictionary.get("sae"), "score", None) is not None
        and found.score.ndim == 1
    }
    table = Table(title="scores of single latents")
    table.add_column("latent", justify="right")
    table.add_column("name")
    for metric in scores:
        table.add_column(metric.replace("_", " "), justify="right")
    for latent in latents:
        inside = (one for one in scores.values() if latent < len(one))
        cells = [_cell(float(score[latent])) for score in inside]
        if len(cells) < len(scores):
            raise ValueError(f"latents={latent} is out of range: see how many the SAE has")
        table.add_row(str(latent), names.get(latent, ""), *cells)
    return table


UNDEFINED = "-"
WIDEST_WORD = 20
"""Characters that a label has in any terminal; a longer word is continued on the next line."""

LABELS = {
    "fvu/explained_variance": "explained variance",
    "fvu/cosine": "cosine of the reconstruction",
    "fvu/fvu": "unexplained variance, as VISAEBench defines it",
    "sparsity/l0": "L0 per token",
    "sparsity/n_dead": "dead latents, by token",
    "sparsity/n_rare": "rare latents, by token",
    "sparsity/n_dense": "dense latents, by token",
    "monosemanticity/mean_score": "monosemanticity, mean",
    "monosemanticity/median_score": "monosemanticity, median",
    "monosemanticity/share_z_above_3": "monosemanticity, share with z above 3",
    "monosemanticity/n_dead": "dead latents, by image",
    "monosemanticity/n_constant": "latents alike on all images",
    "monosemanticity/n_rare": "rare latents, by image",
    "uniqueness/mean_jaccard": "overlap of two latents, mean",
    "uniqueness/share_above_0": "pairs of latents that overlap, share",
    "uniqueness/share_above_0.5": "pairs that overlap by half, share",
    "uniqueness/n_left_out": "latents without an overlap",
    "steerability/mean_score": "steerability, mean",
    "steerability/max_score": "steerability, largest",
    "steerability/n_steerable": "steerable latents",
    "steerability/share_steerable": "steerable latents, share",
    "steerability/coverage": "distinct concepts",
}


def scores_table(result: Any) -> Table:
    """Return a table of the SAE and its controls, with a row for each number of each metric.

    A number that is undefined for every dictionary has no row; the JSON has it.
    """
    from vision_plugin.evaluation import DICTIONARY_TITLES
    from vision_plugin.metrics import headline_of

    table = Table(title=f"{len(result.encoded.ids)} images, {result.encoded.tokens} tokens")
    rows: list[tuple[str, list[str]]] = []
    columns = result.dictionaries
    for metric, by_dictionary in result.results.items():
        numbers = {key: headline_of(found) for key, found in by_dictionary.items()}
        names = dict.fromkeys(name for found in numbers.values() for name in found)
        for name in names:
            cells = [_cell(numbers.get(key, {}).get(name)) for key in columns]
            if set(cells) != {UNDEFINED}:
                rows.append((row_label(metric, name, result.embedders), cells))
    # A narrow terminal wraps labels between their words, and never cuts a word or a number.
    longest = max((len(word) for label, _ in rows for word in label.split()), default=0)
    table.add_column("", overflow="fold", min_width=min(longest, WIDEST_WORD))
    for key in columns:
        title = DICTIONARY_TITLES.get(key, key).replace(" ", "\n")
        table.add_column(title, justify="right", no_wrap=True)
    for label, cells in rows:
        table.add_row(label, *cells)
    return table


def row_label(metric: str, name: str, embedders: dict[str, bool]) -> str:
    """Return the label of a row; it marks an embedder that is the model under study."""
    metric, _, embedder = metric.partition("@")
    plain = dict.fromkeys(part.replace("_", " ") for part in (metric, name))
    label = LABELS.get(f"{metric}/{name}", ", ".join(plain))
    if not embedder:
        return label
    return f"{label} ({'the model itself' if embedders[embedder] else embedder})"


def equal_firing_table(result: Any, embedder: str) -> Table:
    """Monosemanticity of the SAE and of random directions that fire as often, bin by bin."""
    found = result.equal_firing[embedder]
    table = Table(title=f"Monosemanticity at equal firing, judged by {_judge(result, embedder)}")
    for heading in ("active images", "latents", "SAE", "random directions", "difference"):
        table.add_column(heading, justify="right")
    for each in found.bins:
        images = f"{each.fewest:,} to {each.most:,}"
        means = (_cell(each.mean), _cell(each.control_mean), f"{each.difference:+.4f}")
        table.add_row(images, f"{each.n_latents:,}", *means)
    return table


def equal_firing_notes(result: Any) -> list[str]:
    """A sentence for each judge that says whether the SAE is above random directions."""
    lines = [
        _verdict(found, _judge(result, embedder)) for embedder, found in result.equal_firing.items()
    ]
    if any(result.embedders[embedder] for embedder in result.equal_firing):
        lines.append(
            "The model's own embeddings favour random directions: --embedder names an outside "
            "encoder, --embedder labels takes the images' classes."
        )
    if lines and result.seen_in_training:
        lines.append(
            "The SAE was trained on these images, where its latents score higher than on others: "
            "score it on images that it has not seen."
        )
    return lines


def _verdict(found: Any, judge: str) -> str:
    if found.verdict == "not comparable":
        return (
            f"Judged by {judge}, the SAE cannot be compared with random directions: too few "
            "latents of both fire on as many images."
        )
    says = {
        "above": "score above random directions",
        "below": "score below random directions",
        "not told apart": "cannot be told apart from random directions",
    }
    return (
        f"Judged by {judge}, the SAE's latents {says[found.verdict]} that fire as often: "
        f"{found.difference:+.4f} ({found.confidence:.0%} interval {found.low:+.4f} to "
        f"{found.high:+.4f}) over {found.n_latents:,} latents; {found.n_left_out:,} fire too "
        "rarely, or as no random direction does."
    )


def _judge(result: Any, embedder: str) -> str:
    if result.embedders[embedder]:
        return "the model itself"
    return "the images' classes" if embedder == "labels" else embedder


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
        return UNDEFINED
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 0.1 else f"{value:.3f}"
