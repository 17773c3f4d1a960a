"""How long an attached SAE lasts, what it reads, and what resets take away."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from sae_lens import (
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from torch import Tensor

import vision_plugin as vp
from vision_plugin.models import VisionBridge
from vision_plugin.models.site import Site

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def model(tiny_clip: str) -> VisionBridge:
    return vp.load_model(tiny_clip)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def make_sae(hook_name: str = HOOK, seed: int = 0) -> StandardSAE:
    torch.manual_seed(seed)
    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=48))
    sae.cfg.metadata.hook_name = hook_name
    return sae


def make_transcoder(reads: str, writes: str, seed: int = 0) -> Transcoder:
    torch.manual_seed(seed)
    config = TranscoderConfig(d_in=32, d_out=32, d_sae=40, apply_b_dec_to_input=False)
    transcoder = Transcoder(config)
    transcoder.cfg.metadata.hook_name = reads
    transcoder.cfg.metadata.hook_name_out = writes
    return transcoder


# ---------------------------------------------------------------------- two names of one hook


@torch.no_grad()
@pytest.mark.parametrize("name", ["blocks.1.hook_out", "blocks.1.hook_resid_post"])
def test_one_hook_has_one_sae_under_whichever_name(model, pixels, name: str) -> None:
    first, second = make_sae(HOOK), make_sae(name, seed=1)
    assert model.hook_dict[name] is model.hook_dict[HOOK]
    expected = model.run_with_saes(pixels, saes=[second])
    model.add_sae(first)
    model.add_sae(second)
    assert model.acts_to_saes == {name: second}
    assert torch.equal(model(pixels), expected)
    model.reset_saes(HOOK)
    assert model.acts_to_saes == {}


@torch.no_grad()
def test_an_sae_comes_back_after_one_under_another_name(model, pixels) -> None:
    first, second = make_sae(HOOK), make_sae("blocks.1.hook_out", seed=1)
    model.add_sae(first)
    expected = model(pixels)
    with model.saes([second]):
        assert model.acts_to_saes == {"blocks.1.hook_out": second}
    assert model.acts_to_saes == {HOOK: first}
    assert torch.equal(model(pixels), expected)


# ---------------------------------------------------------------------- transcoders across layers

READS, WRITES = "blocks.0.ln2.hook_out", ("blocks.1.hook_mlp_out", "blocks.2.hook_mlp_out")


@torch.no_grad()
def test_a_cross_layer_transcoder_writes_at_several_layers_in_one_pass(model, pixels) -> None:
    parts = [make_transcoder(READS, name, seed) for seed, name in enumerate(WRITES)]
    source = model.harvest(pixels, READS)[READS]
    by_hand = [
        (name, lambda x, hook, part=part: part(source))
        for name, part in zip(WRITES, parts, strict=True)
    ]
    expected = model.run_with_hooks(pixels, fwd_hooks=by_hand)
    for _ in range(2):
        torch.testing.assert_close(model.run_with_saes(pixels, saes=parts), expected)
    model.add_sae(parts[0])
    model.add_sae(parts[1])
    assert list(model.acts_to_saes.values()) == parts
    torch.testing.assert_close(model(pixels), expected)
    model.reset_saes(READS)
    assert list(model.acts_to_saes.values()) == [parts[1]]
    model.reset_saes()
    assert model.acts_to_saes == {}


@torch.no_grad()
@pytest.mark.parametrize("attach", ["splice", "steer"])
def test_a_pass_never_uses_what_an_earlier_pass_read(model, pixels, attach: str) -> None:
    """A pass that stops in between leaves its reading behind; the next one may not take it."""
    transcoder = make_transcoder(READS, WRITES[1])
    later = model(pixels, stop_at_layer=1)
    context = model.saes([transcoder]) if attach == "splice" else model.steer(transcoder, {3: 9.0})
    with context:
        expected = model(pixels)
        model(pixels.flip(0), stop_at_layer=1)
        with pytest.raises(ValueError, match=rf"reads {READS}, which this pass did not run"):
            model(later, start_at_layer=1)
        assert torch.equal(model(pixels), expected)


# ---------------------------------------------------------------------- heads

APART = {
    "standard": (StandardSAE, StandardSAEConfig, {}),
    "gated": (GatedSAE, GatedSAEConfig, {}),
    "topk": (TopKSAE, TopKSAEConfig, {"k": 4}),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
}


@torch.no_grad()
@pytest.mark.parametrize("architecture", APART)
@pytest.mark.parametrize("tokens", ["all", "patch"])
@pytest.mark.parametrize("use_error_term", [False, True])
def test_heads_apart_and_joined_are_one_sae(
    model, pixels, architecture: str, tokens: str, use_error_term: bool
) -> None:
    sae_class, config_class, options = APART[architecture]
    made = []
    for reshape in ("none", "hook_z"):
        torch.manual_seed(0)
        sae = sae_class(config_class(d_in=32, d_sae=48, reshape_activations=reshape, **options))
        sae.W_dec.copy_(torch.randn_like(sae.W_dec))
        sae.cfg.metadata.hook_name = "blocks.1.attn.hook_z"
        made.append(sae)
    settings = {"tokens": tokens, "use_error_term": use_error_term}
    joined, apart = (model.run_with_saes(pixels, saes=[sae], **settings) for sae in made)
    assert torch.equal(apart, joined)
    _, cache = model.run_with_cache_with_saes(pixels, saes=[made[1]], **settings)
    _, of_joined = model.run_with_cache_with_saes(pixels, saes=[made[0]], **settings)
    name = "blocks.1.attn.hook_z.hook_sae_acts_post"
    assert torch.equal(cache[name], of_joined[name])
    with model.steer(made[0], {5: 20.0}, tokens=tokens):
        steered = model(pixels)
    with model.steer(made[1], {5: 20.0}, tokens=tokens):
        assert torch.equal(model(pixels), steered)
    sites = [Site.of(model, sae, tokens=tokens) for sae in made]
    readings = [
        site.read(site.harvester()(pixels)).encode(sae)
        for site, sae in zip(sites, made, strict=True)
    ]
    assert torch.equal(readings[0].dense, readings[1].dense)
    assert torch.equal(readings[0].reconstruction, readings[1].reconstruction)


# ---------------------------------------------------------------------- resets


@torch.no_grad()
@pytest.mark.parametrize("reset", ["reset_hooks", "remove_all_hook_fns"])
def test_a_reset_with_permanent_hooks_detaches_saes(model, pixels, reset: str) -> None:
    plain, names = model(pixels), set(model.hook_dict)
    model.add_sae(make_sae())
    spliced = model(pixels)
    getattr(model, reset)()
    assert torch.equal(model(pixels), spliced), "an SAE is there until it is taken away"
    getattr(model, reset)(including_permanent=True)
    assert model.acts_to_saes == {}
    assert set(model.hook_dict) == names
    assert torch.equal(model(pixels), plain)
    with model.saes([make_sae()]):
        assert torch.equal(model(pixels), spliced)


@torch.no_grad()
def test_a_reset_reaches_hooks_on_an_saes_points(model, pixels) -> None:
    sae, inner = make_sae(), f"{HOOK}.hook_sae_acts_post"
    model.add_sae(sae)
    spliced, fired = model(pixels), []

    def note(activation: Tensor, hook: object) -> Tensor:
        fired.append(hook.name)
        hook.ctx["seen"] = True
        return activation * 0

    model.add_hook(inner, note)
    assert not torch.equal(model(pixels), spliced)
    assert fired == [inner]
    model.reset_hooks()
    assert torch.equal(model(pixels), spliced)
    assert fired == [inner]
    assert model.hook_dict[inner].ctx == {}
    model.add_hook(inner, note, is_permanent=True)
    model.reset_hooks()
    model(pixels)
    assert fired == [inner, inner]
    model.reset_hooks(including_permanent=True)
    assert all(not hook.fwd_hooks for hook in sae.hook_dict.values())


# ---------------------------------------------------------------------- threads


def together(functions: list[Callable[[], Tensor]], n: int = 25) -> list[list[Tensor]]:
    """Results of functions that threads call again and again at the same time."""
    results: list[list[Tensor]] = [[] for _ in functions]
    errors: list[BaseException] = []
    start = threading.Barrier(len(functions))

    def work(place: int) -> None:
        try:
            start.wait(10)
            for _ in range(n):
                results[place].append(functions[place]())
        except BaseException as error:  # the main thread reports it
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def test_threads_on_one_bridge_do_not_mix(model, pixels) -> None:
    other = pixels[:2] * 2
    sae = make_sae()

    def no_grad(function: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(function)

    functions = [
        no_grad(lambda: model(pixels)),
        no_grad(lambda: model(other, stop_at_layer=1)),
        no_grad(lambda: model.run_with_cache(other, stop_at_layer=2)[0]),
        no_grad(lambda: model.run_with_cache(pixels, names_filter=HOOK)[1][HOOK]),
        no_grad(lambda: model.harvest(other, HOOK)[HOOK]),
        no_grad(lambda: model.run_with_saes(pixels, saes=[sae])),
        no_grad(lambda: model.image_features(other)),
    ]
    expected = [function() for function in functions]
    for found, one in zip(together(functions), expected, strict=True):
        assert all(torch.equal(result, one) for result in found)
    assert torch.equal(functions[0](), expected[0])
