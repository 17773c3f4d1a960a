"""One row of a task's table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vision_plugin.tasks._measure import Figure


@dataclass(frozen=True, eq=False)
class Row:
    """One method on one split.

    Attributes:
        method: Name of the method.
        kind: What the task is about, such as ``"shape"``.
        split: ``"test"`` or ``"unseen_words"``.
        size: Number of latents, neurons, directions or heads.
        layer: Block behind which the edit is made; None for several or none.
        how: Rule and kind of token.
        edit: The edit in words.
        figures: Figures by name.
    """

    method: str
    kind: str
    split: str
    size: int
    layer: int | None
    how: str
    edit: str
    figures: Mapping[str, Figure]

    def to_dict(self) -> dict[str, Any]:
        """Return the row ready for JSON."""
        about = {
            name: getattr(self, name)
            for name in ("method", "kind", "split", "size", "layer", "how", "edit")
        }
        return {**about, **{name: figure.to_dict() for name, figure in self.figures.items()}}
