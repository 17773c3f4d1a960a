"""A model whose parts lie in different places: spread by accelerate, parts of it on the disk."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from transformers import CLIPModel

import vision_plugin as vp

PLACES = {
    **dict.fromkeys(("text_model", "visual_projection", "text_projection"), "cpu"),
    **dict.fromkeys(("vision_model.embeddings", "vision_model.pre_layrnorm"), "cpu"),
    "vision_model.encoder.layers.0": "cpu",
    "vision_model.encoder.layers.1": "disk",
    "vision_model.encoder.layers.2": "disk",
    "vision_model.post_layernorm": "cpu",
}


@pytest.mark.filterwarnings("ignore:The following device_map keys")
def test_a_model_spread_over_devices_computes_and_is_edited_as_a_whole_one(
    tiny_clip: str, tmp_path: Path
) -> None:
    module = CLIPModel.from_pretrained(tiny_clip).eval()
    whole = vp.wrap(copy.deepcopy(module))
    places = {**PLACES, "logit_scale": "cpu"}
    spread = vp.wrap(
        dispatch_model(module, places, main_device="cpu", offload_dir=str(tmp_path / "weights"))
    )
    assert next(spread.native.vision_model.encoder.layers[1].parameters()).is_meta
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def edit(pattern: torch.Tensor, hook: object) -> torch.Tensor:
        return torch.zeros_like(pattern)

    with torch.no_grad():
        assert torch.equal(spread.encode_image(pixels), whole.encode_image(pixels))
        _, expected = whole.run_with_cache(pixels)
        _, found = spread.run_with_cache(pixels)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        edits = {"fwd_hooks": [("blocks.1.attn.hook_pattern", edit)]}
        assert torch.equal(
            spread.run_with_hooks(pixels, **edits), whole.run_with_hooks(pixels, **edits)
        )
        assert torch.equal(spread(pixels, stop_at_layer=2), whole(pixels, stop_at_layer=2))
