"""``vision-plugin extract``: write activations to a store."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from vision_plugin.cli._flags import parse


def run(arguments: Sequence[str]) -> None:
    """Extract activations from flags and print what the store holds."""
    from vision_plugin.activations import ExtractionConfig

    cfg = parse(
        ExtractionConfig,
        arguments,
        command="extract",
        description="Run images through a model and write the activations at some hooks to a "
        "store of checked shards. An interrupted run continues where it stopped.",
    )
    from vision_plugin.activations import extract, info

    extract(cfg)
    facts = info(cfg.output_path)
    console = Console()
    for name, value in facts.items():
        console.print(f"{name}: {value}", highlight=False)
