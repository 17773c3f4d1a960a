"""The kernels' tests run on the device that ``--device`` names."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _on_the_device(device: str) -> Iterator[None]:
    """Make tensors on the device, unless a test names another."""
    if device == "cpu":
        yield
        return
    with torch.device(device):
        yield
