"""The folder of a lens: results.json, tables as text, figures and pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vision_plugin._disk import whole_folder, write_json
from vision_plugin._ours import LENS
from vision_plugin._paths import local_path
from vision_plugin._rich import Console, Table


def save_result(
    folder: str | Path,
    content: Mapping[str, Any],
    *,
    tables: Sequence[Table] = (),
    figures: Mapping[str, Any] | None = None,
    pages: Mapping[str, str] | None = None,
    edits: Mapping[str, Any] | None = None,
) -> Path:
    """Write the results of a lens as a folder that is whole or not there.

    Args:
        folder: Folder to make; earlier results of a lens in it are replaced.
        content: What ``results.json`` holds; its ``schema`` begins with ``vision_plugin.lens/``.
        tables: Tables for ``table.txt``.
        figures: Matplotlib figures by name, written as PNG.
        pages: HTML pages by name.
        edits: Edits by name, written as JSON.

    Returns:
        The folder.

    Raises:
        FileExistsError: something else has the name.
    """
    place = local_path(folder)
    with whole_folder(place, replaces=LENS) as made:
        write_json(dict(content), made / "results.json")
        if tables:
            (made / "table.txt").write_text("\n".join(map(printed, tables)), encoding="utf-8")
        for name, figure in (figures or {}).items():
            figure.savefig(made / f"{name}.png", dpi=120, bbox_inches="tight")
        for name, text in (pages or {}).items():
            (made / f"{name}.html").write_text(text, encoding="utf-8", newline="\n")
        if edits:
            (made / "edits").mkdir()
        for name, edit in (edits or {}).items():
            edit.save(made / "edits" / f"{name}.json")
    return place


def printed(table: Table) -> str:
    """Return a table as text, whole however narrow the terminal is."""
    console = Console(
        width=160, no_color=True, markup=False, emoji=False, highlight=False, force_jupyter=False
    )
    with console.capture() as captured:
        console.print(table)
    return captured.get()
