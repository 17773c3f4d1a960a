"""Paths as people write them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

import vision_plugin as vp
from vision_plugin.activations import ActivationStore, info, verify


@pytest.mark.parametrize(
    "read",
    [vp.open_images, vp.load_model, vp.load_sae, ActivationStore, info, verify],
    ids=lambda read: read.__name__,
)
def test_an_empty_path_does_not_mean_this_folder(read: Callable[[str], object]) -> None:
    with pytest.raises(ValueError, match=r"a path is empty \(''\): name a file or folder"):
        read("")
