"""SAEs spliced into the bridge, against the same arithmetic done by hand."""

from __future__ import annotations

import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig, Transcoder, TranscoderConfig
from torch import Tensor

from tests._clip import make_sae, model, pixels
from vision_plugin.models import UnknownHookError, VisionBridge

__all__ = ["model", "pixels"]
HOOKS = {
    "hook_embed": 32,
    "blocks.1.hook_resid_post": 32,
    "blocks.1.attn.hook_z": 32,
    "blocks.1.hook_attn_out": 32,
    "blocks.1.mlp.hook_post": 64,
    "ln_final.hook_out": 32,
}


def by_hand(model: VisionBridge, pixels: Tensor, hook_name: str, function) -> Tensor:
    return model.run_with_hooks(pixels, fwd_hooks=[(hook_name, lambda t, hook: function(t))])


@torch.no_grad()
@pytest.mark.parametrize(("hook_name", "d_in"), HOOKS.items())
def test_reconstruction_replaces_the_stream_at_any_hook(model, pixels, hook_name, d_in) -> None:
    sae = make_sae(hook_name, d_in)
    plain = model(pixels)

    def reconstruct(x: Tensor) -> Tensor:
        flat = x.flatten(-2) if x.ndim == 4 else x
        return sae.decode(sae.encode(flat)).reshape(x.shape)

    spliced = model.run_with_saes(pixels, saes=[sae])
    torch.testing.assert_close(spliced, by_hand(model, pixels, hook_name, reconstruct))
    assert (spliced - plain).abs().max() > 1e-4
    corrected = model.run_with_saes(pixels, saes=[sae], use_error_term=True)
    torch.testing.assert_close(corrected, plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(pixels), plain)


