"""Checks of names: AUROC, its interval, and names of other latents."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch.nn import functional as F

from vision_plugin.lens import auroc_interval
from vision_plugin.lens._firing import Firing
from vision_plugin.lens._name_checks import Checker, shuffled


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(10, 60), ties=st.booleans())
def test_the_check_is_scikit_learns_auroc(seed: int, n: int, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(n, 4, generator=generator), dim=1)
    texts = F.normalize(torch.randn(5, 4, generator=generator), dim=1)
    if ties:  # on axes: one image has one score wherever it stands in a product
        images = torch.eye(4)[torch.randint(3, (n,), generator=generator)]
    latents = (torch.rand(n, 6, generator=generator) < 0.4).float()
    words = torch.randint(-1, 5, (6,), generator=generator)
    found = Checker(Firing.of(latents), images).check(words, texts)
    for latent, word in enumerate(words.tolist()):
        fired = int(latents[:, latent].sum())
        if word < 0 or not 5 <= fired <= n - 5:
            assert math.isnan(float(found.auroc[latent]))
            continue
        scores = (texts[word] @ images.T).numpy()
        expected = roc_auc_score(latents[:, latent].numpy(), scores)
        assert float(found.auroc[latent]) == pytest.approx(expected, abs=1e-6)
        assert float(found.low[latent]) <= expected + 1e-9
        assert float(found.high[latent]) >= expected - 1e-9


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), panel=st.sampled_from((3, 256)))
def test_a_name_is_compared_with_the_names_of_other_latents(seed: int, panel: int) -> None:
    """Mean and rank among the other names, a name at a time by scikit-learn."""
    from vision_plugin.lens import _name_checks

    generator = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(40, 4, generator=generator), dim=1)
    images = images[torch.randint(12, (40,), generator=generator)]  # with equals
    texts = F.normalize(torch.randn(9, 4, generator=generator), dim=1)
    latents = (torch.rand(40, 7, generator=generator) < 0.4).float()
    words = torch.randint(-1, 9, (7,), generator=generator)
    before, _name_checks.PANEL = _name_checks.PANEL, panel
    try:
        found = Checker(Firing.of(latents), images).check(words, texts)
    finally:
        _name_checks.PANEL = before
    used = sorted({word for word in words.tolist() if word >= 0})
    for latent, word in enumerate(words.tolist()):
        if bool(found.auroc[latent].isnan()):
            assert bool(found.beats[latent].isnan())
            continue
        rivals = [
            roc_auc_score(latents[:, latent].numpy(), (texts[other] @ images.T).numpy())
            for other in used
            if other != word
        ]
        own = float(found.auroc[latent])
        if panel > len(used) and rivals:
            assert float(found.others[latent]) == pytest.approx(sum(rivals) / len(rivals), abs=1e-6)
            wins = sum((own > one + 1e-9) + 0.5 * (abs(own - one) <= 1e-9) for one in rivals)
            assert float(found.beats[latent]) == pytest.approx(wins / len(rivals), abs=1e-6)
        elif rivals:
            assert min(rivals) - 1e-6 <= float(found.others[latent]) <= max(rivals) + 1e-6
        else:
            assert bool(found.beats[latent].isnan())
            assert not bool(found.better[latent])


def test_names_that_only_go_along_are_no_better_than_chance() -> None:
    """Half of all texts and half of all latents go with one direction of the images.

    So half of the names drawn at random predict such a latent, and most intervals lie above one
    half. But only its own name predicts it better than nearly all others do.
    """
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(600, 64, generator=generator)
    texts = torch.eye(64) + 0.7 * torch.eye(64)[0]
    latents = ((images @ texts.T) > 1.5).float()[:, 1:]
    found = Checker(Firing.of(latents), F.normalize(images, dim=1)).check(
        torch.arange(1, 64), F.normalize(texts, dim=1)
    )
    summary = found.summary()
    assert summary["share_better"] == 1
    assert summary["share_above_half_shuffled"] > 0.5
    assert summary["share_better_shuffled"] < 0.08
    assert 0 < summary["margin_low"] < summary["mean_margin"] < summary["margin_high"]
    wrong = Checker(Firing.of(latents), F.normalize(images, dim=1)).check(
        torch.arange(1, 64).roll(1), F.normalize(texts, dim=1)
    )
    assert wrong.summary()["share_above_half"] > 0.5
    assert wrong.summary()["share_better"] < 0.08


def test_where_no_judge_reads_text_the_labels_judge() -> None:
    labels = ["cat"] * 10 + ["dog"] * 10
    latents = torch.zeros(20, 3)
    latents[:10, 0] = 1  # cats
    latents[5:15, 1] = 1  # half of each
    checker = Checker(Firing.of(latents), None, [labels])
    found = checker.check(torch.tensor([0, 0, 1]), None, ["cat", "dog"])
    assert found.by == "labels"
    assert found.auroc[:2].tolist() == [1.0, 0.5]
    assert bool(found.auroc[2].isnan())  # it never fires


def test_the_interval_is_newcombes() -> None:
    """At its ends, the AUROC lies z standard errors off, by the error at that end."""
    z = 1.959963984540054
    for auroc, m, n in ((0.6, 12, 300), (0.95, 40, 41), (0.5, 7, 7), (0.1, 100, 9)):
        ends = auroc_interval(
            *(torch.tensor([auroc], dtype=torch.float64), torch.tensor([m]), torch.tensor([n]))
        )
        for end in map(float, ends):
            half = (m + n) / 2 - 1
            q1, q2 = end / (2 - end), 2 * end**2 / (1 + end)
            error = math.sqrt(
                (end * (1 - end) + half * (q1 - end**2) + half * (q2 - end**2)) / (m * n)
            )
            assert abs(auroc - end) == pytest.approx(z * error, abs=1e-9)
    low, high = auroc_interval(torch.tensor([1.0]), torch.tensor([9]), torch.tensor([50]))
    assert 0.5 < float(low) < 1
    assert float(high) == pytest.approx(1)


def test_the_interval_covers_what_it_says() -> None:
    """Normal scores one standard deviation apart have the AUROC Phi(1 / sqrt 2)."""
    generator = torch.Generator().manual_seed(0)
    truth = 0.5 * (1 + math.erf(0.5))
    for m, n in ((8, 60), (30, 30)):
        positive = torch.randn(3000, m, generator=generator) + 1
        negative = torch.randn(3000, n, generator=generator)
        auroc = (positive[:, :, None] > negative[:, None]).double().mean((1, 2))
        sizes = torch.full((3000,), m), torch.full((3000,), n)
        low, high = auroc_interval(auroc, *sizes)
        covered = float(((low <= truth) & (truth <= high)).double().mean())
        assert 0.93 <= covered <= 0.98


def test_a_confidence_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="confidence=95"):
        auroc_interval(torch.tensor([0.5]), torch.tensor([3]), torch.tensor([3]), confidence=95.0)


def test_shuffled_names_are_those_of_other_latents() -> None:
    words = torch.tensor([3, -1, 4, 4, 5, 6, -1, 3, 8, 9])
    for seed in range(20):
        mixed = shuffled(words, seed)
        assert bool(((mixed == -1) == (words == -1)).all())
        named = words >= 0
        assert bool((mixed[named] != words[named]).all())
        assert sorted(mixed[named].tolist()) == sorted(words[named].tolist())
    assert shuffled(torch.tensor([2, 2, -1]), 0).tolist() == [-1, -1, -1]


def test_a_latent_that_is_above_0_nearly_always_fires_above_its_median() -> None:
    latents = torch.rand(100, 2, generator=torch.Generator().manual_seed(0))
    latents[20:, 1] = 0
    firing = Firing.of(latents)
    thresholds = firing.thresholds()
    assert firing.above(thresholds).counts.tolist() == [50, 20]
    assert float(thresholds[1]) == 0


def test_names_of_noise_are_no_better_than_chance() -> None:
    """Latents that fire at random have no name that explains them, whatever the name is."""
    generator = torch.Generator().manual_seed(1)
    images = F.normalize(torch.randn(400, 16, generator=generator), dim=1)
    texts = F.normalize(torch.randn(30, 16, generator=generator), dim=1)
    latents = (torch.rand(400, 300, generator=generator) < 0.2).float()
    words = torch.randint(30, (300,), generator=generator)
    found = Checker(Firing.of(latents), images).check(words, texts).summary()
    assert found["mean_auroc"] == pytest.approx(0.5, abs=0.01)
    assert found["share_above_half"] < 0.06
    assert found["share_better"] < 0.06
    assert found["share_better_shuffled"] < 0.06
    assert abs(found["mean_margin"]) < 0.01
