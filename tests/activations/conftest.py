"""What the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests._images import photo_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images in the sub-folders ``cat`` and ``dog``."""
    return photo_folder(tmp_path / "photos")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One thread: the same bits in this process and in those forked from it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
