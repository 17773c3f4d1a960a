"""Steering against the formula x + d_k (s - f_k) applied by a plain hook."""

from __future__ import annotations

import math

import pytest
import torch
from sae_lens import Transcoder, TranscoderConfig
from torch import Tensor

from tests._clip import RESID, make_sae, model, pixels
from vision_plugin.steering import steer_neurons, steering_effect

__all__ = ["model", "pixels"]
HOOK = RESID


@torch.no_grad()
@pytest.mark.parametrize("tokens", ["all", "cls", "patch"])
def test_clamping_follows_the_formula(model, pixels, tokens) -> None:
    sae = make_sae()
    mask = model.token_layout().mask(tokens)[None, :, None]

    def formula(x: Tensor, hook: object) -> Tensor:
        return x + mask * (7.0 - sae.encode(x)[..., 5:6]) * sae.W_dec[5]

    expected = model.run_with_hooks(pixels, fwd_hooks=[(HOOK, formula)])
    with model.steer(sae, {5: 7.0}, tokens=tokens):
        steered = model(pixels)
    torch.testing.assert_close(steered, expected, rtol=1e-4, atol=1e-5)
    assert (model(pixels) - steered).abs().max() > 1e-3


@torch.no_grad()
def test_nested_steering_adds_up_at_one_hook(model, pixels) -> None:
    sae = make_sae()
    with model.steer(sae, {5: 3.0}), model.steer(sae, {9: 4.0}):
        nested = model(pixels)

    def formula(x: Tensor, hook: object) -> Tensor:
        x = x + (3.0 - sae.encode(x)[..., 5:6]) * sae.W_dec[5]
        return x + (4.0 - sae.encode(x)[..., 9:10]) * sae.W_dec[9]

    expected = model.run_with_hooks(pixels, fwd_hooks=[(HOOK, formula)])
    torch.testing.assert_close(nested, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_sae_that_normalises_its_input_is_steered_in_its_own_units(model, pixels) -> None:
    sae = make_sae(normalize_activations="layer_norm")
    x = model(pixels, stop_at_layer=2)
    std = (x - x.mean(-1, keepdim=True)).std(-1, keepdim=True)
    expected = x + std * (7.0 - sae.encode(x)[..., 5:6]) * sae.W_dec[5]
    with model.steer(sae, {5: 7.0}):
        steered = model(pixels, stop_at_layer=2)
    torch.testing.assert_close(steered, expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_neurons_are_overwritten(model, pixels) -> None:
    with steer_neurons(model, HOOK, {4: 9.0}):
        x = model(pixels, stop_at_layer=2)
    assert (x[..., 4] == 9.0).all()
    assert torch.equal(x[..., 5:], model(pixels, stop_at_layer=2)[..., 5:])


@torch.no_grad()
def test_the_effect_is_in_probabilities(model, pixels) -> None:
    concepts = ["a red circle", "a blue square", "a green star"]
    texts = model.encode_text(concepts)
    effect = steering_effect(model, make_sae(), pixels, texts, {5: 50.0}, concepts=concepts)
    torch.testing.assert_close(effect.after.sum(-1), torch.ones(3))
    gains = effect.gains(3)
    assert gains[0][1] > 0 > gains[-1][1]
    assert math.isclose(sum(gain for _, gain in gains), 0, abs_tol=1e-5)


@pytest.mark.parametrize(
    ("latents", "message"),
    [({48: 1.0}, "latent 48 is out of range"), ({1: math.nan}, "cannot be set to nan")],
)
def test_bad_targets_are_refused(model, latents, message) -> None:
    with pytest.raises(ValueError, match=message), model.steer(make_sae(), latents):
        pass


def test_bad_tokens_are_refused(model) -> None:
    with pytest.raises(ValueError, match=r"tokens='clss' is not a kind"):
        model.steer(make_sae(), {1: 1.0}, tokens="clss").__enter__()


@torch.no_grad()
def test_a_transcoder_is_steered_from_the_hook_that_it_reads(model, pixels) -> None:
    torch.manual_seed(0)
    transcoder = Transcoder(
        TranscoderConfig(d_in=32, d_out=32, d_sae=48, apply_b_dec_to_input=False)
    )
    for weights in (transcoder.W_dec, transcoder.W_enc, transcoder.b_enc):
        torch.nn.init.normal_(weights)
    transcoder.cfg.metadata.hook_name = "blocks.1.hook_resid_pre"
    transcoder.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    read: list[Tensor] = []

    def formula(x: Tensor, hook: object) -> Tensor:
        return x + (7.0 - transcoder.encode(read[-1])[..., 5:6]) * transcoder.W_dec[5]

    hooks = [
        ("blocks.1.hook_resid_pre", lambda x, hook: read.append(x)),
        ("blocks.1.hook_mlp_out", formula),
    ]
    expected = model.run_with_hooks(pixels, fwd_hooks=hooks)
    with model.steer(transcoder, {5: 7.0}):
        torch.testing.assert_close(model(pixels), expected, rtol=1e-4, atol=1e-5)
    effect = steering_effect(
        model, transcoder, pixels, torch.eye(16)[:3], {5: 7.0}, concepts=["a", "b", "c"]
    )
    unit = torch.nn.functional.normalize(expected, dim=-1)
    after = torch.softmax(model.logit_scale * unit @ torch.eye(16)[:3].T, dim=-1)
    torch.testing.assert_close(effect.after, after, rtol=1e-4, atol=1e-5)
