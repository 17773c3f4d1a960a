"""Freed memory is kept while that is asked for, and goes back to the system then."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vision_plugin._allocator import _may_be_set, freed_memory_kept

ROUNDS = 20
ROOT = Path(__file__).parents[1]


def faults() -> int:
    """Pages that the system had to provide while large tensors came and went."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(ROUNDS):
        torch.ones(10 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def seen_in_a_new_process() -> list[int]:
    """In a fork of this one it would matter what other tests have left in memory."""
    code = "from tests.test_allocator import work; print(*work())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def resident() -> int:
    """Pages in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1])


def work() -> list[int]:
    """Faults before and within; pages that are left in memory more than before."""
    torch.set_num_threads(1)
    before, pages = faults(), resident()
    with freed_memory_kept():
        with freed_memory_kept():
            faults()  # until there is enough to give out again
        within = faults()  # the end of a block within changes nothing
    return [before, within, resident() - pages]


def test_memory_is_kept_within_and_given_back_after(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    if not _may_be_set():
        pytest.skip("the C library is not glibc, or its allocator is configured from outside")
    before, within, left = seen_in_a_new_process()
    assert before > ROUNDS
    assert within < before / 5
    assert left < 10 * 2**20 * 4 // 4096 // 2


@pytest.mark.slow
def test_an_allocator_that_someone_has_configured_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000")
    before, within, _ = seen_in_a_new_process()
    assert within > before / 2
