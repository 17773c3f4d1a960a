"""``vision-plugin splice``: image embeddings as sparse sums of words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vision_plugin._inputs import Inputs
from vision_plugin._ours import LENS, check_replaceable
from vision_plugin._paths import local_path
from vision_plugin._rich import Table
from vision_plugin.cli._console import console
from vision_plugin.cli._flags import parse, pick
from vision_plugin.lens import SpliceSettings, splice


@dataclass(frozen=True, kw_only=True)
class SpliceConfig(Inputs, SpliceSettings):
    """Images, a vocabulary, and how sparse the codes are."""

    vocabulary: str
    """Words: a text file, one a line; or ``demo`` for those of the drawn world."""
    output_path: str
    """Folder of the results; earlier results of a lens in it are replaced."""
    remove: tuple[str, ...] = ()
    """Words to remove from every image's code."""

    def __post_init__(self) -> None:
        Inputs.__post_init__(self)
        SpliceSettings.__post_init__(self)
        if self.model_name is None:
            raise ValueError("name the model whose embeddings are taken apart: model_name=")


def run(arguments: Sequence[str]) -> None:
    """Write images as words from flags, print the curve, and write the folder."""
    cfg = parse(
        SpliceConfig,
        arguments,
        command="splice",
        description="Write image embeddings as sparse non-negative sums of words (SpLiCE): the "
        "words of each image, cosine against their number, and what removing words does.",
    )
    check_replaceable(local_path(cfg.output_path), LENS)
    model = cfg.open_model(None)
    result = splice(
        model,
        cfg.open_images(),
        _words(cfg.vocabulary),
        settings=pick(SpliceSettings, cfg),
    )
    edits = [result.without(cfg.remove)] if cfg.remove else []
    result.save(cfg.output_path, edits=edits)
    out = console()
    out.print(result.table())
    out.print(result.words_table())
    for edit in edits:
        out.print(_edit_table(edit))
    out.print(f"In {cfg.output_path}: results.json, table.txt, curve.png", soft_wrap=True)


def _words(vocabulary: str) -> Any:
    if vocabulary != "demo":
        return vocabulary
    from vision_plugin.demo import FACTORS

    return [word for name in ("shape", "colour", "texture", "background") for word in FACTORS[name]]


def _edit_table(edit: Any) -> Table:
    table = Table(title=f"without {', '.join(edit.words)}: {len(edit.images)} images had them")
    table.add_column("zero-shot accuracy")
    table.add_column("", justify="right")
    named = {"these, all words": edit.before, "these, without": edit.after, "others": edit.others}
    for name, share in named.items():
        table.add_row(name, "no classes" if share is None else str(share))
    return table
