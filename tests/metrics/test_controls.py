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
    torch.testing.assert_close(control.directions.norm(dim=1), torch.ones(64))
    assert torch.equal(control.directions, random_dictionary(16, 64, k=5, seed=3).directions)
    assert not torch.equal(control.directions, random_dictionary(16, 64, k=5, seed=4).directions)
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
        np.abs((control.directions.numpy() * expected).sum(1)), np.ones(6), atol=1e-5
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
