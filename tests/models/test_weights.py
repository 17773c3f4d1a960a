"""A bridge and its native module are one model, whatever is done to the weights of either."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge
from transformers import CLIPModel

import vision_plugin as vp
from benchmarks import families
from benchmarks._family_cases import Case
from vision_plugin.models import VisionBridge

REFUSED = ("vit_small_patch16_18x2_224", "RN50", "convnext_base")
CASES = {case.label: case for case in families.sample() if case.name not in REFUSED}


@cache
def built(label: str) -> tuple[nn.Module, Tensor]:
    model = vp.wrap(CASES[label].build())  # of a language model with a tower, the tower
    dims = model.adapter.tower_dimensions
    generator = torch.Generator().manual_seed(1)
    size = CASES[label].image or dims.image_size
    return model.native, torch.randn(2, dims.n_channels, *size, generator=generator)


KINDS = (
    "transformers: CLIPModel",
    "transformers: Siglip2VisionModel",
    "transformers: Dinov2WithRegistersModel",
    "transformers: DINOv3ViTModel",
    "transformers: DeiTForImageClassificationWithTeacher",
    "transformers: ViTMAEModel",
    "transformers: LlavaForConditionalGeneration",
    "timm: vit_giant_patch14_reg4_dinov2",
    "timm: eva_giant_patch14_224",
    "timm: vit_base_patch16_dinov3",
    "timm: vit_small_patch16_rope_mixed_224",
    "open_clip: ViT-B-32",
    "open_clip: coca_ViT-B-32",
    "open_clip: EVA02-B-16",
)
"""One case of each way to hold weights; the rest runs with the slow or exhaustive tests."""


@pytest.fixture(
    params=[
        label if label in KINDS else pytest.param(label, marks=pytest.mark.exhaustive)
        for label in CASES
    ]
)
def family(request: pytest.FixtureRequest) -> tuple[Case, nn.Module, Tensor]:
    """A case, a module of it that nobody may change, and images."""
    module, pixels = built(request.param)
    return CASES[request.param], module, pixels


@pytest.fixture(params=CASES)
def any_family(request: pytest.FixtureRequest) -> tuple[Case, nn.Module, Tensor]:
    """The same for every case of the matrix."""
    module, pixels = built(request.param)
    return CASES[request.param], module, pixels


def pickled(model: VisionBridge) -> VisionBridge:
    again: VisionBridge = pickle.loads(pickle.dumps(model))  # noqa: S301  # our own bytes
    return again


def other(module: nn.Module) -> nn.Module:
    """A copy of a module with other weights in every place."""
    changed = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.05 + parameter.flip(0))
    return changed


def q_name(model: VisionBridge) -> str:
    return f"blocks.{model.cfg.n_layers - 1}.attn.hook_q"


def assert_is(model: VisionBridge, native: Callable[..., Tensor], expected: Any, x: Tensor) -> None:
    """The bridge computes what ``expected`` computes, by each of its ways, to the bit."""
    assert torch.equal(model(x), native(expected, x))
    assert torch.equal(native(model.native, x), native(expected, x))
    name, twin = q_name(model), vp.wrap(expected)
    assert torch.equal(model.harvest(x, name)[name], twin.harvest(x, name)[name])
    _, seen = model.run_with_cache(x, names_filter=name)
    _, of_twin = twin.run_with_cache(x, names_filter=name)
    assert torch.equal(seen[name], of_twin[name])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("assign", [False, True])
def test_a_saved_state_loads_to_the_same_bits(any_family, assign, tmp_path: Path) -> None:
    case, module, pixels = any_family
    trained = other(module)
    file = tmp_path / "state.pt"
    torch.save(vp.wrap(trained).state_dict(), file)
    model = vp.wrap(copy.deepcopy(module))
    model.harvest(pixels, q_name(model))  # what this finds out may not outlive the weights
    result = model.load_state_dict(torch.load(file), assign=assign)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert_is(model, case.native, trained, pixels)
    owned = {id(p) for p in model.native.parameters()}
    assert {id(p) for p in model.original_model.parameters()} == owned


@torch.no_grad()
def test_the_state_is_the_native_modules(family) -> None:
    case, module, pixels = family
    model = vp.wrap(copy.deepcopy(module))
    assert list(model.state_dict()) == list(module.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in module.named_parameters()]
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in module.named_buffers()]
    fresh = other(module)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(case.native(fresh, pixels), model(pixels))


@pytest.mark.slow
@torch.no_grad()
def test_a_model_inside_another_module_keeps_its_state(family) -> None:
    case, module, pixels = family
    trained = other(module)
    whole = nn.ModuleDict({"tower": vp.wrap(trained), "head": nn.Linear(2, 2)})
    again = nn.ModuleDict({"tower": vp.wrap(copy.deepcopy(module)), "head": nn.Linear(2, 2)})
    for assign in (False, True):
        result = again.load_state_dict(whole.state_dict(), assign=assign)
        assert (result.missing_keys, result.unexpected_keys) == ([], [])
        assert_is(again["tower"], case.native, trained, pixels)
    state = whole.state_dict()
    last = next(name for name in reversed(state) if name.startswith("tower."))
    del state[last]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\)") as lost:
        again.load_state_dict(state)
    assert last in str(lost.value)


@pytest.mark.slow
@torch.no_grad()
def test_a_copy_and_a_pickle_are_models_of_their_own(family) -> None:
    case, module, pixels = family
    model = vp.wrap(copy.deepcopy(module), name="mine", revision="abc")
    model.harvest(pixels, q_name(model))
    dimensions = model.adapter.tower_dimensions
    for again in (copy.deepcopy(model), pickled(model)):
        assert isinstance(again, VisionBridge)
        assert (again.cfg.model_name, again.revision) == ("mine", "abc")
        assert again.adapter.tower_dimensions == dimensions
        assert_is(again, case.native, module, pixels)
        trained = other(module)
        again.load_state_dict(trained.state_dict())
        assert_is(again, case.native, trained, pixels)
        assert_is(model, case.native, module, pixels)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("cast", ["half", "double", "bfloat16", "to", "to_and_back"])
def test_a_cast_reaches_every_part(family, cast) -> None:
    case, module, pixels = family
    expected, model = copy.deepcopy(module), vp.wrap(copy.deepcopy(module))
    if cast == "to_and_back":
        model, expected = model.half().float(), expected.half().float()
    elif cast == "to":
        model, expected = model.to(torch.float64), expected.to(torch.float64)
    else:
        model, expected = getattr(model, cast)(), getattr(expected, cast)()
    types = {name: tensor.dtype for name, tensor in expected.named_parameters()}
    types |= {name: tensor.dtype for name, tensor in expected.named_buffers()}
    for part in (model, model.native):
        found = {name: tensor.dtype for name, tensor in part.named_parameters()}
        found |= {name: tensor.dtype for name, tensor in part.named_buffers()}
        assert found == types
    assert model.dtype == model.cfg.dtype == next(expected.parameters()).dtype
    if model.dtype != torch.float16:  # which some layers do not have on the CPU
        assert_is(model, case.native, expected, pixels.to(model.dtype))


@torch.no_grad()
def test_an_edited_pattern_has_the_precision_of_the_weights(family) -> None:
    _, module, pixels = family
    model, pixels = vp.wrap(copy.deepcopy(module)).double(), pixels.double()
    expected = model(pixels)
    hooks = [(f"blocks.{n}.attn.hook_pattern", as_it_is) for n in range(model.cfg.n_layers)]
    edited = model.run_with_hooks(pixels, fwd_hooks=hooks)
    assert edited.dtype == torch.float64
    assert float((edited - expected).abs().max()) < 1e-12 * max(1, float(expected.abs().max()))


def as_it_is(pattern: Tensor, hook: object) -> Tensor:
    return pattern.clone()


@torch.no_grad()
def test_what_is_done_to_the_native_module_is_done_to_the_bridge(family) -> None:
    case, module, pixels = family
    model, trained = vp.wrap(copy.deepcopy(module)), other(module)
    model.native.load_state_dict(trained.state_dict(), assign=True)
    assert_is(model, case.native, trained, pixels)
    model.native.double()
    assert_is(model, case.native, trained.double(), pixels.double())


def test_a_name_that_is_missing_or_unknown_is_an_error(family) -> None:
    _, module, _ = family
    model = vp.wrap(copy.deepcopy(module))
    state = model.state_dict()
    name, tensor = next(iter(state.items()))
    del state[name]
    with pytest.raises(RuntimeError, match=r"Missing key\(s\)"):
        model.load_state_dict(state)
    state["nothing.like.it"] = tensor
    result = model.load_state_dict(state, strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([name], ["nothing.like.it"])


@torch.no_grad()
def test_texts_are_cast_with_the_images(tiny_clip: str) -> None:
    texts = ["a red circle", "a blue square"]
    expected = CLIPModel.from_pretrained(tiny_clip).eval().double()
    model = vp.load_model(tiny_clip).double()
    tokens = model.tokenizer(texts)
    embedding = expected.get_text_features(**tokens).pooler_output
    assert torch.equal(model.encode_text(texts, normalize=False), embedding)
    for again in (copy.deepcopy(model), pickled(model)):
        assert torch.equal(again.encode_text(texts, normalize=False), embedding)


@torch.no_grad()
def test_names_that_transformer_lens_gives_are_understood(tiny_clip: str) -> None:
    model = vp.load_model(tiny_clip)
    native = model.native.vision_model
    new = torch.full_like(native.post_layernorm.weight, 3.0)
    by_lens = {"ln_final.weight": new, "blocks.1.attn.q.bias": torch.full((32,), 2.0)}
    assert model.load_state_dict(by_lens, strict=False).unexpected_keys == []
    assert torch.equal(native.post_layernorm.weight, new)
    assert bool((native.encoder.layers[1].self_attn.q_proj.bias == 2.0).all())


@torch.no_grad()
def test_a_state_under_the_names_of_transformer_lens_loads_or_is_refused(family) -> None:
    """Such a state is what ``state_dict()`` of TransformerLens's own bridge is."""
    _, module, _ = family
    trained = other(module)
    state = TransformerBridge.state_dict(vp.wrap(trained))
    model = vp.wrap(copy.deepcopy(module))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if {"ln_final.bias", "visual.ln_post.bias"} <= before.keys():  # both towers end in an ln_final
        with pytest.raises(RuntimeError, match=r"'ln_final\.bias' means 'visual\.ln_post\.bias'"):
            model.load_state_dict(state, strict=False)
        assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
        return
    assert model.load_state_dict(state, strict=False).unexpected_keys == []
    loaded, wanted = model.state_dict(), trained.state_dict()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, wanted[name]) or torch.equal(tensor, before[name])
    assert sum(torch.equal(loaded[name], wanted[name]) for name in loaded) == len(state)


