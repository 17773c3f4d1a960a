"""``vision-plugin extract``: write activations to a store."""

from __future__ import annotations

from collections.abc import Sequence

from vision_plugin.cli._console import console
from vision_plugin.cli._engine import EngineFlags, opened
from vision_plugin.cli._flags import parse_two


def run(arguments: Sequence[str]) -> None:
    """Extract activations from flags and print what the store holds."""
    from vision_plugin.activations import ExtractionConfig

    cfg, engine_flags = parse_two(
        ExtractionConfig,
        EngineFlags,
        arguments,
        command="extract",
        description="Run images through a model and write the activations at some hooks to a "
        "store of checked shards. An interrupted run continues where it stopped.",
    )
    from vision_plugin.activations import extract, info

    with opened(engine_flags) as engine:
        extract(cfg, engine=engine)
    facts = info(cfg.output_path)
    out = console()
    for name, value in facts.items():
        out.print(f"{name}: {value}")
