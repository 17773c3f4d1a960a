"""``vision-plugin decompose``: what a model's image embeddings are made of."""

from __future__ import annotations

from collections.abc import Sequence

from vision_plugin.cli._console import console
from vision_plugin.cli._flags import parse


def run(arguments: Sequence[str]) -> None:
    """Take images apart from flags, print the tables, and name the folder."""
    from vision_plugin.lens import DecomposeConfig

    cfg = parse(
        DecomposeConfig,
        arguments,
        command="decompose",
        description="Take image embeddings apart into exact contributions of layers, heads and "
        "MLPs, replace them by their means, and describe the heads of the last layers by texts.",
    )
    from vision_plugin.lens import decompose_images

    found = decompose_images(cfg)
    out = console()
    for table in found.tables():
        out.print(table)
    out.print(f"Tables, figures and JSON are in {cfg.output_path}", soft_wrap=True)
