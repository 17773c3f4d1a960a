"""The files of a result that can be applied again: its edits, and the SAEs that they need."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vision_plugin.models.dictionary import Dictionary
from vision_plugin.steering import Edit


def save_edits(made: Path, edit: Edit, edits: Iterator[tuple[str, Edit]], sae: Any) -> None:
    """Write ``edit.json`` and ``edits/`` into a folder, and SAEs in hand beside them.

    Args:
        made: The folder.
        edit: The edit of the whole result.
        edits: Further edits with the names of their files.
        sae: Where the SAE lies; SAEs by where they lie; or one SAE or several, which are saved into
            ``sae/``, several of them by number. None saves none, and edits do not say where theirs
            lies.
    """
    where, deeper = _places(made, sae)
    edit.save(made / "edit.json", sae=where)
    (made / "edits").mkdir()
    for name, each in edits:
        each.save(made / "edits" / f"{name}.json", sae=deeper)


def _places(made: Path, sae: Any) -> tuple[Any, Any]:
    """Return where SAEs lie, as seen from the folder and from ``edits/`` in it."""
    if sae is None or isinstance(sae, (str, Path, Mapping)):
        return sae, sae
    given: list[Dictionary] = list(sae) if isinstance(sae, (list, tuple)) else [sae]
    names = ["sae"] if len(given) == 1 else [f"sae/{n}" for n in range(1, len(given) + 1)]
    for name, one in zip(names, given, strict=True):
        one.save_model(str(made / name))  # type: ignore[attr-defined]
    beside = dict(zip(names, given, strict=True))
    return beside, {f"../{name}": one for name, one in beside.items()}
