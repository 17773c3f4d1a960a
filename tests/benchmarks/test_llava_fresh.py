"""What the page about the small LLaVA's steering says of its aims."""

from __future__ import annotations

from typing import Any

from benchmarks._llava_fresh import aims


def row(method: str, kind: str, how: str, done: float, preserved: float) -> dict[str, Any]:
    name = "inserted" if how.startswith("insertion") else "suppressed"
    figures = {
        key: {"value": value, "low": value - 0.01, "high": value + 0.01}
        for key, value in ((name, done), ("preserved", preserved))
    }
    edit = f"{method}, 3 per value"
    return {"method": method, "kind": kind, "how": how, "edit": edit, **figures}


def unlike(chosen: dict[str, Any]) -> dict[str, Any]:
    """The row of the same edit with the reconstruction in place of the layer."""
    how = chosen["how"].replace("best", "winner")
    other = row("sae_without_error", chosen["kind"], how, 1.0, 1.0)
    return {**other, "edit": chosen["edit"]}


def test_an_aim_is_reached_where_both_figures_of_the_chosen_edit_reach_it() -> None:
    chosen = row("replace", "colour", "insertion, best", 0.95, 0.91)
    missed = row("zero", "background", "suppression, best", 0.99, 0.89)
    rows = [
        chosen,
        row("transfer", "colour", "insertion, best", 0.5, 0.5),
        unlike(chosen),
        missed,
        unlike(missed),
        row("zero", "shape", "suppression, best", 0.99, 0.89),
    ]
    lines = [line for line in aims({"task": "llava", "rows": rows}) if line.startswith("| ")]
    assert lines[1:] == [
        "| insertion of a colour | replace, 3 per value | 0.950 [0.940, 0.960] of 0.90 "
        "| 0.910 [0.900, 0.920] of 0.90 | yes |",
        "| suppression of a background | zero, 3 per value | 0.990 [0.980, 1.000] of "
        "0.95 | 0.890 [0.880, 0.900] of 0.90 | no |",
    ]
    assert aims({"task": "typographic", "rows": rows}) == []
