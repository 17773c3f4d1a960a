"""The demo job, small; and the truths it rests on, on the demo world's own factors."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from vision_plugin.activations import ActivationStore
from vision_plugin.demo import draw
from vision_plugin.demo.job import (
    FACTORS_OF_TRUTH,
    DemoConfig,
    one_hot,
    own_code_test,
    rotation,
    run_demo,
    true_latents,
)
from vision_plugin.metrics import monosemanticity


@pytest.mark.parametrize("factor", FACTORS_OF_TRUTH)
def test_a_factor_scores_one_with_its_own_code_and_its_rotation_the_mean(factor: str) -> None:
    test = own_code_test(draw(1500, seed=5).scenes, factor, seed=0)
    assert test.factors == pytest.approx(1, abs=1e-12)
    assert test.rotation == pytest.approx(test.mean_similarity, abs=0.03)
    assert test.mean_similarity < 0.5


def test_mixing_a_factor_with_others_lowers_its_score_step_by_step() -> None:
    scenes = draw(800, seed=6).scenes
    code, _ = one_hot(scenes, "shape")
    other = code[torch.randperm(len(code), generator=torch.Generator().manual_seed(0))]
    scores = [
        monosemanticity((1 - t) * code + t * other, code).summary()["mean_score"]
        for t in torch.linspace(0, 0.9, 10).tolist()
    ]
    assert all(later < earlier for earlier, later in pairwise(scores))


def test_true_latents_fire_for_one_shape_in_one_colour() -> None:
    latents = true_latents(draw(200, seed=7).scenes)
    assert torch.equal(latents.sum(dim=1), torch.ones(200, dtype=torch.float64))


def test_a_rotation_is_orthogonal() -> None:
    q = rotation(12, seed=3)
    torch.testing.assert_close(q @ q.T, torch.eye(12, dtype=torch.float64))


@pytest.mark.slow
def test_the_whole_job_runs_and_orders_truth_above_sae_above_neurons_above_noise(
    tmp_path: Path,
) -> None:
    lines: list[str] = []
    cfg = DemoConfig(
        output_path=str(tmp_path / "demo"),
        training_images=1000,
        training_tokens=60_000,
        d_sae=128,
        images=600,
        steered_latents=2,
    )
    result = run_demo(cfg, lines.append)
    ladder = result.ladder
    order = ["true factors", "trained SAE", "raw neurons", "rotated factors"]
    steps = [ladder[higher] - ladder[lower] for higher, lower in pairwise(order)]
    assert min(steps) > 0.02, ladder
    written = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert written["ladder"] == ladder
    assert len(written["evaluation"]["per_latent"]["monosemanticity"]["sae"]["score"]) == 128
    assert result.report is not None
    assert result.report.is_file()
    assert (tmp_path / "demo" / "sae" / "sae_weights.safetensors").is_file()
    assert len(lines) == 6
    assert len(result.answers) == 2
    for found in result.answers.values():
        assert found.before < 0.2
        assert found.after > found.before + 0.3
    smaller = dataclasses.replace(cfg, training_images=400, training_tokens=6_000, images=200)
    again = run_demo(smaller, lines.append)
    assert again.report == result.report
    assert len(ActivationStore(tmp_path / "demo" / "activations")) == 400


@pytest.mark.parametrize(
    "wrong",
    [
        *({"training_images": 0}, {"images": 0}, {"steered_latents": -1}, {"seed": -1}),
        *({"d_sae": 0}, {"k": 0}, {"k": 999}, {"training_tokens": 100}, {"tokens": "nosuch"}),
    ],
    ids=str,
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(
    wrong: dict[str, Any], tmp_path: Path
) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=name.replace("tokens", "token")):
        run_demo(DemoConfig(output_path=str(tmp_path / "demo"), **wrong), print)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "results.json").write_text('{"schema": "vision_plugin.demo/1"}')
    with pytest.raises(
        FileExistsError, match=r"photos: no demo wrote it, .* name another output_path="
    ):
        run_demo(DemoConfig(output_path=str(tmp_path)), print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "results.json"]
