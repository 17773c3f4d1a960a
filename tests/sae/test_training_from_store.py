"""Training takes a store of activations wherever it takes images."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import vision_plugin as vp
from tests.activations._stores import MLP, RESID, tiny_model
from tests.activations.conftest import one_thread
from tests.sae._runs import ARCHITECTURES, MLP_IN, MLP_OUT, config, runner, store_of
from vision_plugin.activations import StoreMismatchError, extract
from vision_plugin.sae import train

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("store") / "s"
    store_of(folder, hook_names=[RESID, MLP, MLP_IN, MLP_OUT])
    return str(folder)


def test_the_store_s_folder_is_enough(store: str, tmp_path: Path) -> None:
    """No model is loaded: there is none of the name."""
    sae = train(config(tmp_path / "sae", images=store, training_tokens=32 * 60))
    x = vp.activations.ActivationStore(store).activations(RESID).flatten(0, 1)
    with torch.no_grad():
        unexplained = (x - sae(x)).square().sum() / (x - x.mean(0)).square().sum()
    assert float(unexplained) < 0.8
    metadata = json.loads((tmp_path / "sae" / "cfg.json").read_text())["metadata"]
    assert (metadata["hook_name"], metadata["tokens"]) == (RESID, "all")
    assert (metadata["model_name"], metadata["n_images"]) == ("tiny", 12)
    assert metadata["preprocessing"] == tiny_model().image_processor.fingerprint()
    with tiny_model().saes([sae]):
        tiny_model()(torch.randn(1, 3, 32, 32))


def test_the_width_comes_from_the_store(store: str, tmp_path: Path) -> None:
    unknown = dataclasses.replace(ARCHITECTURES["topk"](), d_in=0)
    sae = train(config(tmp_path / "sae", images=store, hook_name=MLP, sae=unknown))
    assert sae.cfg.d_in == 24


def test_a_transcoder_takes_two_hooks_of_it(store: str, tmp_path: Path) -> None:
    sae = train(config(tmp_path / "sae", "skip_transcoder", images=store))
    assert type(sae).__name__ == "SkipTranscoder"
    assert sae.cfg.metadata.hook_name_out == MLP_OUT


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": "cls"}, "tokens: 'cls' expected, 'all' in the store"),
        ({"hook_name": "blocks.0.hook_resid_post"}, "blocks.0.hook_resid_post"),
        (
            {"sae": dataclasses.replace(ARCHITECTURES["topk"](), d_in=8)},
            "d_in: 8 expected, 16 in the store",
        ),
    ],
)
def test_a_store_that_does_not_fit_is_one_clear_sentence(
    store: str, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        runner(config(tmp_path / "sae", images=store, **changes), images=None)
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_told_by_its_weights(store: str, tmp_path: Path) -> None:
    cfg = config(tmp_path / "sae", images=store)
    torch.manual_seed(1)
    with pytest.raises(StoreMismatchError, match=r"model: 'tiny' expected, 'tiny' \(other weights"):
        runner(cfg, model=tiny_model(seed=1), images=None)


def test_an_unfinished_store_is_refused(store: str, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(store, tmp_path / "unfinished"))
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="incomplete: run the same extraction again"):
        train(config(tmp_path / "sae", images=str(folder)))


def test_values_that_are_not_finite_name_their_images(store: str, tmp_path: Path) -> None:
    run = runner(config(tmp_path / "sae", images=store), images=None)
    gathered = run.batches.batches.next_batch

    def broken():
        batch = gathered()
        batch.activations[RESID][3] = float("nan")
        return batch

    run.batches.batches.next_batch = broken
    with pytest.raises(ValueError, match=r"1 activation vectors .* not finite \(images "):
        run.run()
    assert list(tmp_path.iterdir()) == []


def test_extract_stands_at_the_top() -> None:
    assert vp.extract is extract
