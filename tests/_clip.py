"""The tiny CLIP as a bridge, pixels for it, and SAEs that fit it, for tests of several folders."""

from __future__ import annotations

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from torch import Tensor

import vision_plugin as vp
from vision_plugin.models import VisionBridge

RESID = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model(tiny_clip: str) -> VisionBridge:
    return vp.load_model(tiny_clip)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def make_sae(
    hook_name: str = RESID, d_in: int = 32, *, seed: int = 0, **options: str
) -> StandardSAE:
    torch.manual_seed(seed)
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=48, **options))
    sae.cfg.metadata.hook_name = hook_name
    return sae
