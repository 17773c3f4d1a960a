"""Image embeddings taken apart: the parts sum to the embedding, and each is what it claims."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPModel

import vision_plugin as vp
from benchmarks import families
from tests._clip import model as model  # the fixtures
from tests._clip import pixels as pixels
from vision_plugin.models import Decomposition, UnsupportedModelError, VisionBridge

SAMPLE = {case.label: case for case in families.sample()}
NO_TRANSFORMER = (
    "timm: vit_small_patch16_18x2_224",
    "open_clip: RN50",
    "open_clip: convnext_base",
)
REFUSED = {
    "transformers: Dinov2ForImageClassification": "mean of its patches",
    "transformers: Dinov2WithRegistersForImageClassification": "mean of its patches",
    "transformers: ViTModel": "add_pooling_layer=False",
    "transformers: DeiTModel": "add_pooling_layer=False",
    "timm: deit_base_distilled_patch16_224": "sum to something else",
}
TAKEN_APART = [label for label in SAMPLE if label not in (*NO_TRANSFORMER, *REFUSED)]


@cache
def bridged(label: str) -> tuple[Any, Tensor]:
    case = SAMPLE[label]
    model = vp.wrap(case.build(), name=case.name)
    dims = model.adapter.tower_dimensions
    generator = torch.Generator().manual_seed(1)
    size = case.image or dims.image_size
    return model, torch.randn(2, dims.n_channels, *size, generator=generator)


def worst(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value where that is above 1."""
    ours, theirs = ours.detach(), theirs.detach()
    return float((ours - theirs).abs().max() / max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("label", TAKEN_APART)
def test_the_parts_of_every_family_sum_to_its_embedding(label: str) -> None:
    model, pixels = bridged(label)
    with torch.no_grad():
        expected = model.image_features(pixels, normalize=False)
    for heads in (True, False):
        for tokens in (True, False):
            found = model.decompose(pixels, heads=heads, tokens=tokens)
            assert worst(found.total(), expected) < 1e-5
            assert worst(sum(part for _, part in found.parts()), expected) < 1e-5


@pytest.mark.parametrize("label", TAKEN_APART)
def test_what_is_summed_is_what_was_kept_apart(label: str) -> None:
    model, pixels = bridged(label)
    fine = model.decompose(pixels)
    plain = model.decompose(pixels, heads=False, tokens=False)
    only_heads = model.decompose(pixels, tokens=False)
    only_tokens = model.decompose(pixels, heads=False)
    assert worst(fine.by_head().sum(2), plain.attention) < 1e-5
    assert worst(only_heads.by_head(), fine.by_head()) < 1e-5
    assert worst(only_tokens.by_token(), fine.by_token()) < 1e-5
    if fine.pool is None:
        assert worst(fine.by_token().sum(1), plain.attention.sum(1)) < 1e-5
        assert fine.by_token().shape[1] == fine.layout.n_tokens
    else:  # the other cut: by the token that is read at the end
        whole = fine.by_token().sum(1) + fine.bias
        whole = whole if fine.pool_mlp is None else whole + fine.pool_mlp
        assert worst(whole, fine.total()) < 1e-5
    assert fine.by_patch().shape[1:3] == fine.layout.grid


@pytest.mark.parametrize(("label", "reason"), REFUSED.items())
def test_a_head_that_cannot_be_taken_apart_is_refused(label: str, reason: str) -> None:
    model, pixels = bridged(label)
    with pytest.raises(UnsupportedModelError, match=reason):
        model.decompose(pixels)


def test_each_part_is_what_a_loop_over_heads_and_tokens_finds(tiny_clip: str) -> None:
    """Gandelsman's formula in float64, with plain hooks on the native module."""
    native = CLIPModel.from_pretrained(tiny_clip, attn_implementation="eager").double().eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)).double()
    tower = native.vision_model
    seen: dict[str, Tensor] = {}
    for number, layer in enumerate(tower.encoder.layers):
        layer.self_attn.register_forward_hook(
            lambda _, args, output, n=number: seen.update({f"pattern {n}": output[1]})
        )
        layer.self_attn.v_proj.register_forward_hook(
            lambda _, args, output, n=number: seen.update({f"values {n}": output})
        )
        layer.mlp.register_forward_hook(
            lambda _, args, output, n=number: seen.update({f"mlp {n}": output})
        )
    tower.encoder.layers[-1].register_forward_hook(
        lambda _, args, output: seen.update(
            {"last": output[0] if isinstance(output, tuple) else output}
        )
    )
    with torch.no_grad():
        native.get_image_features(pixels)
        token = seen["last"][:, 0]
        norm, project = tower.post_layernorm, native.visual_projection.weight
        sigma = (token.var(-1, unbiased=False) + norm.eps).sqrt()

        def contribution(vector: Tensor, image: int) -> Tensor:
            centred = vector - vector.mean()
            return project @ (norm.weight * centred / sigma[image])

        found = vp.load_model(tiny_clip).to(torch.float64).decompose(pixels)
        assert found.attention.shape == (2, 3, 4, 17, 16)
        for image in range(2):
            for number, layer in enumerate(tower.encoder.layers):
                out = layer.self_attn.out_proj
                for head in range(4):
                    own = slice(8 * head, 8 * head + 8)
                    for key in range(17):
                        value = seen[f"values {number}"][image, key, own]
                        weight = seen[f"pattern {number}"][image, head, 0, key]
                        expected = contribution(out.weight[:, own] @ value * weight, image)
                        part = found.attention[image, number, head, key]
                        torch.testing.assert_close(part, expected, atol=1e-6, rtol=1e-4)
                expected = contribution(out.bias, image)
                torch.testing.assert_close(found.attention_bias[image, number], expected)
                expected = contribution(seen[f"mlp {number}"][image, 0], image)
                torch.testing.assert_close(found.mlp[image, number], expected)
            torch.testing.assert_close(found.bias[image], project @ norm.bias)


