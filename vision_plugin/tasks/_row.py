"""One row of a task's table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vision_plugin._rich import Console, Table
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

    Examples:
        >>> row = vp.tasks.Row(
        ...     method="sae",
        ...     kind="shape",
        ...     split="test",
        ...     size=2,
        ...     layer=2,
        ...     how="difference, cls",
        ...     edit="suppress latents 3 and 5",
        ...     figures={"accuracy": vp.tasks.Figure(0.9, 0.8, 0.95)},
        ... )
        >>> row.to_dict()["method"], row.figures["accuracy"].value
        ('sae', 0.9)
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


def printed(table: Table) -> str:
    """Return a table as text, whole however narrow the terminal is."""
    console = Console(width=160, no_color=True, force_jupyter=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()
