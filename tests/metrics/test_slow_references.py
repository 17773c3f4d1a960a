"""Metrics against their definitions, written out again as loops over float64 numbers.

Monosemanticity, uniqueness, hierarchy, sparsity, top images and dissection have theirs beside
their other tests. A probe has no closed form: here its objective is minimised by another solver,
and images too close to its boundary for two solvers to agree on count for either side.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy.optimize import minimize
from sklearn.model_selection import train_test_split

import vision_plugin as vp
from tests.metrics._steerability_reference import slow_delta, standard_sae, tiny_clip
from tests.metrics.test_dissection import loop_moran
from vision_plugin import metrics

SEEDS = st.integers(0, 2**31)
CLOSE = 0.05
"""Probability by which a class must lead for two solvers to be sure of the same one."""


def parts(n: int, rng: np.random.Generator) -> Iterable[slice]:
    """Split ``n`` images anywhere."""
    cuts = sorted(rng.integers(0, n + 1, 2).tolist())
    return (slice(a, b) for a, b in itertools.pairwise([0, *cuts, n]) if b > a)


def tensor(values: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values))


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, n=st.integers(1, 12), classes=st.integers(2, 5), scale=st.floats(0.1, 100))
def test_loss_recovered_is_the_loop_over_images(
    seed: int, n: int, classes: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    logits = [scale * rng.normal(size=(n, classes)) for _ in range(3)]

    def loss(rows: np.ndarray) -> float:
        total = 0.0
        for row, label in zip(rows.tolist(), labels.tolist(), strict=True):
            top = max(row)
            total += top + math.log(sum(math.exp(x - top) for x in row)) - row[label]
        return total / n

    metric = metrics.LossRecovered()
    for part in parts(n, rng):
        metric.update(*(tensor(rows[part]) for rows in logits), tensor(labels[part]))
    result = metric.compute()
    clean, spliced, ablated = map(loss, logits)
    assert result.clean == pytest.approx(clean, abs=1e-9)
    assert result.window == pytest.approx(ablated - clean, abs=1e-9)
    if ablated > clean + 1e-6:
        assert result.recovered == pytest.approx((ablated - spliced) / (ablated - clean), rel=1e-6)
    elif ablated < clean - 1e-6:
        assert math.isnan(result.recovered)
    right = sum(
        row.index(max(row)) == label for row, label in zip(logits[0].tolist(), labels, strict=True)
    )
    assert result.accuracy_clean == pytest.approx(right / n)


@settings(max_examples=25, deadline=None)
@given(seed=SEEDS, n=st.integers(1, 20), mean=st.sampled_from([0.0, 0.3]))
def test_fvu_by_the_benchmarks_rule_is_the_loop_over_numbers(
    seed: int, n: int, mean: float
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 4)) + mean
    xhat = x + 0.3 * rng.normal(size=(n, 4)) * (rng.random((n, 1)) < 0.8)
    xhat[rng.random(n) < 0.2] = 0

    def variance(numbers: np.ndarray) -> float:
        total = squares = 0.0
        for number in numbers.flat:
            total += number
            squares += number * number
        return squares / n - (total / n) ** 2

    metric = metrics.FVU(d_in=4)
    for part in parts(n, rng):
        metric.update(tensor(x[part]), tensor(xhat[part]))
    result = metric.compute()
    if variance(x) > 1e-9:
        assert result.fvu == pytest.approx(variance(x - xhat) / variance(x), rel=1e-8, abs=1e-10)
    cosines = [
        float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))
        for a, b in zip(x, xhat, strict=True)
        if a.any() and b.any()
    ]
    assert result.n_without_cosine == n - len(cosines)
    if cosines:
        assert result.cosine == pytest.approx(sum(cosines) / len(cosines), abs=1e-12)
    else:
        assert math.isnan(result.cosine)


@settings(max_examples=20, deadline=None)
@given(
    seed=SEEDS,
    grid=st.sampled_from([(1, 4), (3, 3), (4, 2)]),
    fewest=st.integers(1, 3),
    most=st.sampled_from([0.5, 0.9, 1.0]),
    min_images=st.integers(1, 3),
)
def test_localization_is_the_loop_over_images_and_latents(
    seed: int, grid: tuple[int, int], fewest: int, most: float, min_images: int
) -> None:
    rng = np.random.default_rng(seed)
    patches = math.prod(grid)
    latents = rng.random((8, patches, 5)) * (rng.random((8, patches, 5)) < rng.random(5))
    latents[0, :, 0] = 1  # fires everywhere alike
    metric = metrics.Localization(
        n_features=5,
        grid_size=grid,
        min_active_patches=fewest,
        max_active_fraction=most,
        min_images=min_images,
    )
    for part in parts(8, rng):
        metric.update(tensor(latents[part]))
    result = metric.compute()
    for k in range(5):
        found = []
        for image in latents[:, :, k]:
            active = int((image != 0).sum())
            if fewest <= active <= int(most * patches) and image.max() > image.min():
                found.append(loop_moran(image.reshape(grid)))
        assert int(result.n_valid[k]) == len(found)
        if len(found) >= min_images:
            assert float(result.score[k]) == pytest.approx(sum(found) / len(found), abs=1e-9)
        else:
            assert result.score[k].isnan()


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, sizes=st.tuples(st.integers(1, 5), st.integers(1, 5)), d=st.integers(1, 4))
def test_stability_is_the_best_of_all_one_to_one_matchings(
    seed: int, sizes: tuple[int, int], d: int
) -> None:
    rng = np.random.default_rng(seed)
    first, second = (rng.normal(size=(size, d)) for size in sizes)
    first[1:][rng.random(sizes[0] - 1) < 0.3] = 0
    result = metrics.stability(tensor(first), tensor(second))

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))

    for row, found in zip(first, result.max_cosine.tolist(), strict=True):
        if row.any():
            assert found == pytest.approx(max(cosine(row, other) for other in second))
        else:
            assert math.isnan(found)
    alive = [row for row in first if row.any()]
    few, many = sorted([alive, list(second)], key=len)
    best = max(
        sum(cosine(a, b) for a, b in zip(few, order, strict=False))
        for order in itertools.permutations(many, len(few))
    )
    assert result.matched_cosine is not None
    assert float(result.matched_cosine.nansum()) == pytest.approx(best, abs=1e-9)
    assert result.n_zero == sizes[0] - len(alive)


# ------------------------------------------------------------------ probes


def f_scores(codes: np.ndarray, labels: np.ndarray) -> list[float]:
    """Variance between classes over variance within, ``-inf`` for a latent without variance."""
    classes = sorted(set(labels.tolist()))
    found = []
    for column in codes.T:
        grand = sum(column) / len(column)
        between = within = 0.0
        for label in classes:
            members = [float(x) for x, y in zip(column, labels, strict=True) if y == label]
            mean = sum(members) / len(members)
            between += len(members) * (mean - grand) ** 2
            within += sum((x - mean) ** 2 for x in members)
        if within == 0:
            found.append(-math.inf)
            continue
        free = len(labels) - len(classes)
        found.append(between / (len(classes) - 1) / (within / free))
    return found


def best_latents(codes: np.ndarray, labels: np.ndarray, k: int) -> list[int]:
    scores = f_scores(codes, labels)
    return sorted(range(len(scores)), key=scores.__getitem__, reverse=True)[:k]


def probe(x: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Logistic regression with half the squared norm of its weights, to full precision."""
    classes = sorted(set(labels.tolist()))
    n_rows = 1 if len(classes) == 2 else len(classes)
    wanted = np.array([[label == c for c in classes] for label in labels], dtype=float)

    def logits(parameters: np.ndarray, x: np.ndarray) -> np.ndarray:
        rows = parameters.reshape(n_rows, x.shape[1] + 1)
        found = x @ rows[:, :-1].T + rows[:, -1]
        return np.column_stack([np.zeros(len(x)), found]) if n_rows == 1 else found

    def probabilities(parameters: np.ndarray, x: np.ndarray) -> np.ndarray:
        found = logits(parameters, x)
        raised = np.exp(found - found.max(1, keepdims=True))
        return raised / raised.sum(1, keepdims=True)

    def objective(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        p = probabilities(parameters, x)
        weights = parameters.reshape(n_rows, x.shape[1] + 1).copy()
        weights[:, -1] = 0
        residual = (p - wanted)[:, -n_rows:]
        slope = np.column_stack([residual.T @ x, residual.sum(0)]) + weights
        loss = -np.log(np.maximum(p[wanted == 1], 1e-300)).sum() + (weights**2).sum() / 2
        return float(loss), slope.ravel()

    start = np.zeros(n_rows * (x.shape[1] + 1))
    options = {"gtol": 1e-9, "ftol": 1e-15, "maxiter": 5000}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options).x
    return functools.partial(probabilities, found)


