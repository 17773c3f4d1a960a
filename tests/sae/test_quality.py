"""What a run says of the SAE that it made: measured on vectors, not told by a counter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens import SAE

from tests.activations.conftest import one_thread
from tests.sae._runs import config, runner, store_of
from vision_plugin import metrics
from vision_plugin.cli import main
from vision_plugin.sae import monosemanticity_loss, train_many

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


def dying(path: Path | None, **changes: Any) -> Any:
    """A run in which most of 512 latents never fire, and that is shorter than SAELens's window."""
    sae = sae_lens.TopKTrainingSAEConfig(d_in=16, d_sae=512, k=1)
    return config(path, sae=sae, dead_feature_window=1000, n_quality_tokens=500, **changes)


def test_a_run_shorter_than_the_window_does_not_call_its_dead_latents_alive(tmp_path: Path) -> None:
    run = runner(dying(tmp_path / "sae"))
    sae = run.run()
    vectors = torch.cat([next(run.batches) for _ in range(16)])
    truth = int(((sae.encode(vectors) > 0).sum(0) == 0).sum())
    assert truth > 100
    metadata = json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]
    assert metadata["num_dead_features"] == pytest.approx(truth, abs=20)
    assert metadata["quality"]["n_dead"] == metadata["num_dead_features"]
    assert run.quality is not None
    assert run.quality.n_alive + run.quality.n_dead == run.quality.n_latents == 512


def test_the_figures_are_those_of_the_saved_sae_on_the_vectors_that_come_next(
    tmp_path: Path,
) -> None:
    run = runner(config(tmp_path / "sae", n_quality_tokens=256))
    seen: list[torch.Tensor] = []
    plain = run.batches.__class__.__next__

    def noted(self: Any) -> Any:
        batch = plain(self)
        seen.append(batch)
        return batch

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run.batches.__class__, "__next__", noted)
        run.run()
    x = torch.cat(seen[-8:])  # 256 vectors, behind the 24 batches of training
    sae = SAE.load_from_disk(tmp_path / "sae")
    with torch.no_grad():
        error = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert run.quality is not None
    assert run.quality.n_vectors == len(x)
    assert run.quality.explained_variance == pytest.approx(1 - float(error), abs=1e-4)
    assert run.quality.l0 == pytest.approx(float((sae.encode(x) != 0).sum(1).float().mean()))


def test_a_run_that_ends_with_dead_latents_says_what_to_change() -> None:
    run = runner(dying(None))
    run.run()
    assert run.quality is not None
    advice = run.quality.advice(run.cfg)
    assert "% of the latents are dead" in advice
    assert "set defaults to auto" in advice
    healthy = runner(config(None))
    healthy.run()
    assert healthy.quality is not None
    assert healthy.quality.advice(healthy.cfg) == ""


def test_the_command_ends_with_the_figures(tmp_path: Path, capsys: Any) -> None:
    store_of(tmp_path / "store")
    line = (
        f"train --model-name tiny --images {tmp_path / 'store'} --d-sae 64 --k 4 "
        f"--hook-name {config(None).hook_name} --training-tokens 600 "
        f"--output-path {tmp_path / 'sae'}"
    )
    assert main(line.split()) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Decided from the data and the run: " in shown
    assert "of 64 latents alive (" in shown
    assert "explained variance" in shown


def test_several_saes_have_figures_each(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store")
    cfgs = {"a": config(None, "topk"), "b": config(None, "standard")}
    train_many(cfgs, output_path=str(tmp_path / "saes"), images=store)
    for name in cfgs:
        metadata = json.loads((tmp_path / "saes" / name / "cfg.json").read_text())["metadata"]
        assert metadata["quality"]["n_latents"] == 32


def test_the_progress_line_speaks_of_the_sae(capfd: Any) -> None:
    runner(config(None)).run()
    shown = capfd.readouterr().err
    assert "explained variance" in shown
    assert "latents fired in the last" in shown


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["batchtopk", "standard"])
def test_the_monosemantic_term_raises_the_score_of_a_batch(architecture: str) -> None:
    scores = {}
    for coefficient in (0.0, 3.0):
        run = runner(
            config(None, architecture, mono_coefficient=coefficient, training_tokens=100 * 32)
        )
        sae = run.run()
        x = torch.cat([next(run.batches) for _ in range(16)])
        with torch.no_grad():
            found = metrics.monosemanticity(sae.encode(x), torch.nn.functional.normalize(x, dim=1))
        scores[coefficient] = float(found.score.nanmean())
    assert scores[3.0] > scores[0.0]


def test_the_monosemantic_term_is_one_less_the_mean_score() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 8, generator=generator)
    latents = torch.randn(40, 6, generator=generator).relu()
    score = metrics.monosemanticity(latents, torch.nn.functional.normalize(x, dim=1)).score
    loss = monosemanticity_loss(x, latents)
    assert float(loss) == pytest.approx(1 - float(score.mean()), abs=1e-5)
