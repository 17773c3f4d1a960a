"""Training leaves the caller's process as it was, and does not depend on how it was."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.activations._stores import tiny_model
from tests.activations.conftest import one_thread
from tests.sae._runs import config, images, runner
from vision_plugin.images import open_images
from vision_plugin.sae import VisionSAETrainingRunner

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


def _draw() -> list[Any]:
    """The next numbers of torch and NumPy; Python's own move with every check of a type here."""
    return [torch.rand(3).tolist(), np.random.rand(3).tolist()]


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)


def _weights(**changes: Any) -> dict[str, torch.Tensor]:
    sae = runner(config(None, **changes)).run()
    return {name: tensor.clone() for name, tensor in sae.state_dict().items()}


def test_a_run_leaves_the_random_state_of_its_caller_alone() -> None:
    model, source = tiny_model(), open_images(images())
    _seed(3)
    expected = _draw()
    _seed(3)
    run = VisionSAETrainingRunner(config(None), model=model, images=source)
    assert _draw() == expected
    _seed(3)
    run.run()
    assert _draw() == expected
    _seed(3)
    with pytest.raises(ValueError, match="hook_nothing"):
        VisionSAETrainingRunner(config(None, hook_name="hook_nothing"), model=model, images=source)
    assert _draw() == expected


def test_what_the_caller_draws_does_not_change_the_weights() -> None:
    expected = _weights()
    run = runner(config(None))
    _draw()
    found = run.run().state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_turns_gradients_on_and_back_off(
    mode: Callable[[], contextlib.AbstractContextManager[Any]],
) -> None:
    expected = _weights()
    with mode():
        found = _weights()
        assert not torch.is_grad_enabled()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.is_grad_enabled()
