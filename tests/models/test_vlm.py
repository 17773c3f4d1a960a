"""A vision-language model as one object, against the native module and plain hooks on it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import vision_plugin as vp
from tests._clip import make_sae
from tests._vlms import FAMILIES, tiny_inputs, tiny_vlm
from vision_plugin.models import UnknownHookError, UnsupportedModelError
from vision_plugin.models.site import signature

READ = "blocks.2.hook_resid_post"
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def native(family: str) -> Any:
    return tiny_vlm(family)


@pytest.fixture(scope="module")
def vlm(native: Any) -> vp.VisionLanguageBridge:
    return vp.wrap_vlm(native)


@pytest.fixture(scope="module")
def llava() -> vp.VisionLanguageBridge:
    return vp.wrap_vlm(tiny_vlm("llava"))


def shift() -> Tensor:
    return 4 * torch.randn(32, generator=torch.Generator().manual_seed(5))


def whole(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return inputs without padding."""
    return {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}


# ---------------------------------------------------------------------- the native module


@torch.no_grad()
@pytest.mark.parametrize("images", [1, 2])
def test_logits_and_tokens_are_the_native_modules_to_the_bit(family, native, vlm, images) -> None:
    inputs = tiny_inputs(family, images=images)
    assert torch.equal(vlm(whole(inputs)), native(**whole(inputs)).logits)
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    expected = native.generate(**inputs, **options)
    found = vlm.generate(inputs, return_type="output", **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(map(torch.equal, found.logits, expected.logits))
    length = inputs["input_ids"].shape[1]
    tokens = vlm.generate(inputs, return_type="tokens", **GREEDY)
    assert torch.equal(tokens, expected.sequences[:, length:])


@torch.no_grad()
def test_one_pass_fires_and_caches_the_hooks_of_both_parts(family, vlm) -> None:
    inputs = tiny_inputs(family)
    logits, cache = vlm.run_with_cache(inputs)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits[real], vlm(inputs)[real], rtol=1e-4, atol=1e-4)
    for name in ("resid_pre", "resid_post", "attn_out", "mlp_out"):
        assert cache[name, 1].shape[-1] == 48
        assert cache[f"vision.blocks.1.hook_{name}"].shape[-1] == 32
    for part in ("", "vision."):
        assert f"{part}blocks.1.attn.hook_pattern" in cache.cache_dict
    names = ["vision.blocks.1.hook_resid_post", "blocks.0.hook_resid_post"]
    fired: list[str] = []
    hooks = [(name, lambda x, hook, name=name: fired.append(name)) for name in names]
    vlm.run_with_hooks(inputs, fwd_hooks=hooks)
    assert fired == names
    few, kept = vlm.run_with_cache(inputs, names_filter=names, return_cache_object=False)
    assert sorted(kept) == sorted(names)
    assert torch.equal(few, vlm(inputs))
    with pytest.raises(UnknownHookError, match=r"vision\.blocks\.1\.hook_resid_post"):
        vlm.run_with_cache(inputs, names_filter="vision.blocks.1.hook_resid_pots")