@torch.no_grad()
def test_latents_are_cached_and_hooked_under_their_names(model, pixels) -> None:
    sae, base = make_sae(), "blocks.1.hook_resid_post"
    _, cache = model.run_with_cache_with_saes(pixels, saes=[sae], use_error_term=True)
    latents = cache[f"{base}.hook_sae_acts_post"]
    assert latents.shape == (3, 17, 48)
    for name in ("hook_sae_input", "hook_sae_recons", "hook_sae_error", "hook_sae_output"):
        assert f"{base}.{name}" in cache.cache_dict
    zeroed = model.run_with_hooks_with_saes(
        pixels,
        saes=[sae],
        use_error_term=True,
        fwd_hooks=[(f"{base}.hook_sae_acts_post", lambda t, hook: torch.zeros_like(t))],
    )
    expected = by_hand(
        model, pixels, base, lambda x: x - sae.decode(sae.encode(x)) + sae.decode(latents * 0)
    )
    torch.testing.assert_close(zeroed, expected, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_latents(model, pixels) -> None:
    sae, seen = make_sae(), []
    with model.saes([sae], use_error_term=True):
        output = model.run_with_hooks(
            pixels,
            fwd_hooks=[
                ("blocks.1.hook_resid_post.hook_sae_acts_post", lambda t, hook: seen.append(t))
            ],
        )
    (gradient,) = torch.autograd.grad(output.sum(), seen[:1])
    assert gradient.abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("tokens", ["cls", "patch"])
def test_only_the_chosen_tokens_pass_through(model, pixels, tokens) -> None:
    sae = make_sae()
    mask = model.token_layout().mask(tokens)[None, :, None]
    expected = by_hand(
        model,
        pixels,
        "blocks.1.hook_resid_post",
        lambda x: torch.where(mask, sae.decode(sae.encode(x)), x),
    )
    torch.testing.assert_close(model.run_with_saes(pixels, saes=[sae], tokens=tokens), expected)
    sae.cfg.metadata.tokens = tokens
    torch.testing.assert_close(model.run_with_saes(pixels, saes=[sae]), expected)


@torch.no_grad()
def test_a_transcoder_reads_at_one_hook_and_writes_at_another(model, pixels) -> None:
    torch.manual_seed(0)
    transcoder = Transcoder(
        TranscoderConfig(d_in=32, d_out=32, d_sae=40, apply_b_dec_to_input=False)
    )
    transcoder.cfg.metadata.hook_name = "blocks.1.ln2.hook_out"
    transcoder.cfg.metadata.hook_name_out = "blocks.1.hook_mlp_out"
    source = model.harvest(pixels, "blocks.1.ln2.hook_out")["blocks.1.ln2.hook_out"]
    expected = by_hand(model, pixels, "blocks.1.hook_mlp_out", lambda x: transcoder(source))
    torch.testing.assert_close(model.run_with_saes(pixels, saes=[transcoder]), expected)
    plain = model(pixels)
    corrected = model.run_with_saes(pixels, saes=[transcoder], use_error_term=True)
    torch.testing.assert_close(corrected, plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_nothing_is_left_behind_whatever_is_raised_inside(model, pixels) -> None:
    plain, names = model(pixels), set(model.hook_dict)
    sae = make_sae()
    inner_names = {name: hook.name for name, hook in sae.hook_dict.items()}

    class Boom(BaseException):
        pass

    def explode(tensor: Tensor, hook: object) -> None:
        raise Boom

    with pytest.raises(Boom), model.saes([sae]):
        model.run_with_hooks(pixels, fwd_hooks=[("blocks.1.hook_resid_post", explode)])
    with pytest.raises(UnknownHookError), model.saes([sae, make_sae("blocks.9.hook_resid_post")]):
        pass
    with pytest.raises(Boom), model.steer(sae, {3: 5.0}):
        raise Boom
    assert model.acts_to_saes == {}
    assert set(model.hook_dict) == names
    assert torch.equal(model(pixels), plain)
    assert {name: hook.name for name, hook in sae.hook_dict.items()} == inner_names
    assert all(not hook._forward_hooks for hook in sae.hook_dict.values())
    assert all(not hook._forward_hooks for hook in model.hook_dict.values())


@torch.no_grad()
def test_hooks_by_every_name_still_fire_after_saes_have_gone(model, pixels) -> None:
    with model.saes([make_sae()]):
        model(pixels)
    fired = []
    for name in ("blocks.1.hook_resid_post", "blocks.1.hook_out", "blocks.2.hook_resid_pre"):
        model.run_with_hooks(pixels, fwd_hooks=[(name, lambda t, hook, n=name: fired.append(n))])
    assert len(fired) == 3


@torch.no_grad()
def test_an_attached_sae_comes_back_after_another_took_its_place(model, pixels) -> None:
    first, second = make_sae(), make_sae()
    second.W_dec.data.mul_(0.5)
    model.add_sae(first)
    try:
        with_first = model(pixels)
        with model.saes([second]):
            assert model.acts_to_saes == {"blocks.1.hook_resid_post": second}
            assert not torch.equal(model(pixels), with_first)
        assert model.acts_to_saes == {"blocks.1.hook_resid_post": first}
        assert torch.equal(model(pixels), with_first)
    finally:
        model.reset_saes()
    with pytest.raises(ValueError, match=r"no SAE is attached at 'blocks.1.hook_resid_post'"):
        model.reset_saes("blocks.1.hook_resid_post")


def test_an_sae_of_another_width_or_model_is_refused(model) -> None:
    with pytest.raises(ValueError, match=r"works on 20 dimensions, but .* has 32"):
        model.add_sae(make_sae(d_in=20))
    stranger = make_sae()
    stranger.cfg.metadata.model_signature = [1.0] * 8
    stranger.cfg.metadata.model_name = "some/other-clip"
    with pytest.raises(ValueError, match=r"trained on some/other-clip"):
        model.add_sae(stranger)
    model.add_sae(stranger, check_model=False)
    model.reset_saes()
    homeless = make_sae()
    homeless.cfg.metadata.hook_name = None
    with pytest.raises(ValueError, match=r"does not say which hook it belongs to"):
        model.add_sae(homeless)


@torch.no_grad()
def test_an_sae_that_takes_heads_apart_is_spliced_like_one_over_all_of_them(model, pixels) -> None:
    """SAELens trains SAEs of hook_z on ``[..., n_heads, d_head]``, and flattens by itself."""
    name = "blocks.1.attn.hook_z"
    joined = make_sae(name)
    torch.manual_seed(0)
    apart = StandardSAE(StandardSAEConfig(d_in=32, d_sae=48, reshape_activations="hook_z"))
    apart.cfg.metadata.hook_name = name
    expected = model.run_with_saes(pixels, saes=[joined])
    assert torch.equal(model.run_with_saes(pixels, saes=[apart]), expected)
    assert apart.hook_z_reshaping_mode
