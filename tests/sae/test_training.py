"""Training through SAELens's trainer, and what is saved in an environment without this package."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sae_lens import (
    SAE,
    LoggingConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
)

import vision_plugin as vp
from vision_plugin.models import UnknownHookError
from vision_plugin.sae import VisionSAERunnerConfig, VisionSAETrainingRunner, train

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / f"{i}.png")
    return str(root)


@pytest.fixture
def cfg(tiny_clip: str, folder: str, tmp_path: Path) -> VisionSAERunnerConfig:
    return VisionSAERunnerConfig(
        model_name=tiny_clip,
        images=folder,
        hook_name=HOOK,
        sae=TopKTrainingSAEConfig(d_in=32, d_sae=64, k=4),
        training_tokens=6400,
        train_batch_size_tokens=64,
        n_batches_in_buffer=4,
        lr=3e-3,
        output_path=str(tmp_path / "sae"),
    )


def test_training_learns_and_saves_what_stock_saelens_loads(cfg) -> None:
    sae = train(cfg)
    assert type(sae).__module__.startswith("sae_lens.")
    model = vp.load_model(cfg.model_name)
    pixels = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(42))
    x = model.harvest(pixels, HOOK)[HOOK].flatten(0, 1)

    def unexplained(dictionary: SAE) -> float:
        with torch.no_grad():
            error = (x - dictionary(x)).square().sum()
        return float(error / (x - x.mean(0)).square().sum())

    untrained = VisionSAETrainingRunner(dataclasses.replace(cfg, output_path=None)).sae
    assert unexplained(sae) < min(0.6, unexplained(untrained))
    files = {path.name for path in Path(cfg.output_path).iterdir()}
    expected = {"cfg.json", "runner_cfg.json", "sae_weights.safetensors", "sparsity.safetensors"}
    assert files == expected
    metadata = json.loads(Path(cfg.output_path, "cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == HOOK
    assert metadata["tokens"] == "all"
    assert metadata["model_name"] == cfg.model_name
    assert metadata["preprocessing"] == model.image_processor.fingerprint()
    with model.saes([sae]):
        model(torch.randn(1, 3, 32, 32))


def test_a_run_follows_from_its_seed(cfg, tmp_path) -> None:
    first = train(dataclasses.replace(cfg, output_path=str(tmp_path / "a")))
    again = train(dataclasses.replace(cfg, output_path=str(tmp_path / "b")))
    other = train(dataclasses.replace(cfg, output_path=str(tmp_path / "c"), seed=1))
    assert torch.equal(first.W_enc, again.W_enc)
    assert not torch.equal(first.W_enc, other.W_enc)


def test_activation_scaling_folds_without_changing_the_function(cfg) -> None:
    """SAELens scales activations while it trains and folds the scale in when it is done."""
    sae = train(
        dataclasses.replace(
            cfg,
            sae=TopKTrainingSAEConfig(
                d_in=32, d_sae=64, k=4, normalize_activations="expected_average_only_in"
            ),
        )
    )
    model = vp.load_model(cfg.model_name)
    pixels = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(42))
    x = model.harvest(pixels, HOOK)[HOOK].flatten(0, 1)
    assert sae.cfg.normalize_activations == "none"
    with torch.no_grad():
        error = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert float(error) < 0.6


@pytest.mark.slow
def test_wandb_offline_keeps_the_curves(cfg, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    logging = LoggingConfig(log_to_wandb=True, wandb_log_frequency=10, log_weights_to_wandb=False)
    train(dataclasses.replace(cfg, logger=logging))
    (run,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"metrics/explained_variance" in run.read_bytes()


def test_everything_wrong_is_found_before_anything_is_written(cfg, tmp_path) -> None:
    wrong = {
        "model_name": (str(tmp_path / "nowhere"), ValueError, "could not load a model"),
        "images": (str(tmp_path / "no-images"), FileNotFoundError, "no-images"),
        "hook_name": ("blocks.7.hook_resid_post", UnknownHookError, "no hook named"),
        "sae": (StandardTrainingSAEConfig(d_in=99, d_sae=8), ValueError, "d_in=99.*32 dimensions"),
    }
    for field, (value, error, message) in wrong.items():
        with pytest.raises(error, match=message):
            train(dataclasses.replace(cfg, **{field: value}))
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_in_use_is_kept_unless_told_otherwise(cfg) -> None:
    out = Path(cfg.output_path)
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"'precious\.txt', so it is left alone"):
        train(cfg)
    assert (out / "precious.txt").read_text() == "mine"


@pytest.mark.slow
def test_an_interrupted_run_leaves_no_half_written_sae(cfg, monkeypatch) -> None:
    runner = VisionSAETrainingRunner(cfg)
    monkeypatch.setattr(
        type(runner.sae),
        "save_inference_model",
        lambda *_: (_ for _ in ()).throw(OSError("disk full")),
    )
    with pytest.raises(OSError, match="disk full"):
        runner.run()
    assert not Path(cfg.output_path).exists()
    left = [path.name for path in Path(cfg.output_path).parent.iterdir()]
    assert left == ["sae.checkpoints"], "only the checkpoints, to go on from"


def test_the_definition_survives_json(cfg, tmp_path) -> None:
    cfg.save(tmp_path / "run.json")
    assert VisionSAERunnerConfig.from_dict(json.loads((tmp_path / "run.json").read_text())) == cfg
    with pytest.raises(ValueError, match=r"unknown fields.*learning_rate"):
        VisionSAERunnerConfig.from_dict({**cfg.to_dict(), "learning_rate": 1})


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tokens", "clss", "not a kind of token"),
        ("lr", 0.0, "lr=0.0: use a number above 0"),
        ("training_tokens", 3, "less than one batch"),
    ],
)
def test_nonsense_is_refused_when_it_is_said(cfg, field, value, message) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(cfg, **{field: value})
