"""The worked example of CONTRIBUTING.md: a metric in a package of its own, built and installed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.training.activation_scaler import ActivationScaler

import vision_plugin as vp
from tests.metrics._steerability_reference import standard_sae
from vision_plugin import metrics
from vision_plugin.cli import main
from vision_plugin.images import open_images
from vision_plugin.sae import Validator

HOOK = "blocks.1.hook_resid_post"
GUIDE = Path(__file__).parents[2] / "CONTRIBUTING.md"
BUILD = "from setuptools import build_meta as b; b.build_wheel('dist')"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Build the guide's package with its own backend and unpack the wheel, as an installer does."""
    section = GUIDE.read_text().partition("## Add a metric")[2].partition("\n## ")[0]
    blocks = dict(re.findall(r"```(python|toml)\n(.*?)```", section, re.DOTALL)[:2])
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    (source / "my_firing.py").write_text(blocks["python"])
    (source / "pyproject.toml").write_text(blocks["toml"])
    subprocess.run([sys.executable, "-c", BUILD], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    sys.path.insert(0, str(site))
    yield site
    sys.path.remove(str(site))
    sys.modules.pop("my_firing", None)


def test_it_is_listed_with_its_package(installed: Path) -> None:
    assert metrics.available()["firing"] == metrics.MetricInfo(
        "firing", "my_firing:Firing", "my-firing 1.0"
    )
    scores = metrics.MetricSet(["firing"], {"n_features": 3, "d_embed": 9})
    scores.update({"latents": torch.tensor([[0.0, 1, 2], [0, 0, 3]])})
    assert scores.scalars() == {
        "firing/mean_rate": 0.5,
        "firing/max_rate": 1.0,
        "firing/n_dead": 1,
    }


def test_info_names_it_with_its_package(
    installed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "metrics of my-firing 1.0: firing" in printed
    assert any(line.startswith("metrics of vision-plugin ") for line in printed)


def test_eval_scores_it_beside_the_controls(
    installed: Path, tiny_clip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae = standard_sae(HOOK, 32, d_sae=40)
    sae.save_model(str(tmp_path / "sae"))
    out = tmp_path / "scores.json"
    line = f"eval --sae {tmp_path / 'sae'} --model-name {tiny_clip} --images demo:30@2"
    options = '{"firing": {"above": 1.5}}'
    arguments = [*line.split(), "--output-path", str(out), "--controls", "neurons", "random"]
    assert main([*arguments, "--metrics", "firing", "--metric-options", options]) == 0
    printed = capsys.readouterr().out
    assert "firing, mean rate" in printed
    assert "firing, max rate" not in printed
    written = json.loads(out.read_text())
    model, images = vp.load_model(tiny_clip), open_images("demo:30@2")
    pixels = model.preprocess(list(images))
    with torch.no_grad():
        latents = sae.encode(model.run_with_cache(pixels)[1][HOOK]).amax(1)
    expected = (latents > 1.5).double().mean(0)
    assert written["per_latent"]["firing"]["sae"]["score"] == pytest.approx(expected.tolist())
    assert list(written["per_latent"]["firing"]) == ["sae", "neurons", "random"]


def test_it_is_an_evaluator_of_sae_lens_training(installed: Path, tiny_clip: str) -> None:
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=32, d_sae=24, k=3))
    sae.cfg.metadata.hook_name = HOOK
    images = open_images("demo:12@2")
    validator = Validator(vp.load_model(tiny_clip), images, [HOOK], names=["firing"])
    scores = validator(sae, None, ActivationScaler())
    assert 0 < scores["validation/firing/mean_rate"] <= 1
