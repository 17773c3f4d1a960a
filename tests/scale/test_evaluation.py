"""Metrics over ranges of the images, merged: the numbers of one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from vision_plugin import load_model
from vision_plugin.evaluation import evaluate, score_part
from vision_plugin.evaluation._part import N_RANGES, ranges_of
from vision_plugin.metrics import available


class Ranges:
    """An engine that scores ranges one after the other, the last first, in this process."""

    def evaluation(self, cfg: Any, ranges: list[range], at_once: int) -> Any:
        for number in reversed(range(len(ranges))):
            yield number, score_part(cfg, ranges[number], at_once)


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small trained SAE of the packaged model."""
    import sae_lens

    import vision_plugin as vp

    folder = tmp_path_factory.mktemp("sae") / "sae"
    cfg = vp.VisionSAERunnerConfig(
        model_name="demo",
        images="demo:64@0",
        hook_name="blocks.2.hook_resid_post",
        sae=sae_lens.TopKTrainingSAEConfig(d_in=load_model("demo").cfg.d_model, d_sae=96, k=6),
        training_tokens=8192,
        train_batch_size_tokens=256,
        output_path=str(folder),
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
    )
    vp.train(cfg)
    return str(folder)


def numbers(found: Any, place: str = "") -> dict[str, float]:
    """Every number of nested results by its place."""
    if isinstance(found, dict):
        parts = [numbers(value, f"{place}/{key}") for key, value in found.items()]
    elif isinstance(found, list):
        parts = [numbers(value, f"{place}/{index}") for index, value in enumerate(found)]
    else:
        return {place: float(found)} if isinstance(found, int | float) else {}
    return {name: value for part in parts for name, value in part.items()}


def compare(sae: str, tmp_path: Path, engine: Any) -> None:
    settings: dict[str, Any] = {
        "metrics": ["fvu", "sparsity", "monosemanticity", "uniqueness", "top_images", "hierarchy"],
        "controls": ["neurons", "random"],
        "taxonomy": "demo",
        "group_widths": [32, 96],
        "batch_size": 8,
        "steering_images": 0,
        "progress": False,
    }
    assert set(settings["metrics"]) <= set(available())
    images = "demo:150@1"
    one = evaluate(sae, "demo", images, output_path=str(tmp_path / "one.json"), **settings)
    two = evaluate(
        sae, "demo", images, output_path=str(tmp_path / "two.json"), engine=engine, **settings
    )
    assert two.encoded.ids == one.encoded.ids
    assert torch.equal(two.encoded.neurons, one.encoded.neurons)
    assert torch.equal(two.encoded.latents.to_dense(), one.encoded.latents.to_dense())
    parts = ("per_latent", "details", "summary")
    here, there = ({k: r.to_dict()[k] for k in parts} for r in (one, two))
    expected, found = numbers(here), numbers(there)
    assert expected.keys() == found.keys()
    assert len(expected) > 1000
    for name, value in expected.items():
        close = math.isclose(found[name], value, rel_tol=1e-12, abs_tol=1e-12)
        assert close or (math.isnan(found[name]) and math.isnan(value)), name


@pytest.mark.slow
def test_ranges_scored_in_any_order_have_the_numbers_of_one_pass(sae: str, tmp_path: Path) -> None:
    compare(sae, tmp_path, Ranges())


def test_ranges_are_whole_batches_and_cover_every_image() -> None:
    for n_images in (1, 7, 8, 9, 129, 1000):
        found = ranges_of(n_images, 8)
        assert [place for part in found for place in part] == list(range(n_images))
        assert len(found) <= N_RANGES
        assert all(part.start % 8 == 0 and len(part) for part in found)