@torch.no_grad()
def test_an_edit_of_the_tower_is_a_plain_hook_on_the_native_tower(family, native, vlm) -> None:
    inputs, change = tiny_inputs(family), shift()
    options = {**GREEDY, "output_logits": True, "return_dict_in_generate": True}
    plain = native.generate(**inputs, **options)  # installs transformers' recorders first
    vlm.generate(inputs, return_type="tokens", **GREEDY)
    tower = vlm.vision.native
    handle = tower.encoder.layers[2].register_forward_hook(
        lambda module, args, output: output + change, prepend=True
    )
    try:
        expected = native.generate(**inputs, **options)
    finally:
        handle.remove()
    edit = vp.Edit.add(vp.steering.Directions(READ, change), {0: 1.0})
    with vlm.edit(edit):
        found = vlm.generate(inputs, return_type="output", **options)
    hooks = [(f"vision.{READ}", lambda x, hook: x + change)]
    with vlm.hooks(fwd_hooks=hooks):
        hooked = vlm.generate(inputs, return_type="output", **options)
    assert (expected.logits[0] - plain.logits[0]).abs().max() > 0.1
    torch.testing.assert_close(found.logits[0], expected.logits[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(hooked.logits[0], expected.logits[0])
    assert torch.equal(found.sequences, expected.sequences)
    after = vlm.generate(inputs, return_type="output", **options)
    assert all(map(torch.equal, after.logits, plain.logits))


@torch.no_grad()
def test_a_spliced_sae_replaces_what_the_language_model_reads(family, native, vlm) -> None:
    inputs, sae = tiny_inputs(family), make_sae(READ)
    handle = vlm.vision.native.encoder.layers[2].register_forward_hook(
        lambda module, args, output: sae.decode(sae.encode(output)), prepend=True
    )
    try:
        expected = native(**whole(inputs)).logits
    finally:
        handle.remove()
    plain = vlm(whole(inputs))
    with vlm.saes(sae):
        torch.testing.assert_close(vlm(whole(inputs)), expected, rtol=1e-3, atol=1e-3)
        _, cache = vlm.run_with_cache(inputs)
        assert f"vision.{READ}.hook_sae_acts_post" in cache.cache_dict
    assert (expected - plain).abs().max() > 0.1
    with vlm.saes(sae, use_error_term=True):
        torch.testing.assert_close(vlm(whole(inputs)), plain, rtol=1e-3, atol=1e-3)
    assert torch.equal(vlm(whole(inputs)), plain)


def test_the_native_module_stays_untouched(family) -> None:
    module = tiny_vlm(family)
    names = [name for name, _ in module.named_modules()]
    kernel = module.config._attn_implementation
    vp.wrap_vlm(module)
    assert [name for name, _ in module.named_modules()] == names
    assert module.config._attn_implementation == kernel
    assert not any(m._forward_hooks for m in module.modules())


# ---------------------------------------------------------------------- types and sampling


@torch.no_grad()
@pytest.mark.parametrize("parts", [("whole",), ("language_model", "multi_modal_projector")])
def test_a_text_model_in_bfloat16_writes_what_the_native_one_writes(parts) -> None:
    module = tiny_vlm("llava")
    for part in parts:
        (module if part == "whole" else getattr(module.model, part)).to(torch.bfloat16)
    if parts != ("whole",):
        module.lm_head.to(torch.bfloat16)
        module.model.multi_modal_projector.to(torch.float32)
    vlm, inputs = vp.wrap_vlm(module), tiny_inputs("llava")
    cast = {**inputs, "pixel_values": inputs["pixel_values"].to(vlm.vision.dtype)}
    expected = module.generate(**cast, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(vlm.generate(inputs, return_type="tokens", **GREEDY), expected)
    plain = vlm(inputs)
    with vlm.steer(make_sae(READ), {3: 500.0}):
        assert (vlm(inputs) - plain).abs().max() > 0.1


@torch.no_grad()
def test_sampling_with_a_seed_repeats_and_leaves_the_generator_alone(llava) -> None:
    inputs, options = tiny_inputs("llava"), {"max_new_tokens": 8, "do_sample": True}
    torch.manual_seed(7)
    expected = llava.native.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
    state = torch.get_rng_state()
    found = llava.generate(inputs, return_type="tokens", seed=7, **options)
    assert torch.equal(found, expected)
    assert torch.equal(torch.get_rng_state(), state)
    others = [llava.generate(inputs, return_type="tokens", seed=s, **options) for s in (8, 9)]
    assert any(not torch.equal(other, found) for other in others)


@torch.no_grad()
def test_weights_are_shared_with_the_native_module() -> None:
    module = tiny_vlm("llava")
    vlm, inputs = vp.wrap_vlm(module), whole(tiny_inputs("llava"))
    other = copy.deepcopy(module)
    for parameter in other.parameters():
        parameter.mul_(1.1)
    module.load_state_dict(other.state_dict())
    assert torch.equal(vlm(inputs), other(**inputs).logits)
    vlm.to(torch.float64)
    assert vlm(inputs).dtype == torch.float64


@torch.no_grad()
def test_every_cast_and_the_state_are_of_the_whole_model() -> None:
    vlm, inputs = vp.wrap_vlm(tiny_vlm("llava")), whole(tiny_inputs("llava"))
    before = vlm(inputs)
    state = {name: tensor.clone() for name, tensor in vlm.state_dict().items()}
    assert state.keys() == vlm.native.state_dict().keys()
    assert [n for n, _ in vlm.named_parameters()] == [n for n, _ in vlm.native.named_parameters()]
    assert vlm.double() is vlm
    assert {p.dtype for p in vlm.vision.parameters()} == {torch.float64}
    assert vlm.float().cpu() is vlm
    assert {p.dtype for p in vlm.parameters()} == {torch.float32}
    for parameter in vlm.parameters():
        parameter.zero_()
    assert not torch.equal(vlm(inputs), before)
    vlm.load_state_dict(state)
    assert torch.equal(vlm(inputs), before)
    assert not any(p.requires_grad for p in vlm.requires_grad_(False).vision.parameters())


def test_batches_hold_one_prompt_and_more(llava) -> None:
    for size in (0, -1):
        with pytest.raises(ValueError, match=f"batch_size={size}: use 1 or more"):
            llava.generate([1, 2], "prompt", return_type="tokens", batch_size=size)


@torch.no_grad()
def test_load_model_takes_the_tower_of_a_saved_model(family, native, tmp_path) -> None:
    native.save_pretrained(tmp_path)
    parts = dict(native.model.named_children())
    tower = parts["vision_model" if "vision_model" in parts else "vision_tower"]
    pixels = torch.randn(2, 3, 32, 32)
    expected = tower(pixels, output_hidden_states=True).hidden_states[2]
    _, cache = vp.load_model(str(tmp_path)).run_with_cache(pixels)
    assert torch.equal(cache["blocks.1.hook_resid_post"], expected)


@torch.no_grad()
@pytest.mark.parametrize("away", ["model.language_model", "model.vision_tower", "lm_head"])
def test_device_map_spreads_a_model_that_is_wrapped(away, tmp_path) -> None:
    module, inputs = tiny_vlm("llava"), tiny_inputs("llava")
    module.save_pretrained(tmp_path)
    parts = ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head")
    loaded = type(module).from_pretrained(
        tmp_path,
        device_map={part: "disk" if part == away else "cpu" for part in parts},
        offload_folder=tmp_path / "offloaded",
    )
    assert {p.device.type for p in loaded.get_submodule(away).parameters()} == {"meta"}
    vlm = vp.wrap_vlm(loaded.eval())
    expected = module.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(vlm.generate(inputs, return_type="tokens", **GREEDY), expected)
    plain = vlm(whole(inputs))
    assert torch.equal(plain, module(**whole(inputs)).logits)
    with vlm.edit(vp.Edit.add(vp.steering.Directions(READ, shift()), {0: 1.0})):
        assert (vlm(whole(inputs)) - plain).abs().max() > 0.1


@torch.no_grad()
def test_steering_adds_at_most_a_copy_of_the_towers_activations() -> None:
    from benchmarks._live_memory import peak_bytes

    vlm, inputs = vp.wrap_vlm(tiny_vlm("llava")), tiny_inputs("llava", batch=16)
    sae = make_sae(READ)

    def written() -> Tensor:
        return vlm.generate(inputs, return_type="tokens", **GREEDY)

    plain = written()
    without = peak_bytes(written)
    copy_of_all = 16 * 17 * 32 * 4
    ballast = peak_bytes(lambda: (written(), torch.zeros(without + copy_of_all, dtype=torch.int8)))
    assert ballast >= without + copy_of_all  # the measure sees what is there
    with vlm.steer(sae, {3: 900.0}):
        assert not torch.equal(written(), plain)
        assert peak_bytes(written) <= without + copy_of_all


@torch.no_grad()
def test_a_batch_writes_what_each_image_gets_alone(family, vlm) -> None:
    inputs = tiny_inputs(family, batch=3)
    tokens = vlm.generate(inputs, return_type="tokens", **GREEDY)
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in inputs.items()}
        expected = vlm.native.generate(**alone, **GREEDY)[0, inputs["input_ids"].shape[1] :]
        assert torch.equal(tokens[row, : len(expected)], expected)


# ---------------------------------------------------------------------- the tower and its SAEs


def test_a_tower_has_one_signature_wherever_it_stands(llava) -> None:
    from transformers import CLIPConfig, CLIPModel

    tower = llava.vision.native
    clip = CLIPModel(CLIPConfig(vision_config=tower.config.to_dict()))
    clip.vision_model.load_state_dict(tower.state_dict())
    trained_on = signature(vp.wrap(clip))
    assert trained_on == signature(llava.vision) == signature(vp.wrap(clip.vision_model))
    sae = make_sae(READ)
    sae.cfg.metadata.model_signature = trained_on
    llava.add_sae(sae)
    llava.reset_saes()
    sae.cfg.metadata.model_signature = signature(vp.wrap(tiny_vlm("gemma3")))
    with pytest.raises(ValueError, match="check_model=False"):
        llava.steer(sae, {1: 2.0}).__enter__()
    with pytest.raises(ValueError, match="check_model=False"), llava.saes(sae):
        pass
    with pytest.raises(ValueError, match="whose weights differ from the weights of") as refused:
        llava.add_sae(sae)
    assert ". " not in str(refused.value)  # one sentence
    with llava.steer(sae, {1: 2.0}, check_model=False), llava.saes(sae, check_model=False):
        pass
    llava.add_sae(sae, check_model=False)
    llava.reset_saes()


def test_a_signature_of_a_whole_clip_is_still_its_own(llava) -> None:
    from transformers import CLIPConfig, CLIPModel

    model = vp.wrap(CLIPModel(CLIPConfig(vision_config=llava.vision.native.config.to_dict())))
    matrices = [p for p in model.native.parameters() if p.ndim >= 2]
    chosen = matrices[:: len(matrices) // 8][:8]
    sae = make_sae(READ)
    sae.cfg.metadata.model_signature = [round(p.norm().item(), 4) for p in chosen]
    model.add_sae(sae)


@torch.no_grad()
def test_tokens_are_by_default_those_of_the_training(llava) -> None:
    inputs, sae = tiny_inputs("llava"), make_sae("blocks.1.hook_resid_post")
    sae.cfg.metadata.tokens = "patch"
    with llava.steer(sae, {3: 40.0}):
        steered = llava(inputs)
    with llava.steer(sae, {3: 40.0}, tokens="patch"):
        assert torch.equal(llava(inputs), steered)
    with llava.steer(sae, {3: 40.0}, tokens="all"):
        assert not torch.equal(llava(inputs), steered)
    spliced = llava.run_with_saes(inputs, saes=sae)
    assert torch.equal(llava.run_with_saes(inputs, saes=sae, tokens="patch"), spliced)
    assert not torch.equal(llava.run_with_saes(inputs, saes=sae, tokens="all"), spliced)
    with llava.edit(vp.Edit.clamp(sae, {3: 40.0})):
        assert torch.equal(llava(inputs), steered)


@torch.no_grad()
def test_saes_run_under_the_names_that_a_tower_has(llava) -> None:
    inputs, sae = tiny_inputs("llava"), make_sae(READ)
    plain = llava(inputs)
    with llava.saes(sae):
        expected = llava(inputs)
    acts = f"vision.{READ}.hook_sae_acts_post"
    assert torch.equal(llava.run_with_saes(inputs, saes=[sae]), expected)
    logits, cache = llava.run_with_cache_with_saes(inputs, saes=[sae])
    _, stream = llava.run_with_cache(inputs, names_filter=f"vision.{READ}")
    torch.testing.assert_close(cache[acts], sae.encode(stream[f"vision.{READ}"]))
    torch.testing.assert_close(logits[0, -1], expected[0, -1], rtol=1e-4, atol=1e-4)
    zeroed = [(acts, lambda latents, hook: torch.zeros_like(latents))]
    hooked = llava.run_with_hooks_with_saes(inputs, fwd_hooks=zeroed, saes=[sae])
    empty = [(f"vision.{READ}", lambda x, hook: sae.decode(torch.zeros_like(sae.encode(x))))]
    torch.testing.assert_close(hooked, llava.run_with_hooks(inputs, fwd_hooks=empty))
    assert (hooked - expected).abs().max() > 0.1
    assert torch.equal(llava(inputs), plain)
    with pytest.raises(ValueError, match="behind what"):
        llava.run_with_saes(inputs, saes=make_sae("blocks.3.hook_resid_post"))


@torch.no_grad()
def test_a_swap_takes_values_of_other_images(llava) -> None:
    inputs, sae = tiny_inputs("llava", batch=3), make_sae(READ)
    pixels = inputs["pixel_values"]
    _, cache = llava.run_with_cache(inputs, names_filter=f"vision.{READ}")
    own = cache[f"vision.{READ}"]
    latents = sae.encode(own)
    moved = latents.clone()
    moved[..., 3] = latents.roll(1, 0)[..., 3]
    change = sae.decode(moved) - sae.decode(latents)
    expected = llava.run_with_hooks(
        inputs, fwd_hooks=[(f"vision.{READ}", lambda x, hook: x + change)]
    )
    with llava.edit(vp.Edit.swap(sae, [3]), source=pixels.roll(1, 0)):
        torch.testing.assert_close(llava(inputs), expected, rtol=1e-4, atol=1e-4)
    assert (expected - llava(inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("hook_name", ["blocks.3.hook_resid_post", "blocks.3.hook_resid_pre"])
def test_a_change_behind_what_is_read_is_refused(llava, hook_name) -> None:
    sae, message = make_sae(hook_name), r"behind what .* reads \(blocks\.2\.hook_resid_post\)"
    edit = vp.Edit.clamp(sae, {1: 2.0})
    for attempt in (
        lambda: llava.steer(sae, {1: 2.0}),
        lambda: llava.edit(edit),
        lambda: llava.steer(edit),
        lambda: llava.add_edit(edit),
        lambda: llava.add_sae(sae),
        lambda: llava.saes(sae).__enter__(),
    ):
        with pytest.raises(ValueError, match=message) as refused:
            attempt()
        assert ". " not in str(refused.value)  # one sentence
    for attached in (llava.vision.steer(sae, {1: 2.0}), llava.vision.saes(sae)):
        with attached, pytest.raises(ValueError, match=message):
            llava.generate(tiny_inputs("llava"), return_type="tokens")


def test_a_class_token_that_nobody_reads_is_refused(llava) -> None:
    with pytest.raises(ValueError, match="does not read the class token"):
        llava.steer(make_sae(READ), {1: 2.0}, tokens="cls")
    with llava.steer(make_sae("blocks.1.hook_resid_post"), {1: 2.0}, tokens="cls"):
        pass


# ---------------------------------------------------------------------- what does not fit


def test_a_tower_without_an_adapter_is_named() -> None:
    import transformers as hf

    config = hf.Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 99,
            "num_attention_heads": 2, "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2,
            "out_hidden_size": 32,
        },
    )  # fmt: skip
    module = hf.Qwen2_5_VLForConditionalGeneration(config)
    message = r"its vision tower, model\.visual, is a Qwen2_5_VisionTransformerPretrainedModel"
    with pytest.raises(UnsupportedModelError, match=message):
        vp.wrap_vlm(module)


def test_a_newer_tower_without_an_adapter_is_named_too() -> None:
    import transformers as hf

    config = hf.Qwen3VLConfig(
        text_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 99,
            "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 2,
            "out_hidden_size": 32, "deepstack_visual_indexes": [0],
        },
    )  # fmt: skip
    module = hf.Qwen3VLForConditionalGeneration(config)
    with pytest.raises(UnsupportedModelError, match=r"model\.visual, is a Qwen3VLVisionModel"):
        vp.wrap_vlm(module)


def test_a_model_without_language_is_refused(llava) -> None:
    with pytest.raises(UnsupportedModelError, match="no vision-language model that is supported"):
        vp.wrap_vlm(llava.vision.native)


def test_inputs_without_a_processor_are_explained(llava) -> None:
    with pytest.raises(ValueError, match="wrapped without its processor"):
        llava.generate([], "What is shown?")
    with pytest.raises(ValueError, match="pixel_values is missing"):
        llava.generate({"input_ids": torch.zeros(1, 3, dtype=torch.long)})
    with pytest.raises(ValueError, match="return_type='tokens'"):
        llava.generate(tiny_inputs("llava"), **GREEDY)
