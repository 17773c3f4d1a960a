"""Matching of decoder directions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from vision_plugin import metrics


def test_a_shuffled_and_scaled_dictionary_is_found_again():
    decoder = torch.randn(30, 8)
    other = decoder[torch.randperm(30)] * torch.rand(30, 1).add(0.1)
    result = metrics.stability(decoder, other)
    for cosines in (result.max_cosine, result.max_cosine_back, result.matched_cosine):
        torch.testing.assert_close(cosines, torch.ones(30, dtype=torch.float64))
    assert result.summary()["share_above_0.9"] == 1


def test_assignment_is_the_best_of_all_permutations():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(6, 3, generator=generator) for _ in range(2))
    cosines = torch.nn.functional.cosine_similarity(first[:, None], second[None], dim=2).numpy()
    best = max(
        sum(cosines[i, j] for i, j in enumerate(order))
        for order in itertools.permutations(range(6))
    )
    result = metrics.stability(first, second)
    assert float(result.matched_cosine.sum()) == pytest.approx(best, abs=1e-5)
    np.testing.assert_allclose(result.max_cosine.numpy(), cosines.max(1), atol=1e-6)
    np.testing.assert_allclose(result.max_cosine_back.numpy(), cosines.max(0), atol=1e-6)


def test_dictionaries_of_different_sizes_and_zero_directions():
    first, second = torch.randn(5, 4), torch.randn(3, 4)
    first[2] = 0
    result = metrics.stability(first, second)
    assert result.max_cosine.isnan().tolist() == [False, False, True, False, False]
    assert int(result.matched_cosine.isnan().sum()) == 2
    assert result.n_zero == 1
    assert metrics.stability(first, second, assign=False).matched_cosine is None


def test_chunks_give_the_whole(monkeypatch):
    first, second = torch.randn(50, 6), torch.randn(40, 6)
    whole = metrics.stability(first, second)
    monkeypatch.setattr("vision_plugin.metrics._stability.ROWS_AT_ONCE", 7)
    parts = metrics.stability(first, second)
    torch.testing.assert_close(parts.max_cosine, whole.max_cosine)
    torch.testing.assert_close(parts.max_cosine_back, whole.max_cosine_back)


def test_several_pairs_are_joined_and_merged():
    pairs = [(torch.randn(4, 3), torch.randn(4, 3)) for _ in range(3)]
    together = metrics.Stability()
    shards = [metrics.Stability() for _ in range(2)]
    for i, pair in enumerate(pairs):
        together.update(*pair)
        shards[i // 2].update(*pair)
    shards[0].merge_state(shards[1])
    assert torch.equal(shards[0].compute().max_cosine, together.compute().max_cosine)
    assert together.compute().max_cosine.numel() == 12


def test_dictionaries_that_do_not_compare_are_refused():
    with pytest.raises(ValueError, match="with the same d"):
        metrics.stability(torch.randn(4, 3), torch.randn(4, 2))
    with pytest.raises(ValueError, match="no direction"):
        metrics.stability(torch.randn(4, 3), torch.zeros(4, 3))


def test_a_wide_pair_is_not_assigned_unless_asked_and_then_with_a_warning(monkeypatch, caplog):
    from vision_plugin.metrics import _stability

    monkeypatch.setattr(_stability, "LARGEST_ASSIGNMENT", 8)
    generator = torch.Generator().manual_seed(0)
    narrow, wide = (torch.randn(n, 4, generator=generator) for n in (8, 16))
    for pairs, are_assigned in (([narrow], True), ([wide], False), ([narrow, wide], False)):
        metric = metrics.Stability()
        for decoder in pairs:
            metric.update(decoder, decoder)
        assert (metric.compute().matched_cosine is not None) == are_assigned
    assert caplog.text == ""
    asked = metrics.Stability(assign=True)
    asked.update(wide, wide)
    torch.testing.assert_close(asked.compute().matched_cosine, torch.ones(16).double())
    # Twice as many directions as take a minute: eight minutes.
    assert "assigning 16 directions" in caplog.text
    assert "about 8 minutes" in caplog.text
    assert "assign=False leaves it out" in caplog.text
