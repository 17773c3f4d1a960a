"""``vision-plugin sparsity``: where SAEs fire, and how well they reconstruct there."""

from __future__ import annotations

from collections.abc import Sequence

from vision_plugin.cli._console import console
from vision_plugin.cli._flags import parse


def run(arguments: Sequence[str]) -> None:
    """Study SAEs from flags, and print the table and the names of the files."""
    from vision_plugin.evaluation import SparsityStudyConfig

    cfg = parse(
        SparsityStudyConfig,
        arguments,
        command="sparsity",
        description="L0 and explained variance per layer and kind of token (CLS, registers, "
        "patches), with a map of L0 over the patch grid, for one or several SAEs of a model.",
    )
    from vision_plugin.evaluation import FILES, sparsity_study, table_of

    out = console()
    result = sparsity_study(cfg)
    out.print(table_of(result))
    if result.bad_images:
        out.print(f"{len(result.bad_images)} images could not be read; see the JSON.")
    out.print(f"In {cfg.output_path}: {', '.join(FILES)}", soft_wrap=True)
