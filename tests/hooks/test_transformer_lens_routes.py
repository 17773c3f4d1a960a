"""The adapters through TransformerLens's own doors, without ``vision_plugin.wrap``."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources import build_bridge_from_module

from benchmarks._family_cases import Case, timm_case, transformers_cases

CASES = {case.name: case for case in transformers_cases()}
FAMILIES = ("CLIPVisionModel", "SiglipVisionModel", "Dinov2WithRegistersModel", "DINOv3ViTModel")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_module_in_hand_by_architecture_name(name: str) -> None:
    case: Case = CASES[name]
    module = case.build()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = case.native(copy.deepcopy(module), pixels)
        bridge = build_bridge_from_module(module, name, hf_config=module.config)
        output = bridge.original_model(pixel_values=pixels)
        assert torch.equal(output.last_hidden_state, expected)
        _, cache = bridge.run_with_cache(pixels, return_type=None)
    assert cache["blocks.1.hook_resid_post"].shape[0] == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_boot_transformers_finds_the_adapter(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    module = case.build()
    module.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 32, 32)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    with torch.no_grad():
        output = bridge.original_model(pixel_values=pixels)
        # TransformerLens asks for eager attention, which rounds differently.
        torch.testing.assert_close(output.last_hidden_state, case.native(module, pixels))


def test_a_timm_module_by_architecture_name() -> None:
    from transformer_lens.config import TransformerBridgeConfig

    case = timm_case("vit_base_patch16_224")
    module = case.build()
    pixels = torch.randn(1, 3, 64, 64)
    cfg = TransformerBridgeConfig(
        d_model=48, d_head=12, n_heads=4, n_layers=2, n_ctx=17, act_fn="gelu"
    )
    with torch.no_grad():
        expected = case.native(copy.deepcopy(module), pixels)
        bridge = build_bridge_from_module(module, "TimmVisionTransformer", tl_config=cfg)
        assert torch.equal(bridge.original_model(pixel_values=pixels).logits, expected)
