"""Held-out images, looked at while training."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sae_lens import SAE, LoggingConfig, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

import vision_plugin as vp
from tests.activations.conftest import one_thread
from tests.sae._runs import Killed, kill, stop_at, weights
from vision_plugin.images import open_images
from vision_plugin.sae import Validator, VisionSAERunnerConfig, VisionSAETrainingRunner

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

HOOK = "blocks.1.hook_resid_post"
LABELS = ("a red circle", "a blue square", "a green star")


@pytest.fixture(scope="module")
def model(tiny_clip: str) -> Any:
    return vp.load_model(tiny_clip)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Images to train on, and others to look at, by label."""
    rng = np.random.default_rng(0)
    roots = []
    for n in (6, 4):
        root = tmp_path_factory.mktemp("images")
        for label in LABELS:
            (root / label).mkdir()
            for i in range(n):
                values = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(values).save(root / label / f"{i}.png")
        roots.append(str(root))
    return roots[0], roots[1]


def config(folders: tuple[str, str], out: Path, **changes: Any) -> VisionSAERunnerConfig:
    settings: dict[str, Any] = {
        "sae": TopKTrainingSAEConfig(
            d_in=32, d_sae=48, k=4, normalize_activations="expected_average_only_in"
        ),
        "model_name": "tiny",
        "images": folders[0],
        "hook_name": HOOK,
        "training_tokens": 20 * 64,
        "train_batch_size_tokens": 64,
        "n_batches_in_buffer": 2,
        "n_batches_for_norm_estimate": 2,
        "lr": 3e-3,
        "validation_images": folders[1],
        "n_validations": 4,
        "validation_template": "{}",
        "validation_metrics": ("uniqueness", "localization"),
        "output_path": str(out),
    }
    return VisionSAERunnerConfig(**{**settings, **changes})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "validation.jsonl").read_text().splitlines()]


class AsTheModelSeesThem:
    """Images whose labels are the model's own guesses: ablation can only raise the loss."""

    def __init__(self, folder: str, model: Any) -> None:
        source = open_images(folder)
        self.images, self.ids = list(source), source.ids
        images = model.encode_image(model.preprocess(self.images))
        guesses = (images @ model.encode_text(list(LABELS)).T).argmax(1)
        self.labels = [LABELS[guess] for guess in guesses.tolist()]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Image.Image:
        return self.images[index]


def test_the_last_look_is_at_the_sae_that_is_saved(folders, model, tmp_path: Path) -> None:
    """Every number again, from the saved SAE, in float64 and by hand."""
    cfg = config(folders, tmp_path / "sae")
    source = AsTheModelSeesThem(folders[1], model)
    assert len(set(source.labels)) > 1
    sae = VisionSAETrainingRunner(cfg, model=model, validation_images=source).run()
    records = lines(tmp_path / "sae")
    assert [record["step"] for record in records] == [5, 10, 15, 20]
    last = {key.removeprefix("validation/"): value for key, value in records[-1].items()}
    pixels = model.preprocess(source.images)
    x = model.harvest(pixels, HOOK)[HOOK]
    with torch.no_grad():
        latents = sae.encode(x)
        error = (x.double() - sae.decode(latents).double()).square().sum()
    fires = (latents != 0).double()
    assert last["l0"] == pytest.approx(float(fires.sum(-1).mean()))
    assert last["l0_cls"] == pytest.approx(float(fires[:, 0].sum(-1).mean()))
    assert last["l0_patch"] == pytest.approx(float(fires[:, 1:].sum(-1).mean()))
    frequency = fires.mean(dim=(0, 1))
    assert last["n_dead"] == int((frequency == 0).sum())
    assert last["n_dense"] == int((frequency > 0.1).sum())
    flat = x.flatten(0, 1).double()
    explained = 1 - error / (flat - flat.mean(0)).square().sum()
    assert last["explained_variance"] == pytest.approx(float(explained), abs=1e-6)
    score = vp.metrics.monosemanticity(latents.amax(1), model.encode_image(pixels)).score
    assert last["monosemanticity"] == pytest.approx(float(score[~score.isnan()].mean()), abs=1e-6)
    losses = by_hand(model, sae, pixels, source.labels)
    recovered = (losses["zeros"] - losses["spliced"]) / (losses["zeros"] - losses["clean"])
    assert last["loss_window"] == pytest.approx(losses["zeros"] - losses["clean"], abs=1e-5)
    assert last["loss_recovered"] == pytest.approx(recovered, rel=1e-3)
    assert any(key.startswith("uniqueness/") for key in last)
    assert any(key.startswith("localization/") for key in last)


def by_hand(model: Any, sae: SAE, pixels: torch.Tensor, labels: list[str]) -> dict[str, float]:
    names = list(dict.fromkeys(labels))
    targets = torch.tensor([names.index(label) for label in labels])
    texts = model.encode_text(names).double()
    edits = {
        "clean": lambda x, hook: x,
        "spliced": lambda x, hook: sae(x),
        "zeros": lambda x, hook: x * 0,
    }
    losses = {}
    for name, edit in edits.items():
        with torch.no_grad(), model.hooks(fwd_hooks=[(HOOK, edit)]):
            embeddings = model.encode_image(pixels).double()
        chances = (model.logit_scale * embeddings @ texts.T).log_softmax(-1)
        losses[name] = -float(chances[torch.arange(len(targets)), targets].mean())
    return losses


def test_looking_changes_nothing_in_the_weights(folders, model, tmp_path: Path) -> None:
    for name, images in (("seen", folders[1]), ("unseen", None)):
        cfg = config(folders, tmp_path / name, validation_images=images)
        VisionSAETrainingRunner(cfg, model=model).run()
    assert weights(tmp_path / "seen") == weights(tmp_path / "unseen")


