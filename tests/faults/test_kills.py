"""Commands that are killed at random moments lose nothing, and end with the same bytes.

``python -m benchmarks.kills`` does the same a thousand times.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults._hostile import import_everything
from tests.faults._kills import JOBS, Job, content, kill_often

pytestmark = pytest.mark.usefixtures("one_thread")


QUICK, LONGEST = ("extract", "convert"), ("demo", "train")


def cases() -> list[Any]:
    """Every job; the slow tests have more of them, the exhaustive ones what takes longest."""
    found = []
    for job in JOBS:
        again = job.earlier is not None
        marks = [pytest.mark.slow] if again or job.command not in QUICK else []
        if job.command in LONGEST:
            marks = [pytest.mark.exhaustive]
        found.append(pytest.param(job, id=job.command + "-again" * again, marks=marks))
    return found


@pytest.mark.parametrize("job", cases())
def test_killed_at_random_moments(job: Job, tmp_path: Path) -> None:
    import_everything()
    figures = kill_often(job, tmp_path, 3, seed=1, in_a_row=3)
    assert figures.kills == 3
    assert figures.runs >= 1
    assert figures.faults == []


def test_a_difference_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"x": 1, "seconds": 2}')
    before = content(tmp_path)
    (tmp_path / "a.json").write_text('{"x": 1, "seconds": 3}')
    assert content(tmp_path) == before
    (tmp_path / "a.json").write_text('{"x": 2, "seconds": 3}')
    assert content(tmp_path) != before
