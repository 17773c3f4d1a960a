"""What the tests of several machines compare with: one process's results, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scale._extraction import FLAGS
from tests.scale._here import here


@pytest.fixture(scope="session")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that this process makes alone."""
    folder = tmp_path_factory.mktemp("straight") / "store"
    here("extract", *FLAGS, "--output-path", str(folder))
    return folder
