"""Probing metrics: what VISAEBench's own numbers do not show."""

from __future__ import annotations

import pytest
import torch

from vision_plugin import metrics

sklearn = pytest.importorskip("sklearn", reason="needs the extra: pip install scikit-learn")


def planted(mixing: float, n: int = 240) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of which each of 4 classes has one, leaking into the next class's by ``mixing``."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 4
    factors = torch.eye(4)[labels]
    mixed = (1 - mixing) * factors + mixing * factors.roll(1, dims=1)
    noise = torch.rand(n, 20, generator=generator) * (torch.rand(n, 20, generator=generator) < 0.2)
    return torch.cat([mixed + 0.3 * torch.rand(n, 4, generator=generator), noise], 1), labels


def test_probes_merge_and_rank_on_train_images_alone():
    latents, labels = planted(0.3)
    parts = [metrics.SparseProbing(n_features=24, rank_on="train") for _ in range(2)]
    parts[0].update(latents[:100].to_sparse_csr(), labels[:100])
    parts[1].update(latents[100:], labels[100:])
    parts[0].merge_state(parts[1])
    whole = metrics.SparseProbing(n_features=24, rank_on="train")
    whole.update(latents, labels)
    assert parts[0].compute() == whole.compute()
    assert set(whole.compute().accuracy) == {1, 5, 10, 20}


def test_preservation_counts_what_a_reconstruction_loses():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 5
    x = torch.eye(5)[labels] + 0.2 * torch.randn(200, 5, generator=generator)
    perfect, none = (metrics.DownstreamPreservation(d_in=5) for _ in range(2))
    perfect.update(x, x, labels)
    none.update(x, torch.zeros_like(x), labels)
    assert perfect.compute().preservation == 1
    assert none.compute().preservation < 0.5


def test_absorbed_classes_are_told_from_represented_ones():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 4
    own = torch.eye(4)[labels] * (1 + torch.rand(240, 1, generator=generator))
    shared = torch.rand(240, 4, generator=generator)
    groups = metrics.sibling_groups([("animal", "dog", name) for name in "abcd"])
    assert groups == {"animal/dog": [0, 1, 2, 3]}
    found = {}
    for name, latents in (("own", own), ("shared", shared)):
        metric = metrics.Absorption(n_features=4, sibling_groups=groups, top_k=2, only_active=True)
        metric.update(latents, labels)
        found[name] = metric.compute()
    assert found["own"].rate < found["shared"].rate
    assert found["own"].mean_overlap < found["shared"].mean_overlap
    assert found["shared"].n_pairs == 4


def test_cross_domain_with_nothing_lost_is_perfect_but_for_the_probe():
    latents, labels = planted(0.0)
    x = torch.randn(240, 6)
    metric = metrics.CrossDomain(n_features=24, domains=["same"], k_probe=4)
    metric.update(latents, domain="home")
    metric.update(latents, domain="same", labels=labels, activations=x, reconstruction=x)
    scores = metric.compute().domains["same"]
    assert (scores.coverage, scores.overlap, scores.reconstruction_quality) == (1, 1, 1)
    assert scores.probe_accuracy == 1
    assert metric.compute().summary()["composite_same"] == pytest.approx(scores.composite)


def test_what_the_probes_lack_is_named():
    metric = metrics.SparseProbing(n_features=24)
    latents, labels = planted(0.0)
    with pytest.raises(ValueError, match="labels have shape"):
        metric.update(latents, labels[:5])
    with pytest.raises(ValueError, match="integers from 0 up"):
        metric.update(latents, labels - 1)
    metric.update(latents, torch.zeros_like(labels))
    with pytest.raises(ValueError, match="at least two classes"):
        metric.compute()
    domains = metrics.CrossDomain(n_features=24, domains=["far"])
    with pytest.raises(ValueError, match="'farther' is not one of"):
        domains.update(latents, domain="farther", labels=labels)
    with pytest.raises(ValueError, match="needs labels, activations"):
        domains.update(latents, domain="far")
    with pytest.raises(ValueError, match="'far' has no images"):
        domains.compute()
    with pytest.raises(ValueError, match="none of the 1 sibling groups"):
        metrics.Absorption(n_features=4, sibling_groups={"two": [0, 1]})


def test_pooling_is_by_name():
    latents = torch.rand(3, 5, 4)
    assert torch.equal(metrics.pool_latents(latents, "cls"), latents[:, 0])
    assert torch.equal(metrics.pool_latents(latents, "max"), latents.amax(1))
    assert torch.equal(metrics.pool_latents(latents, "mean"), latents.mean(1))
