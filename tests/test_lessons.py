"""The lessons run from top to bottom, and show what such a run gave."""

from __future__ import annotations

import base64
import re
import resource
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "lessons"
LESSONS = (
    "1-look-inside",
    "2-train-and-browse",
    "3-is-my-metric-right",
    "4-steer-and-repair",
    "5-vision-language",
)
SHORT = LESSONS[:2]
"""Lessons of less than a minute."""
CPU_SECONDS = 120
"""Time on one processor that a lesson may take; waiting for other work is not counted."""
LARGEST_PICTURE = 60_000
NUMBER = re.compile(r"[-+]?\d[\d.,]*%?")
COLOURING = re.compile(r"\x1b\[[0-9;]*m")
PATH = re.compile(r"(?<![\w.:/<])/(?:tmp|home|root|usr|work|opt|mnt|var|Users)/|[A-Z]:\\")
BAR = re.compile(r"TqdmWarning|import tqdm as notebook_tqdm|\d+%\|.*\||\d+it \[")


def read(name: str) -> Any:
    """Return a lesson as it is kept."""
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(notebook: Any) -> list[Any]:
    """Return its cells of code."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def texts(cell: Any, stream: str) -> str:
    """Return what a cell printed."""
    found = [o.text for o in cell.outputs if o.output_type == "stream" and o.name == stream]
    return COLOURING.sub("", "".join(found))


def first_column(cell: Any) -> list[str]:
    """Return the first column of what a cell printed, with every number as a #."""
    lines = [NUMBER.sub("#", line).strip() for line in texts(cell, "stdout").splitlines()]
    return [re.split(r" {2,}|: ", line)[0] for line in lines]


def kinds(cell: Any) -> list[str]:
    """Return what a cell displayed, printed text left out: pictures, tables and so on."""
    shown = [o for o in cell.outputs if o.output_type in ("display_data", "execute_result")]
    return ["/".join(sorted(output.data)) for output in shown]


def run(notebook: Any, folder: Path) -> float:
    """Run a lesson in a folder, in a process of its own; return what it cost in CPU seconds."""

    def spent() -> float:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = spent()
    # The limit per cell is for a cell that hangs; a busy machine is slow without hanging.
    NotebookClient(
        notebook, timeout=15 * CPU_SECONDS, kernel_name="python3", record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    ).execute()  # fmt: skip
    return spent() - before


def test_the_site_lists_every_lesson() -> None:
    kept = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    assert kept == sorted(LESSONS)
    index = (FOLDER / "index.md").read_text()
    lines = [line for line in (ROOT / "mkdocs.yml").read_text().splitlines() if "lessons/" in line]
    listed = [found for line in lines for found in re.findall(r"^ +- .*?(lessons/[\w.-]+)$", line)]
    assert listed == ["lessons/index.md", *(f"lessons/{name}.ipynb" for name in LESSONS)]
    assert re.findall(r"\]\(([\w-]+)\.ipynb\)", index) == list(LESSONS)


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_is_whole(name: str) -> None:
    """It names its model first, says what each cell is for, and kept all outputs of one run."""
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata["kernelspec"]["name"] == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    cells = code(notebook)
    assert cells[0].source == 'MODEL = "demo"'
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell.outputs) for cell in cells) >= len(cells) - 2
    before = zip(notebook.cells, notebook.cells[1:], strict=False)
    assert all(said.cell_type == "markdown" for said, cell in before if cell.cell_type == "code")
    exercises = notebook.cells[-1].source
    assert exercises.startswith("## Exercises")
    assert len(re.findall(r"^\d\. ", exercises, re.M)) in (2, 3)


@pytest.mark.parametrize("name", LESSONS)
def test_outputs_hold_nothing_of_the_machine_that_ran_them(name: str) -> None:
    notebook = read(name)
    assert all(not cell.metadata for cell in notebook.cells)
    for cell in code(notebook):
        assert not texts(cell, "stderr")
        for output in cell.outputs:
            assert output.output_type != "error"
            data = dict(output.get("data", {}))
            picture = data.pop("image/png", "")
            assert len(base64.b64decode(picture)) < LARGEST_PICTURE
            shown = "\n".join([output.get("text", ""), *map(str, data.values())])
            assert not PATH.search(shown), shown
            assert "Warning" not in shown


@pytest.mark.parametrize(
    ("text", "is_path"),
    [
        ("Saved to /tmp/x/results", True),
        ("file:'/home/me/a.py'", True),
        ("C:\\Users\\me", True),
        ("results/tmp/report", False),
        ("https://example.org/tmp/x", False),
        ("</tmp/>", False),
    ],
)
def test_absolute_paths_are_seen(text: str, is_path: bool) -> None:
    assert bool(PATH.search(text)) == is_path


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SHORT else pytest.mark.exhaustive)
        for name in LESSONS
    ],
)
def test_a_lesson_runs_and_gives_what_is_kept(name: str, tmp_path: Path) -> None:
    kept, fresh = read(name), read(name)
    for cell in code(fresh):
        cell.outputs, cell.execution_count = [], None
    seconds = run(fresh, tmp_path)
    assert seconds < CPU_SECONDS, f"{name} took {seconds:.0f} s of one processor"
    for old, new in zip(code(kept), code(fresh), strict=True):
        assert first_column(new) == first_column(old), new.source
        assert kinds(new) == kinds(old), new.source
        said = re.split(r"[\r\n]+", texts(new, "stderr"))
        assert all(not line.strip() or BAR.search(line) for line in said), said


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["1-look-inside"])
def test_a_lesson_runs_with_another_model(name: str, tiny_clip: str, tmp_path: Path) -> None:
    """Only the first cell changes: a CLIP with 3 blocks in place of 4, and other widths."""
    notebook = read(name)
    code(notebook)[0].source = f"MODEL = {tiny_clip!r}"
    run(notebook, tmp_path)
    assert all(cell.execution_count for cell in code(notebook))
    changed = [
        place
        for place, (old, new) in enumerate(zip(code(read(name)), code(notebook), strict=True))
        if texts(old, "stdout") != texts(new, "stdout")
    ]
    assert len(changed) > 2
