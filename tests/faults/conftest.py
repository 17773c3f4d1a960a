"""Stores to be damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.activations._stores import MLP, RESID, make_store
from tests.activations.conftest import folder, one_thread

__all__ = ["folder", "one_thread"]


@pytest.fixture(scope="session")
def sound_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete store of three shards and two hooks; not to be written to."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sound") / "s"
    make_store(folder, 20, hook_names=[RESID, MLP])
    return folder


@pytest.fixture
def store_path(sound_store: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(sound_store, tmp_path / "copy"))
