"""Every benchmark starts as a module and as a file, from any folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
START = """
import runpy, sys
for script in sys.argv[1:]:
    before = list(sys.path)
    sys.path.insert(0, str(__import__("pathlib").Path(script).parent))  # as Python does
    for name in [n for n in sys.modules if n.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]
    runpy.run_path(script, run_name="started")
    sys.path[:] = before
    print(script)
"""


def scripts() -> list[str]:
    found = [p for p in BENCHMARKS.rglob("[a-z]*.py") if '__name__ == "__main__"' in p.read_text()]
    return sorted(map(str, found))


def test_each_finds_the_checkout_whatever_it_imports_later() -> None:
    for script in scripts():
        assert "sys.path.insert(0, str(Path(__file__).parents[" in Path(script).read_text(), script


@pytest.mark.slow
def test_each_starts_as_a_file(tmp_path: Path) -> None:
    assert len(scripts()) >= 12
    done = subprocess.run(
        [sys.executable, "-c", START, *scripts()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == scripts(), done.stderr