def twice(activation: Tensor, hook: object) -> Tensor:
    return activation * 2


@torch.no_grad()
def test_hooks_and_saes_come_along_with_a_copy(tiny_clip: str) -> None:
    model, pixels = vp.load_model(tiny_clip), torch.randn(2, 3, 32, 32)
    plain = model(pixels)
    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=48))
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    model.add_sae(sae, use_error_term=True, tokens="patch")
    model.add_hook("blocks.1.hook_resid_post.hook_sae_acts_post", twice)
    model.add_hook("blocks.0.hook_mlp_out", twice, is_permanent=True)
    model.set_use_attn_result(True)
    expected = model(pixels)
    again = copy.deepcopy(model)
    assert torch.equal(again(pixels), expected)
    assert again.cfg.use_attn_result
    assert list(again.acts_to_saes) == ["blocks.1.hook_resid_post"]
    assert again.acts_to_saes["blocks.1.hook_resid_post"] is not sae
    with pytest.raises(TypeError, match=r"detach them with reset_saes\(\)"):
        pickle.dumps(model)
    again.reset_hooks(including_permanent=True)
    again.set_use_attn_result(False)
    assert torch.equal(again(pixels), plain)
    assert torch.equal(model(pixels), expected)
    model.reset_saes()
    assert torch.equal(pickled(model)(pixels), model(pixels))


def test_a_whole_model_is_saved_and_read_by_torch(tiny_clip: str) -> None:
    model, file = vp.load_model(tiny_clip), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    pixels = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(pixels), model(pixels))
