"""The simulator of many GPUs, against what a pencil gives."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks._scale_model import GPUS, JOBS, Rates, limits, simulate, table

JOB = replace(JOBS[0], images=2048 * 640)
CALM = replace(Rates(), node_hours_between_failures=1e12)


@pytest.mark.parametrize("n_gpus", GPUS)
def test_a_job_takes_its_images_over_the_narrowest_rate_and_the_start(n_gpus: int) -> None:
    found = simulate(JOB, CALM, n_gpus)
    rate = min(limits(JOB, CALM, n_gpus).values())
    expected = JOB.images / rate + CALM.start_seconds
    assert float(found["hours"]) * 3600 == pytest.approx(expected, rel=0.1)
    assert found["shards_again"] == 0


def test_what_is_narrow_is_named_and_machines_that_die_cost_time() -> None:
    assert simulate(JOB, replace(CALM, disk_bytes=1e4), 8)["limited_by"] == "storage"
    assert simulate(JOB, replace(CALM, gpu_images=1.0), 8)["limited_by"] == "GPUs"
    dying = simulate(JOB, replace(Rates(), node_hours_between_failures=0.02), 8)
    assert int(dying["shards_again"]) > 0
    assert float(dying["hours"]) > float(simulate(JOB, CALM, 8)["hours"])


def test_the_table_says_what_was_assumed_and_what_was_measured() -> None:
    text = table(replace(CALM, task_overhead=0.125), {"task_overhead": "measured here on CPUs"})
    assert "task_overhead = 0.125 (measured here on CPUs)" in text
    assert "gpu_images = 2000 (assumed)" in text
    assert text.count("LAION-400M") == 2 * len(GPUS)
