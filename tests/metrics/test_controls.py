"""Control dictionaries: neurons, random directions, principal components."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vision_plugin.metrics import (
    monosemanticity,
    neuron_dictionary,
    pca_dictionary,
    random_dictionary,
    with_controls,
)


def test_neurons_are_the_activations_themselves():
    x = torch.randn(5, 7)
    neurons = neuron_dictionary(7)
    assert torch.equal(neurons.encode(x), x)
    assert torch.equal(neurons.decode(x), x)


def test_random_directions_are_unit_repeatable_and_sparse():
    control = random_dictionary(16, 64, k=5, seed=3)
    torch.testing.assert_close(control.W_dec.norm(dim=1), torch.ones(64))
    assert torch.equal(control.W_dec, random_dictionary(16, 64, k=5, seed=3).W_dec)
    assert not torch.equal(control.W_dec, random_dictionary(16, 64, k=5, seed=4).W_dec)
    latents = control.encode(torch.randn(20, 16))
    assert int((latents != 0).sum(1).max()) <= 5
    assert bool((latents >= 0).all())
    with pytest.raises(ValueError, match="k=65"):
        random_dictionary(16, 64, k=65, seed=0)


def test_principal_components_are_numpys():
    x = torch.randn(50, 6) @ torch.diag(torch.tensor([9.0, 5, 3, 2, 1, 0.5])) + 4
    control = pca_dictionary(x)
    centred = (x - x.mean(0)).double().numpy()
    expected = np.linalg.svd(centred)[2]
    np.testing.assert_allclose(
        np.abs((control.W_dec.numpy() * expected).sum(1)), np.ones(6), atol=1e-5
    )
    torch.testing.assert_close(control.decode(control.encode(x)), x, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="at least 2"):
        pca_dictionary(x[:1])


def test_true_factors_stand_above_their_controls():
    generator = torch.Generator().manual_seed(0)
    factors = torch.eye(8)[torch.randint(8, (400,), generator=generator)]
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    rows = with_controls(
        lambda latents: monosemanticity(latents, factors), factors, factors @ rotation, k=2
    )
    scores = {name: result.summary()["mean_score"] for name, result in rows.items()}
    assert scores["latents"] == pytest.approx(1.0)
    assert max(score for name, score in scores.items() if name != "latents") < 0.9
    assert list(scores) == ["latents", "neurons", "pca", "random (seed 0)"]


def test_a_control_at_a_hook_carries_what_an_sae_carries():
    control = random_dictionary(6, 10, k=2, seed=0)
    with pytest.raises(ValueError, match="has no hook"):
        _ = control.cfg.metadata
    placed = control.at("blocks.3.hook_resid_post", tokens="cls")
    assert (placed.cfg.d_in, placed.cfg.d_sae) == (6, 10)
    assert placed.cfg.metadata["hook_name"] == "blocks.3.hook_resid_post"
    assert placed.cfg.metadata["tokens"] == "cls"
    x = torch.randn(3, 6)
    assert torch.equal(placed.encode(x), control.encode(x))
