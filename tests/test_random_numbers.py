"""Reading a name of the package leaves the random numbers of its caller as they were."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import random
import numpy as np
import torch

def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

random.seed(0)
np.random.seed(0)
torch.manual_seed(0)
before = states()
import vision_plugin as vp
assert states() == before, "importing the package"
for name in sorted(vp.__all__):
    getattr(vp, name)
    assert states() == before, name
"""


@pytest.mark.exhaustive
def test_reading_a_name_draws_no_random_number() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
