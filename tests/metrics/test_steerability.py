"""Steerability against a brute-force run of the native model, whatever the hook and the SAE."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPModel

import vision_plugin as vp
from tests.metrics._steerability_reference import (
    slow_delta,
    standard_sae,
    tiny_clip,
    topk_sae,
)
from vision_plugin.metrics import (
    Screening,
    Steerability,
    neuron_dictionary,
    random_dictionary,
    steerability,
    steerability_curve,
)
from vision_plugin.steering import Steering

EMOJI_CLIP = Path(__file__).parents[3] / "shared" / "models" / "emoji-clip"

HOOKS = {
    "embed.hook_out": 16,
    "hook_embed": 16,
    "blocks.0.hook_resid_pre": 16,
    "blocks.0.hook_resid_post": 16,
    "blocks.1.hook_resid_pre": 16,
    "blocks.1.hook_resid_mid": 16,
    "blocks.1.hook_attn_out": 16,
    "blocks.1.hook_mlp_out": 16,
    "blocks.1.attn.hook_q": 16,
    "blocks.1.attn.hook_z": 16,
    "blocks.1.mlp.hook_pre": 24,
    "blocks.1.mlp.hook_post": 24,
    "blocks.2.hook_resid_post": 16,
    "ln_final.hook_out": 16,
}


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world() -> SimpleNamespace:
    generator = torch.Generator().manual_seed(1)
    native = tiny_clip()
    return SimpleNamespace(
        native=native,
        model=vp.wrap(tiny_clip()),
        pixels=torch.randn(5, 3, 8, 8, generator=generator),
        texts=torch.randn(7, 12, generator=generator),
    )


def check(result: Any, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert float(expected.abs().max()) > 0.01, "the reference itself must move something"
    torch.testing.assert_close(result.delta.double(), expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(result.score, expected.square().sum(1), rtol=0, atol=2 * tolerance)


@pytest.mark.parametrize("hook_name", HOOKS)
def test_every_hook_kind_equals_a_full_native_forward_per_latent(
    world: SimpleNamespace, hook_name: str
) -> None:
    sae = standard_sae(hook_name, HOOKS[hook_name])
    result = steerability(world.model, sae, world.pixels, world.texts, strength=8.0, batch_size=7)
    check(
        result,
        slow_delta(
            world.native, sae, world.pixels, world.texts, strength=8.0, latents=list(range(6))
        ),
    )


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize(("tokens", "rows"), [("cls", slice(0, 1)), ("patch", slice(1, None))])
def test_token_kinds_steer_those_tokens_only(
    world: SimpleNamespace, layer: int, tokens: str, rows: slice
) -> None:
    sae = standard_sae(f"blocks.{layer}.hook_resid_post", 16)
    result = steerability(world.model, sae, world.pixels, world.texts, strength=8.0, tokens=tokens)
    expected = slow_delta(
        world.native,
        sae,
        world.pixels,
        world.texts,
        strength=8.0,
        latents=list(range(6)),
        rows=rows,
    )
    if (layer, tokens) == (2, "patch"):
        assert torch.equal(result.delta, torch.zeros(6, 7))
        assert result.top_concept.tolist() == [-1] * 6
        assert result.ratio.isnan().all()
        assert result.summary()["n_unmoved"] == 6
    else:
        check(result, expected)


@pytest.mark.parametrize("layer", [1, 2])
@pytest.mark.parametrize(
    "make",
    [
        lambda hook: standard_sae(hook, 16, normalize_activations="layer_norm"),
        lambda hook: standard_sae(hook, 16, normalize_activations="constant_norm_rescale"),
        lambda hook: topk_sae(hook, 16),
        lambda hook: topk_sae(hook, 16, rescale_acts_by_decoder_norm=True),
        lambda hook: topk_sae(hook, 16, normalize_activations="layer_norm"),
        lambda hook: neuron_dictionary(16).at(hook),
        lambda hook: random_dictionary(16, 9, k=3, seed=0).at(hook),
    ],
)
def test_rescaling_decoders_and_controls_equal_a_native_forward(
    world: SimpleNamespace, make: Any, layer: int
) -> None:
    sae = make(f"blocks.{layer}.hook_resid_post")
    latents = [4, 0, 3]
    result = steerability(
        world.model, sae, world.pixels, world.texts, strength=6.0, latents=latents
    )
    check(
        result,
        slow_delta(world.native, sae, world.pixels, world.texts, strength=6.0, latents=latents),
    )
    assert result.latents.tolist() == latents


@pytest.mark.parametrize(
    ("hook", "heads_apart"),
    [
        ("blocks.1.hook_resid_post", False),
        ("blocks.2.hook_resid_post", False),
        ("blocks.1.attn.hook_z", False),
        ("blocks.1.attn.hook_z", True),
    ],
)
def test_wide_saes_are_read_without_dense_latents(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, hook: str, heads_apart: bool
) -> None:
    how = {"reshape_activations": "hook_z"} if heads_apart else {}
    sae = topk_sae(hook, 16, d_sae=400, **how)
    flat = topk_sae(hook, 16, d_sae=400)
    latents = [0, 17, 399, 250]
    expected = slow_delta(
        world.native, flat, world.pixels, world.texts, strength=6.0, latents=latents
    )
    steering = Steering(world.model, sae, world.texts)
    (prepared,) = steering.prepare(world.pixels)
    steering.editor_is_affine(prepared)  # the decoder is looked at, on a few tokens
    encoded = []
    monkeypatch.setattr(
        sae, "encode", lambda x: encoded.append(x) or type(sae).encode(sae, x), raising=False
    )
    shift = steering.shift(prepared, torch.tensor(latents), 6.0)
    assert not encoded
    torch.testing.assert_close(
        shift.total.double() / len(world.pixels), expected, rtol=0, atol=1e-5
    )
    assert sae.hook_z_reshaping_mode == heads_apart


class BentSAE(torch.nn.Module):
    """An SAE whose decoder is not affine."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.cfg, self.hook_dict = inner, inner.cfg, {}
        self.W_dec = inner.W_dec

    def encode(self, x: Tensor) -> Tensor:
        return self.inner.encode(x)

    def decode(self, latents: Tensor) -> Tensor:
        return 3 * torch.tanh(self.inner.decode(latents) / 3)


