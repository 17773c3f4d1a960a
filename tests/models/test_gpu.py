"""The bridge on the device that ``--device`` names, beside the native module there."""

from __future__ import annotations

import torch

import vision_plugin as vp
from vision_plugin.models import Harvester


def test_the_bridge_has_the_bits_of_the_native_module_on_the_device(tiny_clip, device):
    model = vp.load_model(tiny_clip, device=device)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(device)
    hook = "blocks.1.hook_resid_post"
    with torch.no_grad():
        output, cache = model.run_with_cache(pixels)
    assert output.device.type == device
    assert torch.equal(Harvester(model, [hook])(pixels)[hook], cache[hook])
