"""The score against a float64 double loop; states against one pass; edges by name."""

from __future__ import annotations

import gc
import itertools
import json
import logging
import math
import weakref

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from vision_plugin.metrics import Monosemanticity, _moments, monosemanticity


def double_loop(latents, embeddings):
    """The definition, pair by pair; NaN where no pair has a weight."""
    a = np.asarray(latents, dtype=np.float64)
    e = np.asarray(embeddings, dtype=np.float64)
    e = e / np.sqrt((e * e).sum(1, keepdims=True))
    scores = []
    for column in a.T:
        span = column.max() - column.min()
        w = (column - column.min()) / span if span else np.zeros_like(column)
        numerator = denominator = 0.0
        for n, m in itertools.combinations(range(len(w)), 2):
            numerator += w[n] * w[m] * float(e[n] @ e[m])
            denominator += w[n] * w[m]
        scores.append(numerator / denominator if denominator else math.nan)
    return np.array(scores)


def layouts(dense):
    return {"dense": dense, "coo": dense.to_sparse_coo(), "csr": dense.to_sparse_csr()}


def random_case(seed, n, k, d, kind):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.rand(n, k, generator=generator, dtype=torch.float64)
    if kind == "sparse":
        latents *= torch.rand(n, k, generator=generator) < 0.3
    elif kind == "signed":
        latents = latents * 2 - 1
    elif kind == "signed sparse":
        latents = (latents * 2 - 1) * (torch.rand(n, k, generator=generator) < 0.3)
    elif kind == "shifted":
        latents += 1000
    elif kind == "far below zero":
        latents -= 1e6
    elif kind == "one dense column":
        latents *= torch.rand(n, k, generator=generator) < 0.2
        latents[:, 0] = 1000 + torch.rand(n, generator=generator, dtype=torch.float64)
    elif kind == "float32":
        latents = latents.float()
    elif kind == "degenerate":
        latents[:, 0] = 0
        latents[:, 1 % k] = 3
        latents[:, 2 % k] = 0
        latents[n // 2, 2 % k] = 2.0
    embeddings = torch.randn(n, d, generator=generator, dtype=torch.float64) + 0.5
    return latents, embeddings


KINDS = [
    "random",
    "sparse",
    "signed",
    "signed sparse",
    "shifted",
    "far below zero",
    "one dense column",
    "float32",
    "degenerate",
]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(2, 25),
    k=st.integers(1, 6),
    d=st.integers(1, 8),
    kind=st.sampled_from(KINDS),
    layout=st.sampled_from(["dense", "coo", "csr"]),
)
def test_score_is_the_double_loop(seed, n, k, d, kind, layout):
    latents, embeddings = random_case(seed, n, k, d, kind)
    result = monosemanticity(layouts(latents)[layout], embeddings)
    assert result.score.dtype == torch.float64
    # 1e6 + U(0, 1) itself holds the fraction to 1e-10 only; the reference sees the same input.
    np.testing.assert_allclose(
        result.score.numpy(), double_loop(latents, embeddings), rtol=0, atol=1e-10
    )


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    kind=st.sampled_from(KINDS),
    n_parts=st.integers(1, 6),
    mixed=st.booleans(),
    definition=st.sampled_from(["all", "top16"]),
)
@example(seed=310, kind="signed sparse", n_parts=4, mixed=False, definition="top16")
def test_any_split_and_merge_order_gives_one_pass(seed, kind, n_parts, mixed, definition):
    n, k, d = 40, 5, 4
    latents, embeddings = random_case(seed, n, k, d, kind)
    rng = np.random.default_rng(seed)
    cuts = [0, *sorted(rng.integers(0, n + 1, n_parts - 1).tolist()), n]
    whole = monosemanticity(latents, embeddings, definition=definition)
    parts = []
    for start, stop in itertools.pairwise(cuts):
        part = Monosemanticity(n_features=k, d_embed=d, definition=definition)
        layout = rng.choice(["dense", "coo", "csr"]) if mixed else "dense"
        part.update(layouts(latents[start:stop])[layout], embeddings[start:stop])
        parts.append(part)
    while len(parts) > 1:
        first, second = sorted(rng.choice(len(parts), 2, replace=False))
        if kind == "signed sparse" and definition == "top16":
            second = first + 1  # Zeros tie for a place among the 16, and ties go by image order.
        other = parts.pop(second)
        parts[first].merge_state(other)
    merged = parts[0].compute()
    torch.testing.assert_close(merged.score, whole.score, rtol=0, atol=1e-10, equal_nan=True)
    torch.testing.assert_close(merged.z, whole.z, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert torch.equal(merged.n_active, whole.n_active)
    assert merged.reason == whole.reason
    assert merged.n_images == n


@pytest.mark.parametrize("kind", ["sparse", "signed sparse", "one dense column", "degenerate"])
@pytest.mark.parametrize("k", [7, 80])
def test_without_mkl_the_sums_are_the_same(kind, k, monkeypatch):
    latents, embeddings = random_case(4, 30, k, 5, kind)
    with_mkl = monosemanticity(latents.to_sparse_csr(), embeddings, confidence=0.9)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    monkeypatch.setattr(_moments, "CHUNK_ELEMENTS", 10)  # two latents at once
    without = monosemanticity(latents.to_sparse_csr(), embeddings, confidence=0.9)
    torch.testing.assert_close(without.score, with_mkl.score, rtol=0, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(without.z, with_mkl.z, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("layout", ["dense", "coo", "csr"])
def test_batches_in_which_nothing_fires_count_as_images(layout):
    latents, embeddings = random_case(6, 20, 4, 3, "sparse")
    latents[:5] = 0
    latents[12:] = 0
    metric = Monosemanticity(n_features=4, d_embed=3)
    for part in (slice(0, 5), slice(5, 12), slice(12, 20), slice(20, 20)):
        metric.update(layouts(latents[part])[layout], embeddings[part])
    np.testing.assert_allclose(
        metric.compute().score.numpy(), double_loop(latents, embeddings), rtol=0, atol=1e-12
    )


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor has that anything makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        given = {None, *(place(tensor) for tensor in args)}
        for tensor in made if isinstance(made, tuple) else (made,):
            if place(tensor) not in given:
                self.elements = max(self.elements, tensor.numel())
        return made


def place(value):
    """Where a dense tensor's numbers are; the same place for a view and what was changed in it."""
    if isinstance(value, torch.Tensor) and value.layout == torch.strided:
        return value.untyped_storage().data_ptr()
    return None


@pytest.mark.parametrize("share", [0.1, 0.01])
def test_an_update_makes_nothing_of_the_size_of_the_state(share):
    n, k, d = 50, 3000, 40
    latents, embeddings = random_case(13, n, k, d, "random")
    latents *= torch.rand(n, k, generator=torch.Generator().manual_seed(0)) < share
    metric = Monosemanticity(n_features=k, d_embed=d)
    csr = latents.to_sparse_csr()
    with LargestTensor() as made:
        metric.update(csr, embeddings)
        metric.update(csr, embeddings)
        metric.compute()
    assert made.elements < k * d / 2


def test_a_call_leaves_no_state_for_the_garbage_collector(monkeypatch):
    seen = []
    build = Monosemanticity.__init__

    def remembered(self, **kwargs):
        build(self, **kwargs)
        seen.append(weakref.ref(self))

    monkeypatch.setattr(Monosemanticity, "__init__", remembered)
    gc.disable()
    try:
        monosemanticity(*random_case(0, 9, 3, 2, "random"))
        assert [reference() for reference in seen] == [None]
    finally:
        gc.enable()


def test_merging_leaves_the_other_metric_as_it_was():
    latents, embeddings = random_case(0, 20, 4, 3, "shifted")
    first, second = (Monosemanticity(n_features=4, d_embed=3) for _ in range(2))
    first.update(latents[:10] - 500, embeddings[:10])
    second.update(latents[10:], embeddings[10:])
    before = second.compute().score.clone()
    first.merge_state(second)
    second._computed = None
    assert torch.equal(second.compute().score, before)


def test_forward_returns_the_batch_and_keeps_the_whole():
    latents, embeddings = random_case(3, 30, 4, 3, "shifted")
    metric = Monosemanticity(n_features=4, d_embed=3)
    first = metric(latents[:12], embeddings[:12])
    second = metric(latents[12:], embeddings[12:])
    torch.testing.assert_close(first.score, monosemanticity(latents[:12], embeddings[:12]).score)
    torch.testing.assert_close(second.score, monosemanticity(latents[12:], embeddings[12:]).score)
    torch.testing.assert_close(metric.compute().score, monosemanticity(latents, embeddings).score)
    metric.reset()
    metric.update(latents[:12], embeddings[:12])
    torch.testing.assert_close(metric.compute().score, first.score)


def test_undefined_scores_are_nan_and_named():
    latents = torch.tensor([[0.0, 2, 0, 1, 5], [0, 2, 3, 2, 5], [0, 2, 0, 0, 7]])
    result = monosemanticity(latents, torch.eye(3))
    assert result.reason == ("dead", "constant", "one_image", "ok", "one_image")
    assert result.score.isnan().tolist() == [True, True, True, False, True]
    assert result.n_active.tolist() == [0, 3, 1, 2, 3]
    assert result.reason_counts == {"ok": 1, "dead": 1, "constant": 1, "one_image": 2}
    summary = result.summary()
    assert (summary["n_defined"], summary["n_dead"], summary["n_one_image"]) == (1, 1, 2)
    assert summary["mean_score"] == pytest.approx(0.0)
    strict = json.dumps(result.to_dict(), allow_nan=False)
    assert json.loads(strict)["score"][0] is None


def test_images_alike_score_one_and_random_firing_scores_the_mean():
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(400) % 4
    one_hot = torch.eye(4)[classes]
    pure = one_hot
    random = torch.rand(400, 300, generator=generator)
    result = monosemanticity(torch.cat([pure, random], 1), one_hot)
    torch.testing.assert_close(result.score[:4], torch.ones(4, dtype=torch.float64))
    assert abs(float(result.score[4:].mean()) - result.mean_similarity) < 1e-3
    assert float(result.z[:4].min()) > 5


@pytest.mark.parametrize("kind", ["random", "sparse", "shifted", "signed"])
def test_z_is_that_of_drawn_permutations(kind):
    latents, embeddings = random_case(5, 14, 3, 4, kind)
    result = monosemanticity(latents, embeddings)
    rng = np.random.default_rng(0)
    unit = (embeddings / embeddings.norm(dim=1, keepdim=True)).numpy()
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, 0.0)
    w = (latents - latents.amin(0)).numpy()
    pairs = w.sum(0) ** 2 - (w**2).sum(0)
    draws = 40_000
    drawn = np.empty((draws, 3))
    for i in range(draws):
        order = rng.permutation(14)
        drawn[i] = np.einsum("nk,nm,mk->k", w, similarity[order][:, order], w) / pairs
    np.testing.assert_allclose(drawn.mean(0), result.mean_similarity, atol=5e-3)
    expected = (result.score.numpy() - result.mean_similarity) / drawn.std(0)
    # The standard error of a standard deviation from 40,000 draws is 0.35%.
    np.testing.assert_allclose(result.z.numpy(), expected, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("n", [3, 4, 5])
@pytest.mark.parametrize("definition", ["all", "top16"])
def test_null_deviation_is_exact_over_all_permutations(n, definition):
    latents, embeddings = random_case(n, n, 2, 3, "random")
    result = monosemanticity(latents, embeddings, definition=definition)
    scores = np.array(
        [
            double_loop(latents, embeddings[list(order)])
            for order in itertools.permutations(range(n))
        ]
    )
    expected = (result.score.numpy() - scores.mean(0)) / scores.std(0)
    np.testing.assert_allclose(result.z.numpy(), expected, rtol=1e-8)
    np.testing.assert_allclose(scores.mean(0), result.mean_similarity, rtol=1e-10)


def test_two_images_have_a_score_but_no_z():
    result = monosemanticity(torch.tensor([[1.0], [2.0]]), torch.eye(2))
    assert result.reason == ("one_image",)
    both = monosemanticity(torch.tensor([[1.0, 0], [1.0, 1]]), torch.eye(2))
    assert both.z.isnan().all()


@pytest.mark.parametrize("kind", ["random", "sparse", "signed sparse", "one dense column"])
@pytest.mark.parametrize("layout", ["dense", "csr"])
def test_interval_is_the_jackknife(kind, layout):
    latents, embeddings = random_case(8, 16, 4, 3, kind)
    result = monosemanticity(layouts(latents)[layout], embeddings, confidence=0.95)
    n = 16
    low = latents.amin(0)
    w = (latents - low).numpy()
    unit = (embeddings / embeddings.norm(dim=1, keepdim=True)).numpy()
    similarity = unit @ unit.T

    def score(keep):
        pairs = np.triu(np.ones((len(keep), len(keep))), 1)
        s, x = similarity[np.ix_(keep, keep)] * pairs, w[keep]
        with np.errstate(invalid="ignore"):
            return np.einsum("nk,nm,mk->k", x, s, x) / np.einsum("nk,nm,mk->k", x, pairs, x)

    left_out = np.array([score([j for j in range(n) if j != i]) for i in range(n)])
    error = np.sqrt((n - 1) / n * ((left_out - left_out.mean(0)) ** 2).sum(0))
    np.testing.assert_allclose(result.standard_error.numpy(), error, rtol=1e-8)
    np.testing.assert_allclose(
        result.high.numpy(), np.minimum(result.score.numpy() + 1.959964 * error, 1), rtol=1e-6
    )
    defined = ~result.standard_error.isnan()
    assert (result.low <= result.score)[defined].all()


def test_interval_is_undefined_where_leaving_one_out_leaves_no_pair():
    latents = torch.tensor([[1.0, 1], [1, 1], [0, 1], [0, 0]])
    result = monosemanticity(latents, torch.randn(4, 3), confidence=0.9)
    assert result.reason == ("ok", "ok")
    assert result.standard_error.isnan().tolist() == [True, False]


def top16_loop(latents, embeddings, top_range):
    a = np.asarray(latents, dtype=np.float64)
    scores = []
    for column in a.T:
        order = np.argsort(-column, kind="stable")[:16]
        low = column.min() if top_range == "dataset" else column[order].min()
        shifted = np.maximum(column[order] - low, 0)
        pad = np.zeros((len(order), 1))
        scores.append(double_loop_weights(shifted, np.asarray(embeddings)[order], pad))
    return np.array(scores)


def double_loop_weights(w, e, _):
    e = e / np.sqrt((e * e).sum(1, keepdims=True))
    numerator = denominator = 0.0
    for n, m in itertools.combinations(range(len(w)), 2):
        numerator += w[n] * w[m] * float(e[n] @ e[m])
        denominator += w[n] * w[m]
    return numerator / denominator if denominator else math.nan


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(2, 60),
    kind=st.sampled_from(KINDS),
    layout=st.sampled_from(["dense", "coo", "csr"]),
    top_range=st.sampled_from(["dataset", "top"]),
)
def test_top16_is_the_double_loop_over_the_16_largest(seed, n, kind, layout, top_range):
    latents, embeddings = random_case(seed, n, 4, 3, kind)
    result = monosemanticity(
        layouts(latents)[layout], embeddings, definition="top16", top_range=top_range
    )
    np.testing.assert_allclose(
        result.score.numpy(), top16_loop(latents, embeddings, top_range), rtol=0, atol=1e-10
    )
    assert result.definition == "top16"


def test_top16_ranks_zeros_that_sparse_shards_leave_out_above_negative_latents():
    latents = torch.tensor([[0.0]] * 18 + [[1.0], [0.5]] + [[-1.0]] * 5, dtype=torch.float64)
    embeddings = random_case(1, 25, 1, 3, "random")[1]
    expected = top16_loop(latents, embeddings, "dataset")
    for layout in ("dense", "csr"):
        metric = Monosemanticity(n_features=1, d_embed=3, definition="top16")
        for part in (slice(0, 9), slice(9, 21), slice(21, 25)):
            metric.update(layouts(latents[part])[layout], embeddings[part])
        np.testing.assert_allclose(metric.compute().score.numpy(), expected, atol=1e-12)


def test_images_without_a_direction_are_left_out_and_counted(caplog):
    latents, embeddings = random_case(9, 12, 3, 4, "sparse")
    embeddings[[2, 7]] = 0
    keep = embeddings.norm(dim=1) > 0
    for layout, definition in itertools.product(["dense", "csr"], ["all", "top16"]):
        with caplog.at_level(logging.WARNING):
            result = monosemanticity(layouts(latents)[layout], embeddings, definition=definition)
        expected = monosemanticity(latents[keep], embeddings[keep], definition=definition)
        torch.testing.assert_close(result.score, expected.score, equal_nan=True)
        assert torch.equal(result.n_active, expected.n_active)
        assert (result.n_images, result.n_excluded) == (10, 2)
        assert "2 of 12 images" in caplog.text


def test_tiny_and_huge_embeddings_keep_their_direction():
    latents, embeddings = random_case(10, 12, 3, 4, "random")
    scale = torch.logspace(-300, 300, 12, dtype=torch.float64)[:, None]
    torch.testing.assert_close(
        monosemanticity(latents, embeddings * scale).score,
        monosemanticity(latents, embeddings).score,
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("layout", ["dense", "coo", "csr"])
def test_nan_and_infinity_are_refused(bad, layout):
    latents, embeddings = random_case(11, 6, 3, 2, "random")
    broken = latents.clone()
    broken[1, 1] = bad
    with pytest.raises(ValueError, match="latents holds 1 NaN or infinite"):
        monosemanticity(layouts(broken)[layout], embeddings)
    broken = embeddings.clone()
    broken[0, 0] = bad
    with pytest.raises(ValueError, match="embeddings holds 1 NaN or infinite"):
        monosemanticity(layouts(latents)[layout], broken)


def test_shapes_that_disagree_are_refused():
    latents, embeddings = random_case(12, 6, 3, 2, "random")
    with pytest.raises(ValueError, match="latents are for 6 images and embeddings for 5"):
        monosemanticity(latents, embeddings[:5])
    metric = Monosemanticity(n_features=4, d_embed=2)
    with pytest.raises(ValueError, match=r"3 latents, but .* n_features=4"):
        metric.update(latents, embeddings)
    with pytest.raises(ValueError, match=r"width 2, but .* d_embed=5"):
        Monosemanticity(n_features=3, d_embed=5).update(latents, embeddings)
    with pytest.raises(ValueError, match="reduce the token axis"):
        metric.update(latents[None], embeddings)
    with pytest.raises(ValueError, match="cannot merge"):
        metric.merge_state(Monosemanticity(n_features=3, d_embed=2))
    with pytest.raises(ValueError, match="at least two"):
        monosemanticity(latents[:1], embeddings[:1])
    with pytest.raises(ValueError, match="at least two"):
        metric.compute()


def test_options_are_checked():
    with pytest.raises(ValueError, match="confidence=95"):
        monosemanticity(torch.rand(3, 2), torch.rand(3, 2), confidence=95.0)
    with pytest.raises(ValueError, match="definition='all' only"):
        monosemanticity(torch.rand(3, 2), torch.rand(3, 2), confidence=0.9, definition="top16")
