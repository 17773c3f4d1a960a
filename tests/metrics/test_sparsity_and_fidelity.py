"""L0 and firing counts, explained variance and its relatives."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from vision_plugin import metrics

KINDS = ("cls", "register", "patch", "patch", "patch", "patch")


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    layout=st.sampled_from(["tokens", "dense", "csr", "coo"]),
    density=st.sampled_from([0.02, 0.5]),
)
def test_l0_is_counted_by_kind_and_position(seed, layout, density):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.rand(7, 6, 20, generator=generator)
    latents = latents * (torch.rand(7, 6, 20, generator=generator) < density)
    metric = metrics.Sparsity(n_features=20, token_kinds=KINDS)
    for part in torch.split(latents, 3):
        rows = part.flatten(0, 1)
        metric.update(
            {
                "tokens": part,
                "dense": rows,
                "csr": rows.to_sparse_csr(),
                "coo": rows.to_sparse_coo(),
            }[layout]
        )
    result = metric.compute()
    fires = (latents != 0).double()
    assert result.l0 == pytest.approx(float(fires.sum(2).mean()))
    torch.testing.assert_close(result.l0_by_position, fires.sum(2).mean(0))
    assert result.l0_by_kind["cls"] == pytest.approx(float(fires[:, 0].sum(1).mean()))
    assert result.l0_by_kind["patch"] == pytest.approx(float(fires[:, 2:].sum(2).mean()))
    assert torch.equal(result.n_active, fires.sum((0, 1)).long())
    assert result.n_dead == int((fires.sum((0, 1)) == 0).sum())
    assert result.n_tokens == 42
    assert sum(result.histogram) == 20 - result.n_dead
    torch.testing.assert_close(
        metrics.l0_map(result, KINDS, (2, 2)), fires[:, 2:].sum(2).mean(0).view(2, 2)
    )
    assert result.summary()["l0_patch"] == result.l0_by_kind["patch"]


def test_frequencies_fall_into_half_decades():
    latents = torch.zeros(1000, 5)
    latents[:, 0] = 1  # Always: the last bin.
    latents[:200, 1] = 1  # 0.2: between -1 and -0.5.
    latents[:1, 2] = 1  # 0.001: from -3 to -2.5.
    latents[:20, 3] = 1  # 0.02: between -2 and -1.5.
    metric = metrics.Sparsity(n_features=5)
    metric.update(latents)
    result = metric.compute()
    edges = result.histogram_edges
    bins = {edges[i]: n for i, n in enumerate(result.histogram) if n}
    assert bins == {-0.5: 1, -1.0: 1, -3.0: 1, -2.0: 1}
    assert (result.n_dead, result.n_rare, result.n_dense) == (1, 1, 2)


def test_sparsity_wants_whole_images_and_some_data():
    metric = metrics.Sparsity(n_features=4, token_kinds=KINDS)
    with pytest.raises(ValueError, match="5 tokens per image"):
        metric.update(torch.rand(2, 5, 4))
    with pytest.raises(ValueError, match="not whole images of 6"):
        metric.update(torch.rand(7, 4))
    with pytest.raises(ValueError, match="Sparsity has seen no data"):
        metrics.Sparsity(n_features=4).compute()
    metric.update(torch.rand(2, 6, 4))
    with pytest.raises(ValueError, match="do not fill a grid of 3 by 3"):
        metrics.l0_map(metric.compute(), KINDS, (3, 3))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    mean=st.sampled_from([0.0, 5.0, 1000.0]),
    batch=st.integers(1, 60),
    definition=st.sampled_from(["visaebench", "per_dimension"]),
)
def test_fidelity_is_that_of_the_whole_data(seed, mean, batch, definition):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(60, 5)) * [1, 2, 3, 4, 5] + mean
    xhat = x + rng.normal(size=(60, 5)) * 0.3
    metric = metrics.FVU(d_in=5, definition=definition)
    for start in range(0, 60, batch):
        part = slice(start, start + batch)
        metric.update(torch.from_numpy(x[part]), torch.from_numpy(xhat[part]))
    result = metric.compute()
    residual = ((x - xhat) ** 2).sum()
    unexplained = residual / ((x - x.mean(0)) ** 2).sum()
    assert result.explained_variance == pytest.approx(1 - unexplained, rel=1e-9)
    cosines = (x * xhat).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(xhat, axis=1)
    assert result.cosine == pytest.approx(cosines.mean())
    assert result.mse == pytest.approx(residual / 300)
    if definition == "per_dimension":
        assert result.fvu == pytest.approx(unexplained, rel=1e-9)


def test_what_fidelity_cannot_say_is_nan_and_counted():
    metric = metrics.FVU(d_in=3)
    metric.update(torch.ones(4, 3) * 0.1, torch.zeros(4, 3))
    result = metric.compute()
    assert math.isnan(result.explained_variance)
    assert math.isnan(result.cosine)
    assert (result.n_tokens, result.n_without_cosine) == (4, 4)
    assert result.to_dict()["cosine"] is None
    perfect = metrics.FVU(d_in=3)
    x = torch.randn(2, 9, 3)
    perfect.update(x, x)
    assert perfect.compute().fvu == 0
    assert perfect.compute().explained_variance == 1


def test_fidelity_refuses_what_does_not_fit():
    metric = metrics.FVU(d_in=3)
    with pytest.raises(ValueError, match="must have one shape, of width d_in=3"):
        metric.update(torch.ones(4, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match="must have one shape"):
        metric.update(torch.ones(4, 3), torch.ones(5, 3))
    with pytest.raises(ValueError, match="reconstruction holds 1 NaN"):
        metric.update(torch.ones(1, 3), torch.tensor([[1.0, math.nan, 1.0]]))
    with pytest.raises(ValueError, match="none was seen"):
        metric.compute()


def test_loss_recovered_is_the_share_of_the_window():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 4
    clean = 8 * torch.eye(4)[labels] + torch.randn(40, 4, generator=generator)
    spliced, ablated = clean / 2, torch.zeros(40, 4)
    metric = metrics.LossRecovered()
    for part in torch.split(torch.arange(40), 15):
        metric.update(clean[part], spliced[part], ablated[part], labels[part])
    result = metric.compute()

    def loss(logits):
        shifted = logits.double().numpy()
        chosen = shifted[np.arange(40), labels.numpy()]
        return float((np.log(np.exp(shifted).sum(1)) - chosen).mean())

    expected = (loss(ablated) - loss(spliced)) / (loss(ablated) - loss(clean))
    assert result.recovered == pytest.approx(expected)
    assert 0 < result.recovered < 1
    assert result.ablated == pytest.approx(math.log(4))
    assert result.window == pytest.approx(loss(ablated) - loss(clean))
    assert result.accuracy_clean == result.accuracy_spliced == 1


def test_loss_recovered_is_undefined_where_ablating_costs_nothing():
    metric = metrics.LossRecovered()
    logits, labels = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    metric.update(logits, logits, logits, labels)
    assert math.isnan(metric.compute().recovered)
    with pytest.raises(ValueError, match="must have one shape"):
        metric.update(logits, logits, logits[:2], labels)
