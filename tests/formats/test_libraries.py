"""Files that the libraries on PyPI write themselves, in an environment of their own.

overcomplete 0.3 cannot be imported beside a current matplotlib, and dictionary_learning pins an old
nnsight; so the test makes a virtual environment, lets the libraries build, save and evaluate SAEs
there, and compares through stock SAELens here.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.formats.test_samples import assert_same_numbers
from vision_plugin.formats import load_sae

REQUIREMENTS = [
    "overcomplete==0.3.0",
    "matplotlib<3.9",
    "dictionary-learning==0.1.0",
    "visaebench==0.1.0",
]
SECONDS = 600

WRITER = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file

out = Path(sys.argv[1])
torch.manual_seed(0)
x = torch.randn(64, 24)


def keep(name, content, file, config, options, encode, decode):
    folder = out / name
    folder.mkdir()
    torch.save(content, folder / file)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        latents = encode(x)
        numbers = {"x": x, "latents": latents, "recon": decode(latents)}
    save_file({key: value.contiguous() for key, value in numbers.items()}, folder / "numbers")
    (folder / "options").write_text(json.dumps(options))


def shaken(module):
    for parameter in module.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return module


from dictionary_learning.dictionary import (
    AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder,
)
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK

made = {
    "AutoEncoder": AutoEncoder(24, 96),
    "AutoEncoderNew": AutoEncoderNew(24, 96),
    "GatedAutoEncoder": GatedAutoEncoder(24, 96),
    "JumpReluAutoEncoder": JumpReluAutoEncoder(24, 96),
    "AutoEncoderTopK": AutoEncoderTopK(24, 96, 7),
    "BatchTopKSAE": BatchTopKSAE(24, 96, 7),
    "MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKSAE(24, 96, 7, [16, 32, 48]),
}
for name, sae in made.items():
    shaken(sae)
    if hasattr(sae, "threshold") and sae.threshold.ndim == 0:
        sae.threshold.fill_(0.4)
    if name == "AutoEncoder":
        sae.normalize_decoder()
    config = {"trainer": {"dict_class": name, "activation_dim": 24, "dict_size": 96}}
    keep("dl-" + name, sae.state_dict(), "ae.pt", config, {}, sae.encode, sae.decode)

from overcomplete.sae import SAE, BatchTopKSAE, JumpSAE, TopKSAE

for norm in ("l2", "max_l2", "l1", "max_l1", "identity"):
    parameters = {"normalization": norm, "use_multiplier": True}
    for encoder in ("linear", "mlp_bn_1"):
        for cls, arguments, options in (
            (SAE, {}, {"activation": "relu"}),
            (TopKSAE, {"top_k": 7}, {"activation": "topk", "k": 7}),
            (BatchTopKSAE, {"top_k": 400}, {"activation": "batchtopk"}),
            (JumpSAE, {}, {}),
        ):
            sae = shaken(
                cls(24, 96, encoder_module=encoder, dictionary_params=parameters, **arguments)
            )
            sae.train()
            for _ in range(3):  # sets running means, and a running threshold
                sae(torch.randn(200, 24))
            content = {key: value.clone() for key, value in sae.state_dict().items()}
            sae.eval()
            options = options | {"row_normalization": norm}
            if cls is BatchTopKSAE:
                options["threshold"] = float(sae.running_threshold)
            keep(
                f"overcomplete-{cls.__name__}-{encoder}-{norm}",
                content, "state_dict.pth", None, options,
                lambda rows: sae.encode(rows)[1], sae.decode,
            )

from visaebench.hub import load_sae as read

for activation in ("topk", "batchtopk", "jumprelu"):
    content = {
        "encoder.weight": torch.randn(96, 24), "encoder.bias": torch.randn(96),
        "decoder.weight": torch.randn(96, 24), "decoder.bias": torch.randn(24),
    }
    if activation == "jumprelu":
        content["jump_thresholds"] = torch.rand(96)
    config = {"activation": activation, "k": 7, "threshold": 0.9}
    scratch = out / ("scratch-" + activation)
    scratch.mkdir()
    torch.save(content, scratch / "sae.pt")
    (scratch / "config.json").write_text(json.dumps(config))
    sae = read(str(scratch), device="cpu")
    keep("visaebench-" + activation, content, "sae.pt", config, {}, sae.encode, sae.decode)
    for file in scratch.iterdir():
        file.unlink()
    scratch.rmdir()
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder of checkpoints, each written by its library."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    if uv is None:
        pytest.skip("uv is not installed, so the libraries' own environment cannot be made")
    root = tmp_path_factory.mktemp("libraries")
    python = root / "environment" / "bin" / "python"
    pins = [f"{name}=={importlib.metadata.version(name)}" for name in ("torch", "torchvision")]
    try:
        for command in (
            [uv, "venv", "--quiet", "--python", sys.executable, str(root / "environment")],
            [uv, "pip", "install", "--quiet", "--python", str(python), *pins, *REQUIREMENTS],
        ):
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
            if done.returncode:
                pytest.skip(f"the libraries cannot be installed here: {done.stderr.strip()[-300:]}")
        (root / "checkpoints").mkdir()
        done = subprocess.run(
            [str(python), "-c", WRITER, str(root / "checkpoints")],
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stderr
        yield root / "checkpoints"
    except subprocess.TimeoutExpired as error:
        pytest.skip(f"installing the libraries took longer than {error.timeout} s")
    finally:
        shutil.rmtree(root / "environment", ignore_errors=True)


@pytest.mark.exhaustive
def test_every_class_of_every_library_gives_its_own_numbers(written: Path) -> None:
    folders = sorted(written.iterdir())
    assert len(folders) == 7 + 5 * 2 * 4 + 3
    for folder in folders:
        numbers = load_file(folder / "numbers")
        options: dict[str, Any] = json.loads((folder / "options").read_text())
        (folder / "numbers").unlink()
        sae = load_sae(folder, **options)
        try:
            assert_same_numbers(sae, numbers)
        except AssertionError as error:
            raise AssertionError(f"{folder.name}: {error}") from error
        assert int((numbers["latents"] != 0).sum()) > torch.numel(numbers["x"]) // 24