@pytest.mark.parametrize("layer", [1, 2])
def test_a_decoder_that_is_not_affine_is_steered_by_decoding(
    world: SimpleNamespace, layer: int
) -> None:
    sae = BentSAE(standard_sae(f"blocks.{layer}.hook_resid_post", 16))
    result = steerability(world.model, sae, world.pixels, world.texts, strength=4.0)
    check(
        result,
        slow_delta(
            world.native, sae, world.pixels, world.texts, strength=4.0, latents=list(range(6))
        ),
    )


def test_a_transcoder_reads_one_hook_and_steers_another(world: SimpleNamespace) -> None:
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.transcoder import Transcoder, TranscoderConfig

    transcoder = Transcoder(
        TranscoderConfig(d_in=16, d_out=16, d_sae=5, apply_b_dec_to_input=False)
    )
    with torch.no_grad():
        for parameter in transcoder.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
            )
    transcoder.cfg.metadata = SAEMetadata(
        hook_name="blocks.1.hook_resid_mid", hook_name_out="blocks.1.hook_mlp_out"
    )
    result = steerability(world.model, transcoder, world.pixels, world.texts, strength=7.0)
    inputs: list[Tensor] = []
    layer = world.native.vision_model.encoder.layers[1]

    class OutputSide:
        def encode(self, x: Tensor) -> Tensor:
            return transcoder.encode(inputs[-1])

        def decode(self, latents: Tensor) -> Tensor:
            return transcoder.decode(latents)

    handle = layer.layer_norm2.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    expected = slow_delta(
        world.native,
        OutputSide(),
        world.pixels,
        world.texts,
        strength=7.0,
        latents=list(range(5)),
        hook_name="blocks.1.hook_mlp_out",
    )
    handle.remove()
    check(result, expected)


@pytest.mark.parametrize("strength", [-20.0, 0.0, 5.0, 150.0])
@pytest.mark.parametrize("tokens", ["cls", "all", "patch"])
@pytest.mark.parametrize(
    ("hook", "width"), [("hook_resid_post", 16), ("hook_mlp_out", 16), ("mlp.hook_post", 24)]
)
def test_the_closed_form_from_the_last_mlp_on_equals_running_the_rest(
    world: SimpleNamespace, hook: str, width: int, tokens: str, strength: float
) -> None:
    sae = standard_sae(f"blocks.2.{hook}", width, d_sae=40)
    settings = {"strength": strength, "tokens": tokens}
    fast = Steerability(world.model, sae, world.texts, **settings)
    fast.update(world.pixels)
    assert fast.steering.uses_closed_form
    slow = Steerability(world.model, sae, world.texts, closed_form=False, **settings)
    slow.update(world.pixels)
    assert not slow.steering.uses_closed_form
    torch.testing.assert_close(fast.compute().delta, slow.compute().delta, rtol=0, atol=2e-6)


def test_a_head_that_computes_something_else_is_run_instead(world: SimpleNamespace) -> None:
    model = vp.wrap(tiny_clip())
    model.ln_final.original_component.register_forward_hook(
        lambda module, args, output: output * 1.5 + 0.2
    )
    sae = standard_sae("blocks.2.hook_resid_post", 16)
    metric = Steerability(model, sae, world.texts, strength=8.0)
    metric.update(world.pixels)
    assert not metric.steering.uses_closed_form


