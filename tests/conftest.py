"""Shared fixtures. Every jaxtyping annotation of the package is enforced while the tests run.

The kernels are exempt: Triton and torch.compile read their source, which the hook would rewrite,
and have numbers of their own in place of Python's while they do.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["MKL_CBWR"] = "AUTO,STRICT"  # as the command does

from jaxtyping import install_import_hook

PACKAGE = Path(__file__).parents[1] / "vision_plugin"


def checked() -> list[str]:
    """Modules and folders whose annotations are enforced: all but the kernels."""
    names = [path.stem for path in PACKAGE.iterdir() if not path.name.startswith("__")]
    return [f"vision_plugin.{name}" for name in (*names, "hooks") if name != "kernels"]


install_import_hook(checked(), "beartype.beartype")

import pytest  # noqa: E402  # the import hook has to stand before what it hooks
import torch  # noqa: E402

from tests._models import save_tiny_clip  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--device``: where the tests that compute on a device do so."""
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="cpu, or cuda")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    """Device that ``--device`` names."""
    name: str = request.config.getoption("--device")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.fail("--device cuda was asked for, and torch finds no CUDA device")
    return name


SHARED = Path(__file__).parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The optional data folder beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the data folder {SHARED.name}/ beside the checkout, which is not there")
    return SHARED


@pytest.fixture(scope="session")
def emoji_clip(shared: Path) -> str:
    """Folder of a real CLIP trained on real images."""
    folder = shared / "models" / "emoji-clip"
    if not folder.is_dir():
        pytest.skip("needs the emoji-clip checkpoint of the data folder, which is not there")
    return str(folder)


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a CLIP of random weights: 3 blocks, 32 dimensions, 16 patches."""
    folder = tmp_path_factory.mktemp("tiny-clip")
    save_tiny_clip(folder)
    return str(folder)


@pytest.fixture(scope="session", params=["tiny", "emoji"])
def clip_folder(request: pytest.FixtureRequest) -> str:
    """Both checkpoints, one after the other."""
    folder: str = request.getfixturevalue(f"{request.param}_clip")
    return folder