def bounds(p: np.ndarray, labels: np.ndarray, classes: Sequence[int]) -> tuple[float, float]:
    """Least and largest accuracy, as images near the boundary may fall."""
    ordered = np.sort(p, axis=1)
    sure = ordered[:, -1] - ordered[:, -2] > CLOSE
    right = np.array(classes)[p.argmax(1)] == labels
    return float((right & sure).mean()), float((right | ~sure).mean())


def assert_within(value: float, limits: tuple[float, float]) -> None:
    assert limits[0] - 1e-9 <= value <= limits[1] + 1e-9


def split(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.arange(len(labels))
    train, test = train_test_split(rows, test_size=0.2, stratify=labels, random_state=42)
    return train, test


def drawn_codes(rng: np.random.Generator, classes: int, n: int = 40) -> tuple[Any, Any]:
    """Sparse latents ``[n, 6]``, of which some tell the classes apart, and labels."""
    labels = rng.permutation(np.arange(n) % classes)
    codes = rng.random((n, 6)) * (rng.random((n, 6)) < 0.7)
    for k in range(3):
        codes[:, k] += rng.random() * (labels == k % classes)
    codes[:, 5] = 0
    return codes.astype(np.float32), labels


@settings(max_examples=6, deadline=None)
@given(seed=SEEDS, classes=st.integers(2, 4))
def test_sparse_probing_is_a_probe_on_the_latents_of_largest_f(seed: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    codes, labels = drawn_codes(rng, classes)
    metric = metrics.SparseProbing(n_features=6, k_values=(1, 3))
    for part in parts(len(labels), rng):
        metric.update(tensor(codes[part]), tensor(labels[part]))
    result = metric.compute()
    train, test = split(labels)
    for k, accuracy in result.accuracy.items():
        columns = codes[:, best_latents(codes, labels, k)].astype(float)
        p = probe(columns[train], labels[train])(columns[test])
        assert_within(accuracy, bounds(p, labels[test], range(classes)))
    assert result.auc == pytest.approx((result.accuracy[1] + result.accuracy[3]) / 2)
    assert result.majority == max(np.bincount(labels[test])) / len(test)


@settings(max_examples=6, deadline=None)
@given(seed=SEEDS, classes=st.integers(2, 4))
def test_preservation_is_one_probe_on_means_over_patches(seed: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(40) % classes)
    x = rng.normal(size=(40, 5, 4)) + 1.5 * np.eye(4)[labels][:, None]
    xhat = 0.7 * x + 0.3 * rng.normal(size=x.shape)
    metric = metrics.DownstreamPreservation(d_in=4)
    for part in parts(40, rng):
        metric.update(tensor(x[part]), tensor(xhat[part]), tensor(labels[part]))
    result = metric.compute()
    train, test = split(labels)
    original, rebuilt = (
        np.array([[sum(column) / 5 for column in image.T] for image in tokens])
        for tokens in (x, xhat)
    )
    fitted = probe(original[train], labels[train])
    found = (result.accuracy_original, result.accuracy_reconstructed)
    for accuracy, rows in zip(found, (original, rebuilt), strict=True):
        assert_within(accuracy, bounds(fitted(rows[test]), labels[test], range(classes)))
    if found[0]:
        assert result.preservation == pytest.approx(min(found[1] / found[0], 2))


@settings(max_examples=6, deadline=None)
@given(seed=SEEDS, classes=st.integers(2, 3))
def test_cross_domain_is_sets_of_latents_variances_and_a_probe(seed: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    home = (rng.random((10, 6)) * (rng.random((10, 6)) < 0.2)).astype(np.float32)
    codes, labels = drawn_codes(rng, classes)
    x = rng.normal(size=(40, 3, 4))
    xhat = x + 0.4 * rng.normal(size=x.shape)
    metric = metrics.CrossDomain(n_features=6, domains=["far"], k_probe=2)
    metric.update(tensor(home), domain="home")
    for part in parts(40, rng):
        metric.update(
            tensor(codes[part]),
            domain="far",
            labels=tensor(labels[part]),
            activations=tensor(x[part]),
            reconstruction=tensor(xhat[part]),
        )
    found = metric.compute().domains["far"]
    here, there = ({k for k in range(6) if any(rows[:, k] > 0)} for rows in (home, codes))
    assert found.coverage == (len(here & there) / len(here) if here else 1)
    assert found.overlap == len(here & there) / len(here | there)
    tokens = 40 * 3
    spread = [
        sum(v * v for v in y.flat) / tokens - (sum(y.flat) / tokens) ** 2 for y in (x - xhat, x)
    ]
    assert found.fvu == pytest.approx(spread[0] / spread[1])
    train, test = split(labels)
    columns = codes[:, best_latents(codes[train], labels[train], 2)].astype(float)
    p = probe(columns[train], labels[train])(columns[test])
    assert_within(found.probe_accuracy, bounds(p, labels[test], range(classes)))
    quality = min(max(1 - found.fvu, 0), 1)
    expected = (quality + found.coverage + found.overlap + found.probe_accuracy) / 4
    assert found.composite == pytest.approx(expected)


@settings(max_examples=6, deadline=None)
@given(seed=SEEDS, top_k=st.integers(1, 4))
def test_absorption_is_shared_top_latents_or_a_gain_in_f1(seed: int, top_k: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(36) % 4)
    codes = (rng.random((36, 6)) + rng.random() * np.eye(6)[labels]).astype(np.float32)
    metric = metrics.Absorption(n_features=6, sibling_groups={"all": [0, 1, 2]}, top_k=top_k)
    for part in parts(36, rng):
        metric.update(tensor(codes[part]), tensor(labels[part]))
    result = metric.compute()
    of_group = codes[labels < 3].astype(float)
    mine = labels[labels < 3]

    def top(rows: np.ndarray) -> set[int]:
        means = [sum(column) / len(column) for column in rows.T]
        return set(sorted(range(6), key=means.__getitem__)[-top_k:])

    assert [pair.class_index for pair in result.pairs] == [0, 1, 2]
    for pair in result.pairs:
        positive = (mine == pair.class_index).astype(int)
        both = top(of_group[positive == 1]), top(of_group)
        assert pair.overlap == len(both[0] & both[1]) / len(both[0] | both[1])
        for k, f1 in ((1, pair.f1_primary), (4, pair.f1_expanded)):
            columns = of_group[:, best_latents(of_group, positive, k)]
            lead = probe(columns, positive)(columns)[:, 1] - 0.5
            said = lead > 0
            if (np.abs(lead) > CLOSE / 2).all():
                hits = int((said & (positive == 1)).sum())
                wrong = int((said != (positive == 1)).sum())
                assert f1 == pytest.approx(2 * hits / (2 * hits + wrong) if hits else 0)
        gain = pair.f1_expanded - pair.f1_primary
        assert pair.absorbed == (pair.overlap > 0.5 or gain > 0.1)
    assert result.rate == sum(pair.absorbed for pair in result.pairs) / 3


# ------------------------------------------------------------------ steerability


@functools.cache
def steered_models() -> tuple[Any, Any]:
    return tiny_clip(), vp.wrap(tiny_clip())


@settings(max_examples=8, deadline=None)
@given(
    seed=SEEDS,
    layer=st.integers(0, 2),
    strength=st.sampled_from([-20.0, 0.0, 5.0, 150.0]),
    tokens=st.sampled_from(["all", "cls"]),
)
def test_steerability_is_a_full_forward_per_latent(
    seed: int, layer: int, strength: float, tokens: str
) -> None:
    native, model = steered_models()
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(3, 3, 8, 8, generator=generator)
    texts = torch.randn(6, 12, generator=generator)
    sae = standard_sae(f"blocks.{layer}.hook_resid_post", 16, d_sae=3, seed=seed)
    found = metrics.steerability(model, sae, pixels, texts, strength=strength, tokens=tokens)
    rows = slice(0, 1) if tokens == "cls" else slice(None)
    expected = slow_delta(
        native, sae, pixels, texts, strength=strength, latents=[0, 1, 2], rows=rows
    )
    assert found.delta is not None
    torch.testing.assert_close(found.delta.double(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.score, expected.square().sum(1), rtol=0, atol=4e-5)
