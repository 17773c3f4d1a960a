"""Several SAEs from one pass: each is what it would be alone."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from tests.activations._stores import MLP, RESID, tiny_model
from tests.activations.conftest import one_thread
from tests.sae import _runs
from tests.sae._runs import ARCHITECTURES, Killed, config, kill, runner, stop_at, weights
from vision_plugin.images import open_images
from vision_plugin.sae import VisionMultiSAETrainingRunner, VisionSAERunnerConfig

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


def many(**changes: object) -> dict[str, VisionSAERunnerConfig]:
    """Two layers, two widths, four architectures; with and without a scale, and a transcoder."""
    plain = config(None, **changes)
    scaled = ARCHITECTURES["standard"](normalize_activations="expected_average_only_in")
    wide = dataclasses.replace(ARCHITECTURES["batchtopk"](), d_sae=64)
    return {
        "topk": plain,
        "earlier": dataclasses.replace(plain, hook_name="blocks.0.hook_resid_post", lr=1e-3),
        "wide": dataclasses.replace(plain, sae=wide, b_dec_init_method="geometric_median"),
        "scaled": dataclasses.replace(plain, sae=scaled, decoder_init_method="data"),
        "transcoder": config(None, "skip_transcoder", **changes),
    }


def together(cfgs: dict[str, VisionSAERunnerConfig], out: Path, **overrides: object):
    settings = {"model": tiny_model(), "images": open_images(_runs.images())}
    return VisionMultiSAETrainingRunner(cfgs, output_path=str(out), **{**settings, **overrides})


def saved(folder: Path) -> dict[str, object]:
    """The settings in `cfg.json`; the run's own record, whose checksum it has, names its folder."""
    content: dict[str, object] = json.loads((folder / "cfg.json").read_text())
    checksums = content["sha256"]
    assert isinstance(checksums, dict)
    del checksums["runner_cfg.json"]
    return content


@pytest.mark.parametrize("tokens", ["all", pytest.param("random:5", marks=pytest.mark.slow)])
def test_each_is_what_it_would_be_alone(tokens: str, tmp_path: Path) -> None:
    cfgs = many(tokens=tokens)
    saes = together(cfgs, tmp_path / "many").run()
    assert list(saes) == list(cfgs)
    for name, cfg in cfgs.items():
        alone = tmp_path / "alone" / name
        runner(dataclasses.replace(cfg, output_path=str(alone))).run()
        assert weights(tmp_path / "many" / name) == weights(alone), name
        assert saved(tmp_path / "many" / name) == saved(alone), name


@pytest.mark.slow
def test_a_killed_one_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch) -> None:
    cfgs = many()
    together(cfgs, tmp_path / "straight").run()
    with monkeypatch.context() as patched:
        stop_at(patched, 15, kill)
        with pytest.raises(Killed):
            together(cfgs, tmp_path / "killed").run()
    together(cfgs, tmp_path / "killed").run()
    for name in cfgs:
        assert weights(tmp_path / "killed" / name) == weights(tmp_path / "straight" / name)


def test_from_one_store_too(tmp_path: Path) -> None:
    store = _runs.store_of(tmp_path / "store", hook_names=[RESID, MLP])
    mlp = dataclasses.replace(ARCHITECTURES["topk"](), d_in=24)
    plain = config(None)
    cfgs = {"resid": plain, "mlp": dataclasses.replace(plain, hook_name=MLP, sae=mlp)}
    together(cfgs, tmp_path / "many", images=store).run()
    for name, cfg in cfgs.items():
        alone = dataclasses.replace(cfg, output_path=str(tmp_path / name))
        runner(alone, images=store).run()
        assert weights(tmp_path / "many" / name) == weights(tmp_path / name)


def test_what_cannot_share_a_pass_is_said(tmp_path: Path) -> None:
    plain = config(None)
    wrong = {
        "seed is 42 and 7": {"a": plain, "b": dataclasses.replace(plain, seed=7)},
        "tokens is 'all' and 'cls'": {"a": plain, "b": dataclasses.replace(plain, tokens="cls")},
        "cannot be the name": {"../a": plain},
        "no SAEs to train": {},
    }
    for message, cfgs in wrong.items():
        with pytest.raises(ValueError, match=message):
            together(cfgs, tmp_path / "many")
    assert list(tmp_path.iterdir()) == []
