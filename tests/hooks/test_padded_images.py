"""timm's towers that pad an image to whole patches have as many tokens as the padded image."""

from __future__ import annotations

import pytest
import timm
import torch
from sae_lens import StandardSAE, StandardSAEConfig

import vision_plugin as vp
from vision_plugin.models.site import Site

HOOK = "blocks.0.hook_resid_post"
SIZES = {(64, 64): (4, 4), (40, 70): (3, 5), (33, 32): (3, 2), (48, 80): (3, 5)}


@pytest.fixture(scope="module", params=["vit_base_patch16_224", "eva02_base_patch16_clip_224"])
def tower(request: pytest.FixtureRequest) -> torch.nn.Module:
    torch.manual_seed(0)
    small = {"depth": 2, "embed_dim": 48, "num_heads": 4, "img_size": 64}
    return timm.create_model(
        request.param, **small, dynamic_img_size=True, dynamic_img_pad=True
    ).eval()


@torch.no_grad()
@pytest.mark.parametrize(("size", "grid"), SIZES.items())
def test_the_layout_counts_padded_patches(tower, size, grid) -> None:
    model, pixels = vp.wrap(tower), torch.randn(2, 3, *size)
    expected = tower(pixels)
    output, cache = model.run_with_cache(pixels, names_filter=HOOK)
    assert torch.equal(output, expected)
    layout = model.token_layout(size)
    assert layout.grid == grid == tuple(tower.patch_embed.dynamic_feat_size(size))
    assert cache[HOOK].shape[1] == layout.n_tokens
    residual = model(pixels, stop_at_layer=1)
    assert torch.equal(model(residual, start_at_layer=1, image_size=size), expected)


@torch.no_grad()
def test_an_sae_of_patches_works_on_a_padded_image(tower) -> None:
    model, pixels = vp.wrap(tower), torch.randn(2, 3, 40, 70)
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=48, d_sae=64))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.tokens = HOOK, "patch"
    first = model.token_layout((40, 70)).n_cls + model.token_layout((40, 70)).n_registers

    def by_hand(x: torch.Tensor, hook: object) -> torch.Tensor:
        patches = sae.decode(sae.encode(x[:, first:]))
        return torch.cat([x[:, :first], patches], dim=1)

    expected = model.run_with_hooks(pixels, fwd_hooks=[(HOOK, by_hand)])
    torch.testing.assert_close(model.run_with_saes(pixels, saes=[sae]), expected)
    assert Site.of(model, sae).tokens == "patch"
