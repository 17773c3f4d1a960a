"""The sparse way through a SAELens SAE gives what its own encode and forward give."""

from __future__ import annotations

import pytest
import torch
from sae_lens import (
    SAE,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    MatchingPursuitSAE,
    MatchingPursuitSAEConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)

from vision_plugin import kernels
from vision_plugin.models import _sparse_inference, sparse_forward, sparse_latents
from vision_plugin.models._sparse_inference import decode_of_encode

SIZES = {"d_in": 12, "d_sae": 80}
SAES = {
    "topk": (TopKSAE, TopKSAEConfig, {"k": 7}),
    "topk rescaled": (TopKSAE, TopKSAEConfig, {"k": 7, "rescale_acts_by_decoder_norm": True}),
    "topk, plain input": (TopKSAE, TopKSAEConfig, {"k": 7, "apply_b_dec_to_input": False}),
    "topk, layer norm": (TopKSAE, TopKSAEConfig, {"k": 7, "normalize_activations": "layer_norm"}),
    "jumprelu": (JumpReLUSAE, JumpReLUSAEConfig, {}),
    "standard": (StandardSAE, StandardSAEConfig, {}),
    "topk in training": (TopKTrainingSAE, TopKTrainingSAEConfig, {"k": 7}),
    "batchtopk in training": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, {"k": 7.5}),
    "gated": (GatedSAE, GatedSAEConfig, {}),
    "matching pursuit": (
        MatchingPursuitSAE,
        MatchingPursuitSAEConfig,
        {"max_iterations": 5, "residual_threshold": 0.01},
    ),
}
ON_THE_KERNEL = [name for name in SAES if name not in ("gated", "matching pursuit")]


def _make(name: str) -> SAE:
    sae_class, config, settings = SAES[name]
    torch.manual_seed(0)
    sae = sae_class(config(**SIZES, **settings))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if name == "jumprelu":
            sae.threshold.uniform_(0, 0.5)
    return sae


@pytest.mark.parametrize("name", SAES)
@pytest.mark.parametrize("leading", [(30,), (5, 6), (0,)])
def test_latents_and_reconstruction_are_the_saes_own(name, leading):
    sae = _make(name)
    x = torch.randn(*leading, 12)
    with torch.no_grad():
        latents = sparse_latents(sae, x)
        expected = sae.encode(x)
        torch.testing.assert_close(latents.to_dense().view(expected.shape), expected)
        again, reconstruction = sparse_forward(sae, x)
        torch.testing.assert_close(reconstruction, sae(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again.to_dense(), latents.to_dense())
    assert (latents.values != 0).all(), "zeros were kept"
    assert latents.indices.dtype == latents.offsets.dtype == torch.int32


@pytest.mark.parametrize("name", ON_THE_KERNEL)
def test_no_dense_latents_are_built_where_the_kernel_serves(name, monkeypatch):
    sae = _make(name)

    def refuse(*_arguments, **_keywords):
        raise AssertionError("the SAE's own dense code ran")

    for method in ("encode", "decode"):
        monkeypatch.setattr(sae, method, refuse)
    x = torch.randn(9, 12)
    sparse_latents(sae, x)
    sparse_forward(sae, x)
    assert decode_of_encode(sae, x) is not None


@pytest.mark.parametrize("name", ["topk rescaled", "jumprelu", "standard"])
def test_gradients_reach_the_input_and_the_parameters(name):
    sae = _make(name)
    x = torch.randn(20, 12, requires_grad=True)
    wanted = [x, sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]
    found = torch.autograd.grad(sparse_forward(sae, x)[1].pow(2).sum(), wanted)
    expected = torch.autograd.grad(sae(x).pow(2).sum(), wanted)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("hook", ["hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"])
def test_a_hook_on_the_sae_still_acts(hook):
    sae = _make("topk")
    getattr(sae, hook).add_hook(lambda tensor, hook: tensor * 0.5)
    x = torch.randn(9, 12)
    with torch.no_grad():
        torch.testing.assert_close(sparse_forward(sae, x)[1], sae(x))
        torch.testing.assert_close(sparse_latents(sae, x).to_dense(), sae.encode(x))


def test_other_architectures_are_encoded_a_few_rows_at_a_time(monkeypatch):
    sae = _make("gated")
    x = torch.randn(50, 12)
    whole = sparse_latents(sae, x)
    monkeypatch.setattr(_sparse_inference, "_DENSE_ELEMENTS", 7 * 80)
    rows = []
    encode = sae.encode
    monkeypatch.setattr(sae, "encode", lambda part: rows.append(len(part)) or encode(part))
    parts, reconstruction = sparse_forward(sae, x)
    assert max(rows) == 7
    torch.testing.assert_close(parts.to_dense(), whole.to_dense())
    torch.testing.assert_close(reconstruction, sae.decode(encode(x)))


def test_heads_are_flattened_and_restored_as_hook_z_saes_do():
    sae = _make("topk")
    sae.turn_on_forward_pass_hook_z_reshaping()
    x = torch.randn(4, 5, 3, 4)
    with torch.no_grad():
        expected = sae(x)
        assert sparse_latents(sae, x).batch == 20
        torch.testing.assert_close(sparse_forward(sae, x)[1], expected)


def test_the_decoder_can_be_given_the_latents():
    sae = _make("standard")
    x = torch.randn(6, 12)
    with torch.no_grad():
        decoded = kernels.csr_decode(sparse_latents(sae, x), sae.W_dec, sae.b_dec)
        torch.testing.assert_close(decoded, sae(x))
