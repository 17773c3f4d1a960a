"""The hook that a foreign SAE is given shows the very tensor that the SAE was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPModel, Dinov2Config, Dinov2Model

import vision_plugin as vp
from vision_plugin.formats import load_sae

DATA = Path(__file__).parent / "data"


def changed(sample: str, tmp_path: Path, **settings: Any) -> Any:
    """A sample's SAE, with other settings in its configuration."""
    folder = shutil.copytree(DATA / sample, tmp_path / sample)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return load_sae(folder)


@torch.no_grad()
def test_the_last_layer_of_dinov2_is_its_output(tmp_path: Path) -> None:
    """VISAEBench takes what DINOv2 returns, behind the weight and the bias of the last norm."""
    sae = changed("visaebench-topk", tmp_path, backbone="dinov2_vitb14", layer=11)
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14
    )
    module = Dinov2Model(config).eval()
    module.layernorm.weight.normal_()
    module.layernorm.bias.normal_()
    pixels = torch.randn(2, 3, 28, 28)
    name = sae.cfg.metadata.hook_name
    found = vp.wrap(module).harvest(pixels, name)[name]
    assert torch.equal(found, module(pixel_values=pixels).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("number", [1, 2])
def test_a_normalised_hook_of_prisma_comes_behind_the_weight(
    tiny_clip: str, tmp_path: Path, number: int
) -> None:
    """HookedViT's hook_normalized, as in TransformerLens before its bridges."""
    sae = changed(
        "prisma-relu-hub",
        tmp_path,
        hook_point_layer=1,
        layer_subtype=f"ln{number}.hook_normalized",
    )
    module = CLIPModel.from_pretrained(tiny_clip).eval()
    norm = getattr(module.vision_model.encoder.layers[1], f"layer_norm{number}")
    norm.weight.normal_()
    norm.bias.normal_()
    seen: list[torch.Tensor] = []
    norm.register_forward_hook(lambda part, args, output: seen.append(output))
    pixels = torch.randn(2, 3, 32, 32)
    name = sae.cfg.metadata.hook_name
    found = vp.wrap(module).harvest(pixels, name)[name]
    assert torch.equal(found, seen[0])
