"""The result of steering a vision-language model: rows, example dialogues, tables and files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vision_plugin._disk import whole_folder, write_json
from vision_plugin._intervals import cell
from vision_plugin._ours import TASK
from vision_plugin._paths import local_path
from vision_plugin._rich import Table
from vision_plugin.steering import Edit
from vision_plugin.tasks._one_word import OneWordResult
from vision_plugin.tasks._row import Row, printed
from vision_plugin.tasks._saved import save_edits

SCHEMA = 1
_FIRST = ("accuracy", "inserted", "suppressed")
"""Figures of which a row has one: how often an answer is right, or changed as it should."""


@dataclass(frozen=True)
class Dialogue:
    """What a model says about one image before and after a change.

    Attributes:
        goal: ``"insertion"`` or ``"suppression"``.
        factor: Factor of the value.
        value: Value that is put in or taken out.
        image: Number of the test image.
        recipe: What was changed.
        answers: Answer before and after, by question.

    Examples:
        >>> said = vp.tasks.Dialogue(
        ...     goal="insertion",
        ...     factor="colour",
        ...     value="red",
        ...     image=3,
        ...     recipe="clamp latent 12 to 50",
        ...     answers={"What colour is shown?": ("blue", "red")},
        ... )
        >>> said.answers["What colour is shown?"]
        ('blue', 'red')
    """

    goal: str
    factor: str
    value: str
    image: int
    recipe: str
    answers: Mapping[str, tuple[str, str]]

    def __str__(self) -> str:
        lines = [f"{self.goal} of {self.factor} {self.value} (image {self.image}; {self.recipe})"]
        for question, (before, after) in self.answers.items():
            lines.append(f"  {question} {before}{'' if before == after else f' -> {after}'}")
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class MultimodalResult:
    """Rows, the search on validation, and example dialogues.

    Attributes:
        model: Name of the model.
        sae: Name or place of the SAE.
        settings: What the run was made with.
        rows: Figures on test images, on which nothing was chosen.
        search: What validation saw of each candidate.
        dialogues: What the model says before and after.
        edit: The edit that did best on validation of all.
        edits: The edit of each value, by goal, factor and value; where it depends on the value that
            is there, by both, as ``red-to-blue``.
        one_word: What is said in one word about a white image, where that was asked for.

    Examples:
        >>> row = vp.tasks.Row(
        ...     method="sae",
        ...     kind="insertion, colour",
        ...     split="test",
        ...     size=1,
        ...     layer=2,
        ...     how="patch",
        ...     edit="clamp latent 12 to 50",
        ...     figures={"said": vp.tasks.Figure(0.9, 0.8, 0.95)},
        ... )
        >>> found = vp.tasks.MultimodalResult(
        ...     model="demo",
        ...     sae="runs/sae",
        ...     settings={},
        ...     rows=[row],
        ...     search=[],
        ...     dialogues=[],
        ...     edit=vp.Edit.clamp(sae, {12: 50.0}),
        ...     edits={},
        ... )
        >>> found.row("sae", kind="insertion, colour", how="patch").figures["said"].value
        0.9
    """

    model: str
    sae: str
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    search: Sequence[Mapping[str, Any]]
    dialogues: Sequence[Dialogue]
    edit: Edit
    edits: Mapping[tuple[str, str, str], Edit]
    one_word: OneWordResult | None = None

    def row(self, method: str, *, kind: str, how: str) -> Row:
        """Return one row.

        Args:
            method: Name of the method.
            kind: Factor.
            how: Goal and choice, such as ``"insertion, best"``.

        Raises:
            KeyError: there is none.
        """
        for row in self.rows:
            if (row.method, row.kind, row.how) == (method, kind, how):
                return row
        raise KeyError(f"no row of {method!r} for {kind!r}, {how!r}")

    def table(self) -> Table:
        """Return the rows for ``rich`` to print.

        The share is that of answers that are right, are the value put in, or no longer the value
        taken out.
        """
        table = Table(title=f"llava: {self.model}")
        for heading in ("factor", "what", "method"):
            table.add_column(heading, overflow="fold")
        table.add_column("size", justify="right")
        for heading in ("share", "preserved"):
            table.add_column(heading, justify="right", no_wrap=True)
        last = None
        for row in sorted(self.rows, key=lambda one: (one.how, one.kind)):
            if last not in (None, (row.how, row.kind)):
                table.add_section()
            last = (row.how, row.kind)
            first = next(row.figures[name] for name in _FIRST if name in row.figures)
            figures = (cell(first), cell(row.figures.get("preserved")))
            table.add_row(row.kind, row.how, row.method, str(row.size or ""), *figures)
        return table

    def to_dict(self) -> dict[str, Any]:
        """Return the result ready for JSON."""
        return {
            "schema": SCHEMA,
            "task": "llava",
            "model": self.model,
            "sae": self.sae,
            "settings": dict(self.settings),
            "rows": [row.to_dict() for row in self.rows],
            "search": [dict(entry) for entry in self.search],
            "dialogues": [asdict(dialogue) for dialogue in self.dialogues],
            "one_word": None if self.one_word is None else self.one_word.to_dict(),
        }

    def save(self, folder: str | Path, *, sae: Any = None) -> Path:
        """Write results.json, edit.json, the edits of every value, and a table with dialogues.

        Args:
            folder: Folder to make; earlier results of a task in it are replaced.
            sae: An SAE to save beside them, or where one lies already; None saves none, and the
                edits then do not say where theirs lies.

        Raises:
            FileExistsError: something else has the name.
        """
        place = local_path(folder)
        with whole_folder(place, replaces=TASK) as made:
            edits = (("-".join(names), edit) for names, edit in self.edits.items())
            save_edits(made, self.edit, edits, sae)
            write_json(self.to_dict(), made / "results.json")
            tables = [self.table(), *([] if self.one_word is None else [self.one_word.table()])]
            text = [*map(printed, tables), *map(str, self.dialogues), ""]
            (made / "table.txt").write_text("\n".join(text), encoding="utf-8")
        return place
