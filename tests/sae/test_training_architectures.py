"""Every architecture trains, and what is saved loads where this package is not installed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file

from tests.activations._stores import RESID, tiny_model
from tests.activations.conftest import one_thread
from tests.sae._runs import ARCHITECTURES, MLP_IN, MLP_OUT, SAVED_AS, config, images, runner
from vision_plugin.formats import CorruptCheckpointError, load_sae, verify
from vision_plugin.sae._saving import inference_sae

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")

SCALED = {
    "topk-scaled": ("topk", {"normalize_activations": "expected_average_only_in"}),
    "batchtopk-scaled": ("batchtopk", {"normalize_activations": "expected_average_only_in"}),
    "gated-scaled": ("gated", {"normalize_activations": "expected_average_only_in"}),
    "pursuit-scaled": ("matching_pursuit", {"normalize_activations": "expected_average_only_in"}),
    "standard-whitened": ("standard", {"normalize_activations": "covariance_whitening"}),
    "jumprelu-layernorm": ("jumprelu", {"normalize_activations": "layer_norm"}),
    "topk-unscaled-decoder": ("topk", {"rescale_acts_by_decoder_norm": False}),
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {n: (n, {}) for n in ARCHITECTURES} | SCALED


@pytest.fixture(scope="module")
def x() -> dict[str, torch.Tensor]:
    model = tiny_model()
    harvested = model.harvest(model.preprocess(images(4, first=1)), [RESID, MLP_IN, MLP_OUT])
    return {name: rows.flatten(0, 1) for name, rows in harvested.items()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, x: dict[str, torch.Tensor]) -> Path:
    """A folder of saved SAEs, each with its reconstruction just before it was saved."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("trained")
    for name, (architecture, options) in CASES.items():
        sae = ARCHITECTURES[architecture](**options)
        run = runner(config(root / name, architecture, sae=sae, n_checkpoints=0))
        before: dict[str, SAE[Any]] = {}
        plain = SAETrainer.set_final_sae_metadata

        def keep(self: Any, before: dict[str, Any] = before, plain: Any = plain) -> None:
            plain(self)
            before["folded"] = inference_sae(self.sae)

        SAETrainer.set_final_sae_metadata = keep
        try:
            run.run()
        finally:
            SAETrainer.set_final_sae_metadata = plain
        rows = x[run.cfg.hook_name]
        with torch.no_grad():
            expected = before["folded"](rows)
        save_file({"x": rows, "expected": expected}, root / name / "expected.safetensors")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_is_what_was_trained(name: str, trained: Path) -> None:
    numbers = load_file(trained / name / "expected.safetensors")
    sae = SAE.load_from_disk(trained / name)
    architecture, _ = CASES[name]
    assert sae.cfg.architecture() == SAVED_AS[architecture]
    assert type(sae).__module__.startswith("sae_lens.")
    with torch.no_grad():
        torch.testing.assert_close(sae(numbers["x"]), numbers["expected"], rtol=0, atol=1e-5)
    metadata = json.loads((trained / name / "cfg.json").read_text())["metadata"]
    assert metadata["l0"] > 0
    assert metadata["model_name"] == "tiny"
    assert metadata["training_architecture"] == architecture, "SAELens's name, not our class's"


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_is_checked(name: str, trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained / name, tmp_path / "sae")
    assert verify(folder).ok
    for file in ("sae_weights.safetensors", "sparsity.safetensors", "runner_cfg.json"):
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        (problem,) = verify(folder).problems
        assert problem.startswith(f"{file}: expected SHA-256")
        if file == "sae_weights.safetensors":
            with pytest.raises(CorruptCheckpointError, match=r"weights\.safetensors: expected SHA"):
                load_sae(folder)
        (folder / file).write_bytes(content)
    load_sae(folder)


@pytest.mark.slow
def test_all_load_where_this_package_is_not_installed(trained: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "site-packages"
    elsewhere.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "vision_plugin" not in entry.name and not entry.name.endswith(".pth"):
            (elsewhere / entry.name).symlink_to(entry)
    script = """
import importlib.util, pathlib, sys, torch
assert importlib.util.find_spec("vision_plugin") is None, "the package is importable here"
from sae_lens import SAE
from safetensors.torch import load_file
for folder in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    numbers = load_file(folder / "expected.safetensors")
    sae = SAE.load_from_disk(folder)
    with torch.no_grad():
        torch.testing.assert_close(sae(numbers["x"]), numbers["expected"], rtol=0, atol=1e-5)
    print(folder.name, sae.cfg.architecture(), sae.cfg.metadata.hook_name)
"""
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, str(trained)],
        env={**os.environ, "PYTHONPATH": str(elsewhere), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {name: saved for name, saved, _ in lines} == {
        name: SAVED_AS[architecture] for name, (architecture, _) in CASES.items()
    }


@pytest.mark.parametrize("name", ["topk", "batchtopk", "matryoshka_batchtopk"])
def test_dense_arithmetic_can_be_asked_for_and_is_the_same(name: str, tmp_path: Path) -> None:
    saes = {}
    for dense in (False, True):
        run = runner(config(tmp_path / str(dense), name, dense=dense))
        assert type(run.sae).__module__.startswith("sae_lens.") == dense
        run.run()
        saes[dense] = load_file(tmp_path / str(dense) / "sae_weights.safetensors")
        saved = json.loads((tmp_path / str(dense) / "runner_cfg.json").read_text())
        assert saved["sae"]["architecture"] == name
    for key, tensor in saes[True].items():
        torch.testing.assert_close(saes[False][key], tensor, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["transcoder", "skip_transcoder"])
def test_a_transcoder_learns_what_the_mlp_does(
    name: str, x: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    sae_config = dataclasses.replace(ARCHITECTURES[name](), l1_coefficient=0.0)
    changes = {"sae": sae_config, "training_tokens": 32 * 300, "lr": 1e-2, "lr_warm_up_steps": 0}
    sae = runner(config(None, name, **changes)).run()
    assert sae.cfg.metadata.hook_name == MLP_IN
    assert sae.cfg.metadata.hook_name_out == MLP_OUT
    target = x[MLP_OUT]
    with torch.no_grad():
        unexplained = (target - sae(x[MLP_IN])).square().sum()
    assert float(unexplained / (target - target.mean(0)).square().sum()) < 0.5
    with tiny_model().saes([sae]), torch.no_grad():
        tiny_model()(torch.randn(1, 3, 32, 32))


def test_what_a_transcoder_cannot_have_is_said() -> None:
    with pytest.raises(ValueError, match="needs hook_name_out"):
        runner(config(None, "topk", sae=ARCHITECTURES["transcoder"]()))
    with pytest.raises(ValueError, match="has no use for hook_name_out"):
        runner(config(None, "transcoder", sae=ARCHITECTURES["topk"]()))
    with pytest.raises(ValueError, match="apply_b_dec_to_input does not apply"):
        ARCHITECTURES["transcoder"](apply_b_dec_to_input=True)
    with pytest.raises(ValueError, match="leave it at 'none'"):
        ARCHITECTURES["transcoder"](normalize_activations="expected_average_only_in")
    wide = dataclasses.replace(ARCHITECTURES["transcoder"](), d_out=99)
    with pytest.raises(ValueError, match=r"d_out=99, but .*hook_mlp_out .* has 16"):
        runner(config(None, "transcoder", sae=wide))