@pytest.mark.slow
def test_a_killed_run_has_each_line_once(folders, model, tmp_path: Path, monkeypatch) -> None:
    cfg = config(folders, tmp_path / "killed", n_checkpoints=2)
    with monkeypatch.context() as patched:
        stop_at(patched, 12, kill)  # behind the look of step 10; the last checkpoint is of step 7
        with pytest.raises(Killed):
            VisionSAETrainingRunner(cfg, model=model).run()
    VisionSAETrainingRunner(cfg, model=model).run()
    straight = config(folders, tmp_path / "straight", n_checkpoints=0)
    VisionSAETrainingRunner(straight, model=model).run()
    assert lines(tmp_path / "killed") == lines(tmp_path / "straight")


@pytest.mark.slow
def test_wandb_has_the_curves_and_the_top_features(
    folders, model, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = LoggingConfig(log_to_wandb=True, wandb_log_frequency=5, log_weights_to_wandb=False)
    cfg = config(folders, tmp_path / "sae", logger=logger)
    VisionSAETrainingRunner(cfg, model=model).run()
    (run,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = run.read_bytes()
    for key in (b"validation/loss_recovered", b"metrics/explained_variance", b"hook_name"):
        assert key in content
    tables = list(run.parent.rglob("*top_features*.table.json"))
    assert len(tables) == 1
    table = json.loads(tables[0].read_text())
    assert table["columns"][:3] == ["latent", "monosemanticity", "fires on"]
    assert table["data"][0][3] == "Image"  # the images themselves are in the run's artifact


@pytest.mark.slow
def test_nothing_of_wandb_is_called_where_it_is_off(
    folders, model, tmp_path: Path, monkeypatch
) -> None:
    import wandb

    for name in ("init", "log", "finish"):
        monkeypatch.setattr(wandb, name, lambda *_, **__: pytest.fail("wandb was called"))
    VisionSAETrainingRunner(config(folders, tmp_path / "sae"), model=model).run()


def test_sae_lens_s_own_trainer_takes_it_as_its_evaluator(
    folders, model, tmp_path: Path, monkeypatch
) -> None:
    cfg = config(folders, tmp_path / "sae")
    run = VisionSAETrainingRunner(cfg, model=model)
    for name, value in {"hook_name": HOOK, "tokens": "all"}.items():
        run.sae.cfg.metadata[name] = value
    logged: list[dict[str, Any]] = []
    monkeypatch.setattr("wandb.log", lambda values, step=None: logged.append(values))
    trainer = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=64 * 4,
            train_batch_size_samples=64,
            lr_end=0.0,
            n_batches_for_norm_estimate=2,
            logger=LoggingConfig(
                log_to_wandb=True, wandb_log_frequency=1, eval_every_n_wandb_logs=2
            ),
        ),
        sae=run.sae,
        data_provider=run.batches,
        evaluator=Validator(model, open_images(folders[1]), [HOOK]),
    )
    trainer.fit()
    looks = [values for values in logged if "validation/explained_variance" in values]
    assert len(looks) == 2
    assert all(0 < values["validation/l0"] <= 4 for values in looks)


def test_an_unknown_metric_is_found_before_training(folders, model, tmp_path: Path) -> None:
    cfg = config(folders, tmp_path / "sae", validation_metrics=("uniquenes",))
    with pytest.raises(ValueError, match="did you mean 'uniqueness'"):
        VisionSAETrainingRunner(cfg, model=model)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_has_diverged_ends_at_the_next_look(
    folders, model, tmp_path: Path, monkeypatch
) -> None:
    """The message says what to change in training, not what is wrong with a file."""
    cfg = config(folders, tmp_path / "sae", n_checkpoints=0)
    runner = VisionSAETrainingRunner(cfg, model=model)
    broken = torch.tensor(float("nan"))
    monkeypatch.setattr(runner.sae, "mse_loss_fn", lambda a, b: (a - b).square() * broken)
    with pytest.raises(ValueError, match=r"not finite after step 5.*Lower lr="):
        runner.run()


@pytest.mark.parametrize("tokens", ["cls", "random:3"])
def test_other_kinds_of_token(folders, model, tmp_path: Path, tokens: str) -> None:
    cfg = config(
        folders,
        tmp_path / "sae",
        tokens=tokens,
        train_batch_size_tokens=16,
        training_tokens=16 * 8,
        n_validations=1,
        validation_metrics=(),
    )
    VisionSAETrainingRunner(cfg, model=model).run()
    (record,) = lines(tmp_path / "sae")
    assert ("validation/l0_patch" in record) == (tokens != "cls")
    assert record["validation/accuracy_spliced"] is not None


@pytest.mark.slow
def test_several_saes_share_the_images(folders, model, tmp_path: Path) -> None:
    plain = dataclasses.replace(config(folders, tmp_path / "x"), validation_metrics=())
    cfgs = {
        "a": plain,
        "b": dataclasses.replace(plain, hook_name="blocks.0.hook_resid_post"),
    }
    runner = vp.VisionMultiSAETrainingRunner(cfgs, output_path=str(tmp_path / "many"), model=model)
    runner.run()
    first, second = runner.validators.values()
    assert first.held_out is second.held_out
    (alone,) = [r for r in lines(tmp_path / "many" / "a") if r["step"] == 20]
    VisionSAETrainingRunner(
        dataclasses.replace(plain, output_path=str(tmp_path / "alone")), model=model
    ).run()
    last = lines(tmp_path / "alone")[-1]
    assert last["validation/loss_recovered"] == alone["a/validation/loss_recovered"]
    assert alone["b/validation/l0"] > 0
