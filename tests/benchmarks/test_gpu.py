"""The script for a GPU, rehearsed on the CPU at small sizes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import gpu


def _rehearsed(out: Path, *only: str) -> dict:
    arguments = ["--rehearse", "--out", str(out)]
    status = gpu.main([*arguments, "--only", *only] if only else arguments)
    report = json.loads(out.read_text())
    failed = {name: report["stages"][name] for name in report["failed"]}
    assert (status, failed) == (0, {})
    return report


@pytest.mark.slow
def test_stages_of_the_script_run_on_a_cpu(tmp_path):
    report = _rehearsed(
        tmp_path / "gpu.json", "encoder, tiny", "decoder, tiny", "captured and eager"
    )
    encoder = report["stages"]["encoder, tiny"]
    assert encoder["rows_where_dense_chooses_as_float64"] > 0.95
    assert set(report["stages"]["captured and eager"]) == {
        "topk", "batchtopk", "matryoshka_batchtopk"
    }  # fmt: skip
    assert report["rehearsal"] is True


def test_a_stage_that_fails_is_written_down_and_the_others_go_on(tmp_path, monkeypatch):
    def fails(options):
        raise RuntimeError("the card fell off the bus")

    both = {"bad": fails, "good": lambda options: {"fine": 1}, "late": lambda options: {}}
    monkeypatch.setattr(gpu, "stages", lambda options: both)
    out = tmp_path / "gpu.json"
    assert gpu.main(["--rehearse", "--out", str(out)]) == 1
    report = json.loads(out.read_text())
    assert report["failed"] == ["bad"]
    assert "fell off the bus" in report["stages"]["bad"]["error"]
    assert report["stages"]["good"] == {"fine": 1}
    assert gpu.main(["--rehearse", "--seconds", "-1", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["no_time_for"] == ["bad", "good", "late"]


@pytest.mark.exhaustive
def test_the_whole_script_is_rehearsed_on_a_cpu(tmp_path):
    report = _rehearsed(tmp_path / "gpu.json")
    assert list(report["stages"]) == list(gpu.stages(gpu.Options("cpu", True, 0, 1)))
    steps = report["stages"]["steps, tiny"]
    assert {"vp.train, no dead latents", "vp.train, 20% dead"} <= set(steps["ms"])
    assert report["stages"]["job"]["seconds"].keys() >= {"extraction", "training", "evaluation"}