def test_hooks_of_the_user_stay_part_of_the_model(world: SimpleNamespace) -> None:
    """With someone's hook below and above, the whole model runs, and the hook acts once."""
    native, sae = tiny_clip(), standard_sae("blocks.1.hook_resid_post", 16)
    native.vision_model.encoder.layers[2].mlp.register_forward_hook(lambda m, a, out: out * 0.5)
    native.vision_model.encoder.layers[0].mlp.register_forward_hook(lambda m, a, out: out * 2.0)
    with world.model.hooks(
        [
            ("blocks.2.hook_mlp_out", lambda x, hook: x * 0.5),
            ("blocks.0.hook_mlp_out", lambda x, hook: x * 2.0),
        ]
    ):
        result = steerability(world.model, sae, world.pixels, world.texts, strength=8.0)
    check(
        result,
        slow_delta(native, sae, world.pixels, world.texts, strength=8.0, latents=list(range(6))),
    )


def test_nothing_stays_on_the_model(world: SimpleNamespace) -> None:
    before = world.model.encode_image(world.pixels)
    steerability(world.model, standard_sae("blocks.1.hook_mlp_out", 16), world.pixels, world.texts)
    assert not any(hook.fwd_hooks for hook in world.model.hook_dict.values())
    assert torch.equal(world.model.encode_image(world.pixels), before)


def test_the_blocks_below_the_hook_run_once_per_image(world: SimpleNamespace) -> None:
    runs = {0: 0, 1: 0, 2: 0}
    model = vp.wrap(tiny_clip())
    for number, block in enumerate(model.blocks):

        def count(module: Any, args: Any, number: int = number) -> None:
            runs[number] += args[0].shape[0]

        block.original_component.layer_norm1.register_forward_pre_hook(count)
    sae = standard_sae("blocks.1.hook_resid_post", 16)
    steerability_curve(model, sae, world.pixels, world.texts, strengths=[5.0, 9.0], batch_size=10)
    n_images, n_steered = 5, 5 * 6 * 2
    assert runs == {0: n_images, 1: n_images, 2: n_images + n_steered}


@pytest.mark.parametrize("layer", [2, 5])
def test_brute_force_on_a_real_checkpoint(layer: int) -> None:
    if not EMOJI_CLIP.exists():
        pytest.skip(f"{EMOJI_CLIP} is not there: the optional data beside the checkout")
    native = CLIPModel.from_pretrained(EMOJI_CLIP).eval()
    model = vp.load_model(str(EMOJI_CLIP))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(4, 3, 64, 64, generator=generator)
    names = ["cat", "dog", "heart", "star", "apple", "car", "house", "tree", "sun", "moon"]
    texts = model.encode_text([f"a picture of a {name}" for name in names])
    sae = standard_sae(f"blocks.{layer}.hook_resid_post", 192, d_sae=64)
    latents = [0, 5, 17, 63]
    for strength in (20.0, 150.0):
        result = steerability(
            model, sae, pixels, texts, strength=strength, latents=latents, concepts=names
        )
        check(result, slow_delta(native, sae, pixels, texts, strength=strength, latents=latents))


def test_screening_is_used_by_the_closed_form_too(world: SimpleNamespace) -> None:
    pixels = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    sae = standard_sae("blocks.2.hook_resid_post", 16, d_sae=30)
    arguments: dict[str, Any] = {"strength": 3.0, "threshold": 0.05}
    full = steerability(world.model, sae, pixels, world.texts, **arguments)
    for closed_form in (True, False):
        screened = steerability(
            world.model,
            sae,
            pixels,
            world.texts,
            adaptive=Screening(first=6),
            closed_form=closed_form,
            **arguments,
        )
        finished = screened.n_seen == 40
        assert 0 < int(finished.sum()) < 30
        assert torch.equal(screened.steerable, full.steerable)
        assert not screened.steerable[~finished].any()
        assert float((screened.score - full.score)[~finished].abs().max()) < 0.05
        torch.testing.assert_close(
            screened.score[finished], full.score[finished], rtol=0, atol=1e-6
        )


def test_screening_image_by_image_keeps_its_margin(world: SimpleNamespace) -> None:
    pixels = torch.randn(14, 3, 8, 8, generator=torch.Generator().manual_seed(4))
    sae = standard_sae("blocks.1.hook_resid_post", 16, d_sae=12)
    scores = steerability(world.model, sae, pixels, world.texts, strength=3.0).score.sort().values
    arguments = {"strength": 3.0, "threshold": float(scores[5] + scores[6]) / 2}
    full = steerability(world.model, sae, pixels, world.texts, **arguments)
    screened = steerability(
        world.model, sae, pixels, world.texts, adaptive=True, batch_size=1, **arguments
    )
    assert int(full.steerable.sum()) == 6
    assert torch.equal(screened.steerable, full.steerable)


def test_steering_refuses_random_tokens(world: SimpleNamespace) -> None:
    sae = standard_sae("blocks.1.hook_resid_post", 16)
    with pytest.raises(ValueError, match="would steer other tokens on every pass"):
        Steering(world.model, sae, world.texts, tokens="random:2")
