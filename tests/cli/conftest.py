"""Images in folders by class, and an SAE trained on them by the command itself."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from vision_plugin.cli import main


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label in ("a red circle", "a blue square", "a green star"):
        (root / label).mkdir()
        for i in range(6):
            values = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(values).save(root / label / f"{i}.png")
    return str(root)


@pytest.fixture(scope="session")
def sae(tiny_clip: str, images: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An SAE trained by the command itself, in this process."""
    out = str(tmp_path_factory.mktemp("run") / "sae")
    arguments = (
        f"train --model-name {tiny_clip} --images {images} --hook_name "
        "blocks.1.hook_resid_post --architecture=topk --d_sae=40 --k 3 --training-tokens 3200 "
        f"--train_batch_size_tokens 64 --n-batches-in-buffer 4 --lr 0.003 --output-path {out}"
    )
    assert main(arguments.split()) == 0
    return out