def test_a_pool_s_parts_are_its_heads_reading_its_tokens() -> None:
    """SigLIP's pool with plain hooks: torch's own attention weights, one key and head at a time."""
    model, pixels = bridged("transformers: SiglipModel")
    head = model.native.vision_model.head
    seen: dict[str, Tensor] = {}
    handle = head.attention.register_forward_pre_hook(
        lambda _, args: seen.update({"query": args[0], "keys": args[1]})
    )
    with torch.no_grad():
        native = model.native.get_image_features(pixel_values=pixels).pooler_output
        handle.remove()
        output, weights = head.attention(
            seen["query"], seen["keys"], seen["keys"], average_attn_weights=False
        )
    found = model.decompose(pixels)
    width = head.attention.embed_dim
    value = head.attention.in_proj_weight[2 * width :]
    out = head.attention.out_proj.weight
    norm = model.native.vision_model.post_layernorm
    unshifted = seen["keys"] - norm.bias
    n_heads = head.attention.num_heads
    for h in range(n_heads):
        own = slice(h * width // n_heads, (h + 1) * width // n_heads)
        for key in (0, 5, 15):
            moved = unshifted[:, key] @ value[own].T @ out[:, own].T
            expected = moved * weights[:, h, 0, key, None]
            torch.testing.assert_close(found.pool[:, h, key], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found.pool_mlp, native - output[:, 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["demo", "emoji"])
def test_the_shipped_and_the_real_checkpoint_are_taken_apart(
    name: str, request: pytest.FixtureRequest
) -> None:
    if name == "emoji":
        name = request.getfixturevalue("emoji_clip")
    model = vp.load_model(name)
    pixels = model.preprocess(list(vp.demo.draw(4, seed=5).images))
    found = model.decompose(pixels)
    expected = model.encode_image(pixels, normalize=False)
    assert worst(found.total(), expected) < 1e-5
    assert sum(found.shares().values()) == pytest.approx(1, abs=1e-4)
    texts = model.encode_text(["a red circle", "a blue square"])
    onto = model.decompose(pixels, onto=texts)
    assert worst(onto.total(), expected @ texts.T) < 1e-5
    assert worst(onto.attention, found.attention @ texts.T) < 1e-5
    assert json.loads(json.dumps(found.to_dict()))["n_images"] == 4
    assert len(found.plot().axes) >= 3
    assert found.table().row_count == model.cfg.n_layers + 2


def test_what_an_edit_changes_is_a_part_of_its_own(model: VisionBridge, pixels: Tensor) -> None:
    plain = model.decompose(pixels)
    assert plain.hooks is None
    edit = vp.Edit.clamp("blocks.1.hook_resid_post", {3: 5.0}, tokens="all")
    with model.edit(edit):
        found = model.decompose(pixels)
        expected = model.encode_image(pixels, normalize=False)
    assert isinstance(found, Decomposition)
    assert worst(found.total(), expected) < 1e-5
    assert found.hooks is not None
    assert float(found.hooks.abs().max()) > 1e-2


def test_a_model_in_train_mode_is_read_in_eval_mode(model: VisionBridge, pixels: Tensor) -> None:
    expected = model.decompose(pixels).total()
    model.train()
    try:
        assert torch.equal(model.decompose(pixels).total(), expected)
        assert model.training
    finally:
        model.eval()


def test_half_precision_is_summed_in_single(tiny_clip: str, pixels: Tensor) -> None:
    half = vp.load_model(tiny_clip).to(torch.bfloat16)
    found = half.decompose(pixels.bfloat16())
    assert found.attention.dtype == torch.float32
    assert worst(found.total(), half.encode_image(pixels.bfloat16(), normalize=False)) < 0.1


def test_views_that_were_not_asked_for_say_how_to_get_them(
    model: VisionBridge, pixels: Tensor
) -> None:
    found = model.decompose(pixels, heads=False, tokens=False)
    with pytest.raises(ValueError, match="heads=True"):
        found.by_head()
    with pytest.raises(ValueError, match="tokens=True"):
        found.by_token()
    onto = model.decompose(pixels, onto=torch.eye(16))
    with pytest.raises(ValueError, match="without onto="):
        onto.shares()


def test_input_that_has_no_parts_is_refused(model: VisionBridge, pixels: Tensor) -> None:
    with pytest.raises(ValueError, match="a batch of images"):
        model.decompose(pixels[0])
    with pytest.raises(ValueError, match="NaN or infinity"):
        model.decompose(pixels * float("nan"))
    with pytest.raises(ValueError, match="embed the texts with the same model"):
        model.decompose(pixels, onto=torch.eye(7))


def test_a_tower_changed_behind_the_adapter_s_back_is_noticed(
    tiny_clip: str, pixels: Tensor
) -> None:
    native = CLIPModel.from_pretrained(tiny_clip).eval()
    native.visual_projection = nn.Sequential(native.visual_projection, nn.Tanh())
    with pytest.raises(UnsupportedModelError, match="a head that the decomposition does not know"):
        vp.wrap(native).decompose(pixels)
