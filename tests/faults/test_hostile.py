"""Hostile files and command lines: read, or refused in one sentence, in time, and nothing else.

This is a fixed part of the corpus; ``make hostile`` runs all of it.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.faults import _corpus as corpus
from tests.faults._corpus import Case
from tests.faults._corpus._samples import files_of
from tests.faults._hostile import import_everything, run
from vision_plugin.cli import COMMANDS

pytestmark = pytest.mark.usefixtures("one_thread")

FIXED = corpus.fixed_cases()


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Everything is imported before the first fork."""
    import_everything()


def test_the_corpus_is_large() -> None:
    rules = corpus.every_rule()
    lines = [rule for rule in rules if rule.kind.startswith("vision-plugin ")]
    assert sum(rule.count for rule in rules) - len(lines) >= 10_000
    assert len(lines) >= 300
    assert {rule.kind.removeprefix("vision-plugin ") for rule in lines} == set(COMMANDS)
    assert len({(rule.kind, rule.name) for rule in rules}) == len(rules)
    assert len(FIXED) >= 300


QUICK = ("vision-plugin train", "vision-plugin eval")
"""Commands whose lines are in the short form; the slow tests have those of all."""


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=pytest.mark.slow)
        if kind.startswith("vision-plugin ") and kind not in QUICK
        else kind
        for kind in dict.fromkeys(case.kind for case in FIXED)
    ],
)
def test_the_fixed_part_is_read_or_refused(kind: str, tmp_path: Path) -> None:
    outcomes = run([case for case in FIXED if case.kind == kind], tmp_path)
    wrong = [outcome for outcome in outcomes if not outcome.right]
    assert not wrong, "\n".join(map(str, wrong))


def test_an_input_is_the_same_whenever_it_is_made(tmp_path: Path) -> None:
    for number, case in enumerate(FIXED[::9]):
        made = []
        for again in ("one", "two"):
            folder = tmp_path / again / str(number)
            folder.mkdir(parents=True)
            corpus.case_of(case.name).write(folder)
            made.append(files_of(folder) if case.kind != "special file" else {})
        assert made[0] == made[1], case.name


def spin(_: Path) -> None:
    """Never end."""
    while True:
        pass


def wait(_: Path) -> None:
    """Never do anything."""
    time.sleep(1000)


def allocate(_: Path) -> None:
    """Take more memory than an input may."""
    bytearray(1200 << 20).find(b"x")


def fail(path: Path) -> None:
    """Fail as no reader should."""
    {}[path.name]


def mumble(_: Path) -> None:
    """Refuse without saying what."""
    raise ValueError("that is not what was expected here")


def refuse(path: Path) -> None:
    """Refuse as a reader should."""
    raise ValueError(f"{path} is not what was expected: write it anew")


def litter(path: Path) -> None:
    """Leave half a file."""
    path.with_suffix(".partial").write_text("x")


def trespass(path: Path) -> None:
    """Change what lies beside."""
    (path.parents[2] / "canary" / "keep.txt").write_text("touched")


def slow(_: Path) -> None:
    """Take longer than an input may, and end."""
    end = time.process_time() + 2.3
    while time.process_time() < end:
        pass


@pytest.mark.parametrize(
    ("read", "manner"),
    [
        *(
            (spin, "hang"),
            (wait, "hang"),
            (slow, "hang"),
            (allocate, "memory"),
            (fail, "traceback"),
        ),
        *((mumble, "unclear"), (refuse, "refused"), (litter, "canary"), (trespass, "canary")),
        (Path.stat, "read"),
    ],
)
def test_the_runner_sees_it(read, manner: str, tmp_path: Path) -> None:
    def make(folder: Path, _: object) -> Path:
        (folder / "input.txt").write_text("x")
        return folder / "input.txt"

    cases = [Case("x", "y", 0, make, read), Case("x", "y", 1, make, Path.stat)]
    if manner == "canary":
        cases = cases[:1]
    outcomes = run(cases, tmp_path)
    assert [one.manner for one in outcomes] == [manner, "read"][: len(cases)]
