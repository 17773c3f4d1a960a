"""What the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests._images import photo_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images in the sub-folders ``cat`` and ``dog``."""
    return photo_folder(tmp_path / "photos")
