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

SHARED = Path(__file__).parents[2] / "shared"
TEXTS = ("a red circle", "a blue square", "a green star")


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
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from benchmarks.demo_checkpoint._tokenizer import build_tokenizer

    folder = tmp_path_factory.mktemp("tiny-clip")
    tokenizer = build_tokenizer(TEXTS, max_length=8)
    tower = {"intermediate_size": 64, "num_attention_heads": 4, "hidden_size": 32}
    config = CLIPConfig(
        vision_config={
            **tower,
            "num_hidden_layers": 3,
            "image_size": 32,
            "patch_size": 8,
            "projection_dim": 16,
        },
        text_config={
            **tower,
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 8,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
        },
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    with torch.no_grad():  # the default initialisation hardly lets one token see another
        for parameter in model.vision_model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session", params=["tiny", "emoji"])
def clip_folder(request: pytest.FixtureRequest) -> str:
    """Both checkpoints, one after the other."""
    folder: str = request.getfixturevalue(f"{request.param}_clip")
    return folder
