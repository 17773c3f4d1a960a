"""The table of scores on a terminal of 80 columns, and how its rows are called."""

from __future__ import annotations

import io
import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from vision_plugin.cli._eval import LABELS, row_label, scores_table
from vision_plugin.metrics import available

COLUMNS = ("sae", "neurons", "pca", "random", "random_model")


def result(results: dict[str, dict[str, float]], embedders: dict[str, bool]) -> Any:
    """An evaluation of these numbers, the same for every dictionary."""
    return SimpleNamespace(
        encoded=SimpleNamespace(ids=["0"] * 2000, tokens="cls"),
        dictionaries=list(COLUMNS),
        results={name: dict.fromkeys(COLUMNS, numbers) for name, numbers in results.items()},
        embedders=embedders,
    )


def printed(table: Any, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None, markup=False)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def rows(text: str) -> list[list[str]]:
    """Cells of a printed table, the lines of a wrapped row joined."""
    found: list[list[str]] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split("[│┃]", line)[1:-1]]
        if not cells:
            continue
        if found and not any(cells[1:]):
            found[-1][0] += f" {cells[0]}"
        else:
            found.append(cells)
    return found


def every_label() -> dict[str, dict[str, float]]:
    numbers: dict[str, dict[str, float]] = {}
    for label in LABELS:
        metric, _, name = label.partition("/")
        numbers.setdefault(metric, {})[name] = 1234.5
    return numbers


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_word_and_no_number_is_cut(width: int) -> None:
    numbers = every_label()
    numbers["monosemanticity@labels"] = numbers.pop("monosemanticity")
    text = printed(scores_table(result(numbers, {"labels": False, "model": True})), width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    shown = {cells[0] for cells in rows(text)}
    wanted = {
        row_label(metric, name, {"labels": False}) for metric, of in numbers.items() for name in of
    }
    assert wanted <= shown
    assert text.count("1234.500") == 5 * len(LABELS)


def test_a_name_of_its_own_fits_eighty_columns_too() -> None:
    table = scores_table(result({"my_firing": {"mean_rate_of_every_latent": 0.5}}, {}))
    text = printed(table, 80)
    assert "my firing, mean rate of every latent" in {cells[0] for cells in rows(text)}
    long = scores_table(result({"x@" + "a" * 40: {"y": 0.5}}, {"a" * 40: False}))
    assert max(map(len, printed(long, 80).splitlines())) <= 80


def test_a_metric_of_one_number_is_not_named_twice() -> None:
    assert row_label("fvu", "fvu", {}) == "unexplained variance, as VISAEBench defines it"
    assert row_label("my_rate", "my_rate", {}) == "my rate"
    assert row_label("my_rate", "value", {}) == "my rate, value"
    for metric in available():
        assert f"{metric}, {metric}" not in row_label(metric, metric, {})


def test_what_is_undefined_for_all_has_no_row() -> None:
    numbers = {"fvu": {"fvu": math.nan, "explained_variance": 0.5}}
    found = [cells[0] for cells in rows(printed(scores_table(result(numbers, {})), 80))]
    assert "explained variance" in found
    assert not any("unexplained" in label for label in found)
