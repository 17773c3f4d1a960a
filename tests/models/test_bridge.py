"""The CLIP bridge against the native module, which nothing of ours has touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

import vision_plugin as vp
from vision_plugin.models import UnknownHookError, UnsupportedModelError, VisionBridge

CANONICAL = [
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_attn_scores",
    "attn.hook_pattern",
    "attn.hook_z",
    "mlp.hook_pre",
    "mlp.hook_post",
]


@pytest.fixture(scope="module")
def model(clip_folder: str) -> VisionBridge:
    return vp.load_model(clip_folder)


@pytest.fixture(scope="module")
def pixels(model: VisionBridge) -> Tensor:
    height, width = model.adapter.tower_dimensions.image_size
    return torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def expected(clip_folder: str, pixels: Tensor) -> Tensor:
    native = CLIPModel.from_pretrained(clip_folder).eval()
    with torch.no_grad():
        return native.get_image_features(pixel_values=pixels).pooler_output


@torch.no_grad()
def test_output_is_the_native_modules_bit_for_bit(model, pixels, expected) -> None:
    assert torch.equal(model(pixels), expected)
    assert torch.equal(model(pixel_values=pixels), expected)


@torch.no_grad()
def test_looking_at_everything_changes_no_bit(model, pixels, expected) -> None:
    output, cache = model.run_with_cache(pixels)
    assert torch.equal(output, expected)
    assert all(f"blocks.0.{name}" in cache.cache_dict for name in CANONICAL)
    assert {"hook_embed", "hook_pos_embed", "ln_final.hook_normalized"} <= set(cache.cache_dict)


@torch.no_grad()
def test_weights_scaled_by_ten_stay_exact(clip_folder, pixels) -> None:
    native = CLIPModel.from_pretrained(clip_folder).eval()
    for parameter in native.parameters():
        parameter.mul_(10)
    expected = native.get_image_features(pixel_values=pixels).pooler_output
    assert torch.equal(vp.wrap(native)(pixels), expected)


@torch.no_grad()
@pytest.mark.parametrize("model_class", [CLIPVisionModel, CLIPVisionModelWithProjection])
def test_towers_alone_are_exact(tiny_clip, model_class) -> None:
    native = model_class.from_pretrained(tiny_clip).eval()
    pixels = torch.randn(2, 3, 32, 32)
    output = native(pixel_values=pixels)
    expected = getattr(output, "image_embeds", None)
    expected = output.last_hidden_state if expected is None else expected
    bridge = vp.wrap(native)
    assert torch.equal(bridge(pixels), expected)
    assert bridge.image_features(pixels).shape == (2, expected.shape[-1])


@torch.no_grad()
def test_wrapping_leaves_the_module_as_it_was(tiny_clip) -> None:
    native = CLIPModel.from_pretrained(tiny_clip).eval()
    before = [(name, id(module)) for name, module in native.named_modules()]
    bridge = vp.wrap(native)
    assert [(name, id(module)) for name, module in native.named_modules()] == before
    assert bridge.native is native
    mine = {p.data_ptr() for p in native.parameters()}
    assert {p.data_ptr() for p in bridge.original_model.parameters()} == mine


@torch.no_grad()
def test_residual_parts_add_up(model, pixels) -> None:
    _, cache = model.run_with_cache(pixels)
    last = model.cfg.n_layers
    parts = cache.decompose_resid(layer=last, mode="all")
    torch.testing.assert_close(parts.sum(0), cache["resid_post", last - 1], rtol=1e-5, atol=1e-5)
    by_layer = cache.accumulated_resid(layer=last)
    assert torch.equal(by_layer[-1], cache["resid_post", last - 1])


@torch.no_grad()
def test_patterns_are_distributions_and_edits_to_them_bite(model, pixels, expected) -> None:
    _, cache = model.run_with_cache(pixels, names_filter=["blocks.1.attn.hook_pattern"])
    pattern = cache["pattern", 1]
    torch.testing.assert_close(pattern.sum(-1), torch.ones_like(pattern.sum(-1)))

    def zero(pattern: Tensor, hook: object) -> Tensor:
        return torch.zeros_like(pattern)

    def zero_in_place(pattern: Tensor, hook: object) -> None:
        pattern.zero_()

    returned = model.run_with_hooks(pixels, fwd_hooks=[("blocks.1.attn.hook_pattern", zero)])
    in_place = model.run_with_hooks(
        pixels, fwd_hooks=[("blocks.1.attn.hook_pattern", zero_in_place)]
    )
    assert (returned - expected).abs().max() > 1e-3
    assert torch.equal(returned, in_place)


@torch.no_grad()
def test_an_edited_pattern_gives_what_the_formula_gives(model, pixels) -> None:
    """The output after uniform attention in block 1, computed by hand from the native weights."""
    layer = _tower(model.native).encoder.layers[1]
    _, cache = model.run_with_cache(pixels)
    x = cache["resid_pre", 1]
    values = layer.self_attn.v_proj(layer.layer_norm1(x)).mean(dim=1, keepdim=True)
    expected = layer.self_attn.out_proj(values).expand_as(x)

    def uniform(pattern: Tensor, hook: object) -> Tensor:
        return torch.full_like(pattern, 1 / pattern.shape[-1])

    with model.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", uniform)]):
        _, edited = model.run_with_cache(pixels)
    torch.testing.assert_close(edited["attn_out", 1], expected, rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_the_pattern(model, pixels) -> None:
    seen: list[Tensor] = []

    def keep(pattern: Tensor, hook: object) -> None:
        seen.append(pattern)

    output = model.run_with_hooks(pixels, fwd_hooks=[("blocks.1.attn.hook_pattern", keep)])
    (gradient,) = torch.autograd.grad(output.sum(), seen)
    assert gradient.abs().max() > 0


@torch.no_grad()
def test_heads_results_sum_to_the_attention_output(model, pixels, expected) -> None:
    model.set_use_attn_result(True)
    try:
        output, cache = model.run_with_cache(pixels)
    finally:
        model.set_use_attn_result(False)
    bias = _tower(model.native).encoder.layers[1].self_attn.out_proj.bias
    torch.testing.assert_close(
        cache["result", 1].sum(-2) + bias, cache["attn_out", 1], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_every_layer_can_be_stopped_at_and_started_from(model, pixels, expected) -> None:
    _, cache = model.run_with_cache(pixels)
    for layer in range(model.cfg.n_layers + 1):
        residual = model(pixels, stop_at_layer=layer)
        name = ("resid_pre", layer) if layer < model.cfg.n_layers else ("resid_post", layer - 1)
        assert torch.equal(residual, cache[name])
        assert torch.equal(model(residual, start_at_layer=layer), expected)
        assert torch.equal(
            model(cache["resid_pre", 0], stop_at_layer=layer, start_at_layer=0), residual
        )
    assert torch.equal(model(pixels), expected), "a stretch of the model left something behind"


@torch.no_grad()
def test_a_stopped_pass_runs_and_caches_nothing_beyond(model, pixels) -> None:
    residual, cache = model.run_with_cache(pixels, stop_at_layer=1)
    assert torch.equal(residual, model(pixels, stop_at_layer=1))
    assert "blocks.0.hook_resid_post" in cache.cache_dict
    assert not any(name.startswith("blocks.1.attn") for name in cache.cache_dict)


def test_a_wrong_stretch_is_an_error_that_names_the_model(model, pixels) -> None:
    with pytest.raises(ValueError, match=r"stop_at_layer=99 is out of range: .* blocks"):
        model(pixels, stop_at_layer=99)
    with pytest.raises(ValueError, match=r"start_at_layer takes a residual stream"):
        model(pixels, start_at_layer=1)


@torch.no_grad()
def test_a_hook_fires_by_each_of_its_names(model, pixels) -> None:
    silent = (
        "hook_attn_scores",
        "hook_pattern",
        "hook_result",
        "hook_mlp_in",
        "hook_hidden_states",
    )
    fired: set[str] = set()
    for name in model.hook_dict:
        if not name.endswith(silent):
            model.run_with_hooks(
                pixels[:1], fwd_hooks=[(name, lambda t, hook, n=name: fired.add(n))]
            )
    expected = {name for name in model.hook_dict if not name.endswith(silent)}
    assert fired == expected - {"pos_embed.hook_in"}


def test_an_unknown_hook_is_an_error_with_near_matches(model, pixels) -> None:
    name = "blocks.1.hook_resid_pst"
    for attempt in (
        lambda: model.run_with_cache(pixels, names_filter=name),
        lambda: model.run_with_hooks(pixels, fwd_hooks=[(name, print)]),
        lambda: model.hooks(fwd_hooks=[(name, print)]),
        lambda: model.add_hook(name, print),
        lambda: model.harvest(pixels, name),
    ):
        with pytest.raises(UnknownHookError, match=r"blocks\.1\.hook_resid_post"):
            attempt()


@torch.no_grad()
def test_harvest_equals_the_bridges_cache(model, pixels) -> None:
    _, cache = model.run_with_cache(pixels)
    names = [n for n in cache.cache_dict if not n.endswith(("scores", "pattern", "hidden_states"))]
    names = [n for n in names if not n.endswith(("hook_scale", "hook_normalized", "hook_result"))]
    assert len(names) > 100
    harvested = model.harvest(pixels, names)
    assert all(torch.equal(harvested[name], cache.cache_dict[name]) for name in names)
    normalised = model.harvest(pixels, "ln_final.hook_normalized")["ln_final.hook_normalized"]
    torch.testing.assert_close(normalised, cache["ln_final.hook_normalized"], rtol=1e-5, atol=1e-5)


def test_what_cannot_be_harvested_says_how_else_to_get_it(model, pixels) -> None:
    with pytest.raises(
        ValueError, match=r"run_with_cache\(names_filter='blocks.0.attn.hook_pattern'"
    ):
        model.harvest(pixels, "blocks.0.attn.hook_pattern")


@torch.no_grad()
def test_joint_space_is_the_native_one(clip_folder, model, pixels) -> None:
    native = CLIPModel.from_pretrained(clip_folder).eval()
    texts = ["a red circle", "a blue square"]
    tokens = model.tokenizer(texts)
    logits = native(pixel_values=pixels, **tokens).logits_per_image
    mine = model.logit_scale * model.encode_image(pixels) @ model.encode_text(texts).T
    torch.testing.assert_close(mine, logits, rtol=1e-4, atol=1e-4)


def test_transformer_lens_finds_the_adapter_by_itself(tiny_clip) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    native = CLIPModel.from_pretrained(tiny_clip, attn_implementation="eager").eval()
    bridge = TransformerBridge.boot_transformers(tiny_clip)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = native.get_image_features(pixel_values=pixels).pooler_output
        output, cache = bridge.run_with_cache(pixels)
    assert type(bridge) is TransformerBridge
    assert torch.equal(output, expected)
    assert cache["resid_post", 2].shape == (2, 17, 32)


@torch.no_grad()
def test_half_precision_runs(tiny_clip) -> None:
    model = vp.load_model(tiny_clip, dtype=torch.bfloat16)
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.bfloat16)
    output, cache = model.run_with_cache(pixels)
    assert output.dtype == torch.bfloat16
    assert torch.isfinite(output).all()
    assert cache["pattern", 0].shape == (2, 4, 17, 17)
    native = model.native.get_image_features(pixel_values=pixels).pooler_output
    assert torch.equal(output, native), "the bridge and the native module share weights and dtype"


def test_an_unsupported_module_is_refused_with_the_way_out() -> None:
    with pytest.raises(UnsupportedModelError, match=r"no adapter for torch.*Linear.*CONTRIBUTING"):
        vp.wrap(torch.nn.Linear(2, 2))


def _tower(native: CLIPModel) -> CLIPVisionModel:
    return native.vision_model
