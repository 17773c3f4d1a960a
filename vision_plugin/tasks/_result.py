"""The result of a task: rows of figures, the edits that were chosen, tables, figures and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vision_plugin._disk import whole_folder, write_json
from vision_plugin._intervals import cell
from vision_plugin._ours import TASK
from vision_plugin._paths import local_path
from vision_plugin._rich import Table
from vision_plugin.steering import Edit
from vision_plugin.tasks._plot import plots
from vision_plugin.tasks._row import Row, printed
from vision_plugin.tasks._saved import save_edits

SCHEMA = 1
CONTROLS = ("neurons", "random_dictionary", "pca")
"""Methods that edit latents of a control dictionary in place of the SAE."""


@dataclass(frozen=True, eq=False)
class TaskResult:
    """Rows, edits and the search on validation.

    Attributes:
        task: Name of the task.
        model: Name of the model.
        sae: Name or place of the SAE.
        settings: What the run was made with.
        rows: Figures on pairs that nothing was chosen on.
        edit: The SAE's edits of all kinds together, as chosen on validation.
        edits: The chosen edit of each method, by kind and method.
        search: What validation saw of each candidate.
        shown: Names of the figures in the table.
        drawn: Names of the two figures in the plot.
        raised: Name of the figure that validation chose by.

    Examples:
        >>> from vision_plugin.demo.groups import group_data
        >>> data = group_data(model, "background", usual=30, unusual=4, validation=30, test=30)
        >>> settings = vp.tasks.GroupSettings(
        ...     rules=("difference",), sizes=(2,), methods=("none", "sae")
        ... )
        >>> found = vp.tasks.background(model, sae, data, settings=settings)
        >>> found.task, found.save("background").name
        ('background', 'background')
    """

    task: str
    model: str
    sae: str
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    edit: Edit
    edits: Mapping[tuple[str, str], Edit]
    search: Sequence[Mapping[str, Any]] = field(default_factory=tuple)
    shown: Sequence[str] = ("fooled", "accuracy", "clean_accuracy", "collateral")
    drawn: tuple[str, str] = ("fooled", "clean_accuracy")
    raised: str = "accuracy"

    def row(self, method: str, *, kind: str, split: str = "test") -> Row:
        """Return one row.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if (row.method, row.kind, row.split) == (method, kind, split):
                return row
        raise KeyError(f"no row of {method!r} for {kind!r} on {split!r}")

    def table(self) -> Table:
        """Return the rows for ``rich`` to print."""
        table = Table(title=f"{self.task}: {self.model}")
        for heading in ("kind", "split"):
            table.add_column(heading)
        table.add_column("method", no_wrap=True, min_width=21)
        for heading in ("size", "layer"):
            table.add_column(heading, justify="right")
        for name in self.shown:
            table.add_column(name.replace("_", " "), justify="right")
        last = None
        for row in self.rows:
            if last not in (None, (row.kind, row.split)):
                table.add_section()
            last = (row.kind, row.split)
            layer = "" if row.layer is None else str(row.layer)
            cells = [cell(row.figures.get(name)) for name in self.shown]
            table.add_row(row.kind, row.split, row.method, str(row.size or ""), layer, *cells)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return the result ready for JSON."""
        return {
            "schema": SCHEMA,
            "task": self.task,
            "model": self.model,
            "sae": self.sae,
            "settings": dict(self.settings),
            "rows": [row.to_dict() for row in self.rows],
            "search": [dict(entry) for entry in self.search],
        }

    def plot(self) -> dict[str, Any]:
        """Return matplotlib figures by name: the methods beside each other, and the search."""
        return plots(self.rows, self.search, drawn=self.drawn, raised=self.raised)

    def save(self, folder: str | Path, *, sae: Any = None) -> Path:
        """Write results.json, edit.json, the edits of every method, a table and figures.

        The edits of control dictionaries are left out: no file holds those dictionaries.

        Args:
            folder: Folder to make; earlier results of a task in it are replaced.
            sae: Where the SAE lies, for the edits; SAEs by where they lie; or one SAE or several,
                which are then saved beside them.

        Returns:
            The folder.

        Raises:
            FileExistsError: something else has the name.
        """
        place = local_path(folder)
        with whole_folder(place, replaces=TASK) as made:
            write_json(self.to_dict(), made / "results.json")
            # The others edit latents of a dictionary that is nowhere to be loaded from.
            edits = (("-".join(k), e) for k, e in self.edits.items() if k[1] not in CONTROLS)
            save_edits(made, self.edit, edits, sae)
            (made / "table.txt").write_text(printed(self.table()), encoding="utf-8")
            for name, figure in self.plot().items():
                figure.savefig(made / f"{name}.png", dpi=120, bbox_inches="tight")
        return place
