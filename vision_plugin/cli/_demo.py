"""``vision-plugin demo``: the whole job offline."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from vision_plugin._rich import Table
from vision_plugin.cli._console import console
from vision_plugin.cli._eval import notes, scores_table
from vision_plugin.cli._flags import parse


def run(arguments: Sequence[str]) -> None:
    """Run the demo from flags and print its results."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from vision_plugin.demo.job import DemoConfig, run_demo

    cfg = parse(
        DemoConfig,
        arguments,
        command="demo",
        description="Draw images, train an SAE on the packaged CLIP, score it, steer it, and "
        "write a report: offline, in a minute or two.",
    )
    out = console()
    result = run_demo(cfg, lambda line: out.print(line, style="bold"))
    out.print(scores_table(result.evaluation))
    out.print(truth_table(result))
    out.print(ladder_table(result))
    if result.answers:
        out.print(steering_table(result))
    for note in notes(result.evaluation):
        out.print(note, soft_wrap=True)
    total = sum(result.seconds.values())
    out.print(
        f"Done in {total:.0f} s. Results: {cfg.output_path}/results.json",
        soft_wrap=True,
    )
    out.print(f"Open {cfg.output_path}/report/index.html in a browser.", soft_wrap=True)


def truth_table(result: Any) -> Table:
    """Return the scores of known factors with their own code as the embedding, as a table."""
    table = Table(title="Is the metric right? Monosemanticity with a factor's own code")
    for heading in ("factor", "true latents", "rotated at random", "mean similarity"):
        table.add_column(heading, justify="left" if heading == "factor" else "right")
    for factor, test in result.own_code.items():
        numbers = (test.factors, test.rotation, test.mean_similarity)
        table.add_row(factor, *(f"{number:.3f}" for number in numbers))
    return table


def ladder_table(result: Any) -> Table:
    """Return the scores with image embeddings, from known truth down to noise, as a table."""
    table = Table(title="Monosemanticity: image embeddings")
    table.add_column("latents", min_width=20)
    table.add_column("mean score", justify="right")
    for name, score in result.ladder.items():
        table.add_row(name, f"{score:.3f}")
    return table


def steering_table(result: Any) -> Table:
    """Return what the model answers before and while latents are held, as a table."""
    n_images = max(found.n_images for found in result.answers.values())
    table = Table(title=f"Steering: {n_images} images that lack what a latent is named after")
    for heading in ("latent", "named", "asked for"):
        table.add_column(heading)
    for heading in ("answered so\nbefore", "while held", "other answers\nkept"):
        table.add_column(heading, justify="right")
    for latent, found in result.answers.items():
        shares = (found.before, found.after, found.kept)
        name = found.name.removeprefix("a picture of ")
        asked = f"{found.factor}, {found.choices} choices"
        table.add_row(str(latent), name, asked, *(f"{share:.0%}" for share in shares))
    return table
