"""Images and folders that the tests of this package share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


def image(seed: int = 0, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """An image of random colours."""
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images in the sub-folders ``cat`` and ``dog``."""
    root = tmp_path / "photos"
    for place, label in enumerate(("dog", "cat")):
        (root / label).mkdir(parents=True)
        for i in range(3):
            image(10 * place + i).save(root / label / f"{i}.png")
    return root


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread: the same bits in this process and in those forked from it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
