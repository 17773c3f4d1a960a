"""Steerability as a metric: numbers from changes, states that merge, errors that explain."""

from __future__ import annotations

import copy
import inspect
import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import vision_plugin as vp
from tests.metrics._steerability_reference import standard_sae, tiny_clip
from vision_plugin.metrics import (
    Screening,
    Steerability,
    neuron_dictionary,
    steerability,
    steerability_curve,
)
from vision_plugin.metrics._steerability_result import score_changes

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def world() -> SimpleNamespace:
    generator = torch.Generator().manual_seed(1)
    return SimpleNamespace(
        model=vp.wrap(tiny_clip()),
        sae=standard_sae(HOOK, 16),
        pixels=torch.randn(8, 3, 8, 8, generator=generator),
        texts=torch.randn(7, 12, generator=generator),
    )


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(2, 9), st.integers(2, 5), st.integers(0, 10**6))
def test_scores_follow_their_definitions(
    n_latents: int, n_concepts: int, width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(n_latents, n_concepts, generator=generator) * 0.2
    texts = nn.functional.normalize(torch.randn(n_concepts, width, generator=generator), dim=1)
    scores = score_changes(delta, texts)
    for row, change in enumerate(delta.double().tolist()):
        total = [sum(column) for column in zip(*texts.double().tolist(), strict=True)]
        length = math.sqrt(sum(x * x for x in total))
        moved = [
            sum(d * t for d, t in zip(change, column, strict=True))
            for column in zip(*texts.double().tolist(), strict=True)
        ]
        away = math.sqrt(sum((m - t / length) ** 2 for m, t in zip(moved, total, strict=True)))
        assert float(scores.sum_of_squares[row]) == pytest.approx(sum(d * d for d in change))
        assert float(scores.power[row]) == pytest.approx(max(change))
        assert int(scores.top_concept[row]) == change.index(max(change))
        assert float(scores.polysemanticity[row]) == pytest.approx(away, abs=1e-9)


@settings(max_examples=8, deadline=None)
@given(split=st.lists(st.integers(1, 7), min_size=1, max_size=3, unique=True), swap=st.booleans())
def test_merging_any_split_in_any_order_equals_one_pass(
    world: SimpleNamespace, split: list[int], swap: bool
) -> None:
    whole = steerability(world.model, world.sae, world.pixels, world.texts, strength=8.0)
    pieces = [part for part in world.pixels.tensor_split(sorted(split)) if len(part)]
    metrics = []
    for piece in pieces:
        metric = Steerability(world.model, world.sae, world.texts, strength=8.0)
        metric.update(piece)
        metrics.append(metric)
    if swap:
        metrics.reverse()
    first, *others = metrics
    for other in others:
        first.merge_state(other)
    merged = first.compute()
    assert merged.n_images == 8
    torch.testing.assert_close(merged.delta, whole.delta, rtol=0, atol=1e-6)
    torch.testing.assert_close(merged.score, whole.score, rtol=0, atol=1e-6)


def test_updates_in_batches_equal_one_pass(world: SimpleNamespace) -> None:
    metric = Steerability(world.model, world.sae, world.texts, strength=8.0, batch_size=3)
    for batch in world.pixels.split(3):
        metric.update(batch)
    whole = steerability(world.model, world.sae, world.pixels, world.texts, strength=8.0)
    torch.testing.assert_close(metric.compute().delta, whole.delta, rtol=0, atol=1e-6)
    metric.reset()
    with pytest.raises(ValueError, match="no images were seen"):
        metric.compute()


def test_a_copy_of_the_metric_shares_the_model(world: SimpleNamespace) -> None:
    metric = Steerability(world.model, world.sae, world.texts)
    assert copy.deepcopy(metric).steering.model is world.model
    assert not list(metric.parameters())


def test_groups_of_latents_change_nothing(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = steerability(world.model, world.sae, world.pixels, world.texts, strength=8.0)
    monkeypatch.setattr("vision_plugin.metrics._steerability._GROUP_ELEMENTS", 4 * 7)
    dropped = steerability(
        world.model, world.sae, world.pixels, world.texts, strength=8.0, keep_delta=False
    )
    assert dropped.delta is None
    for name in ("score", "power", "ratio", "polysemanticity", "top_concept", "latents", "n_seen"):
        torch.testing.assert_close(getattr(dropped, name), getattr(kept, name))
    assert dropped.coverage == kept.coverage
    with pytest.raises(ValueError, match="keep_delta=True"):
        _ = dropped.directional


def test_sum_and_mean_are_named_and_judged_alike(world: SimpleNamespace) -> None:
    results = {
        definition: steerability(
            world.model,
            world.sae,
            world.pixels,
            world.texts,
            strength=8.0,
            definition=definition,
            threshold=0.05,
        )
        for definition in ("sum", "mean")
    }
    total, mean = results["sum"], results["mean"]
    assert (total.definition, mean.definition) == ("sum", "mean")
    torch.testing.assert_close(total.score / 7, mean.score)
    assert torch.equal(total.steerable, mean.steerable)
    assert 0 < int(total.steerable.sum()) < 6, "the threshold must separate something"
    assert total.coverage == len({int(c) for c in total.top_concept[total.steerable]})
    torch.testing.assert_close(total.ratio, total.score / total.power)
    torch.testing.assert_close(total.directional, total.delta * total.delta.abs())


def test_curves_equal_single_runs(world: SimpleNamespace) -> None:
    curve = steerability_curve(world.model, world.sae, world.pixels, world.texts)
    assert curve.strengths == (-20, -5, 0, 5, 10, 20, 50, 150)
    assert curve.score.shape == curve.power.shape == (8, 6)
    one = steerability(world.model, world.sae, world.pixels, world.texts, strength=20.0)
    torch.testing.assert_close(curve.score[5], one.score)
    assert curve.coverage[5] == one.coverage
    assert curve.summary()["coverage_at_20"] == one.coverage


def test_results_read_as_json(world: SimpleNamespace) -> None:
    names = [f"concept {number}" for number in range(7)]
    result = steerability(
        world.model, world.sae, world.pixels, world.texts, concepts=names, strength=8.0
    )
    assert result.top_names == tuple(names[c] for c in result.top_concept.tolist())
    text = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert text["definition"] == "sum"
    assert text["concepts"] == names
    assert result.summary()["n_latents"] == 6
    curve = steerability_curve(world.model, world.sae, world.pixels, world.texts, strengths=[3.0])
    json.dumps(curve.to_dict(), allow_nan=False)


def test_planted_directions_are_found_and_no_others(world: SimpleNamespace) -> None:
    """Directions that raise one concept each, after the last block, among ones that do nothing."""
    hook = "blocks.2.hook_resid_post"
    native = world.model.native
    weight = native.visual_projection.weight.double() * native.vision_model.post_layernorm.weight
    null = torch.linalg.svd(weight).Vh[12:]
    null = null - null.mean(1, keepdim=True)
    sae = standard_sae(hook, 16, d_sae=5)
    texts = nn.functional.normalize(world.texts.double(), dim=1)
    wanted = torch.linalg.pinv(weight - weight.mean(1, keepdim=True)) @ texts[[1, 4, 6]].T
    with torch.no_grad():
        sae.W_dec[:3] = wanted.T.float()
        sae.W_dec[3:] = torch.randn(2, 16) * 1e-4
    result = steerability(world.model, sae, world.pixels, world.texts, strength=150.0)
    assert result.steerable.tolist() == [True, True, True, False, False]
    assert result.top_concept[:3].tolist() == [1, 4, 6]
    assert result.coverage == 3


def _bad_text(row: int, value: float) -> torch.Tensor:
    texts = torch.randn(7, 12)
    texts[row] = value
    return texts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_embeddings": torch.randn(7, 9)}, "width 9.*12 dimensions"),
        ({"text_embeddings": _bad_text(2, math.nan)}, "NaN or infinity, first in row 2"),
        ({"text_embeddings": _bad_text(3, 0.0)}, "concept 3 is zero"),
        ({"text_embeddings": torch.randn(1, 12)}, "at least two concepts"),
        ({"latents": []}, "latents= is empty"),
        ({"latents": [0, 6]}, "latent 6 is out of range: there are 6"),
        ({"latents": [-1]}, "latent -1 is out of range"),
        ({"latents": [2, 2]}, "names a latent twice"),
        ({"latents": torch.tensor([0.5])}, "whole numbers"),
        ({"tokens": "patches"}, "not a kind of token"),
        ({"tokens": "register"}, "no 'register' token"),
        ({"strength": math.inf}, "strength=inf must be a finite number"),
        ({"threshold": math.nan}, "threshold=nan must be a finite number"),
        ({"definition": "median"}, "definition='median' is not one of"),
        ({"concepts": ["one"]}, "has 1 names for 7 text embeddings"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"pixels": torch.zeros(0, 3, 8, 8)}, "at least one image"),
        ({"pixels": torch.full((2, 3, 8, 8), math.nan)}, "image 0 .2 of 2 images."),
        ({"sae": neuron_dictionary(20).at(HOOK)}, "works on 20 dimensions"),
        ({"sae": neuron_dictionary(16).at("blocks.9.hook_resid_post")}, "no hook named"),
    ],
)
def test_bad_input_is_one_clear_error(
    world: SimpleNamespace, change: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {
        "model": world.model,
        "sae": world.sae,
        "pixels": world.pixels,
        "text_embeddings": world.texts,
        **change,
    }
    definition = arguments.get("definition")
    expected: tuple[type[Exception], ...] = (ValueError,)
    if definition == "median":
        from jaxtyping import TypeCheckError

        expected = (ValueError, TypeCheckError)
        message = "definition"
    with pytest.raises(expected, match=message):
        steerability(**arguments)


def test_weights_that_are_no_numbers_any_more_name_the_latent(world: SimpleNamespace) -> None:
    sae = standard_sae(HOOK, 16)
    metric = Steerability(world.model, sae, world.texts)
    with torch.no_grad():
        sae.W_dec[4] = math.nan
    with pytest.raises(ValueError, match=r"steering latent 4 \(1 of 6 latents\)"):
        metric.update(world.pixels)


def test_a_model_without_a_text_space_is_refused() -> None:
    model = vp.wrap(tiny_clip().vision_model)
    with pytest.raises(ValueError, match="no space shared with text"):
        steerability(model, standard_sae(HOOK, 16), torch.zeros(1, 3, 8, 8), torch.randn(3, 12))


def test_only_like_metrics_merge(world: SimpleNamespace) -> None:
    metric = Steerability(world.model, world.sae, world.texts)
    with pytest.raises(ValueError, match=r"strength=8\.0"):
        metric.merge_state(Steerability(world.model, world.sae, world.texts, strength=8.0))
    with pytest.raises(ValueError, match="different latents"):
        metric.merge_state(Steerability(world.model, world.sae, world.texts, latents=[1]))


@pytest.mark.parametrize("bad", [{"first": 2}, {"growth": 1.0}, {"margin": -1.0}])
def test_screening_needs_stages_that_end(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        Screening(**bad)


@given(st.integers(1, 500), st.integers(3, 40), st.floats(1.01, 4))
def test_stages_cover_every_image_once(n_images: int, first: int, growth: float) -> None:
    stages = list(Screening(first=first, growth=growth).stages(n_images))
    assert [i for start, stop in stages for i in range(start, stop)] == list(range(n_images))


def test_screening_estimates_the_full_score_without_bias() -> None:
    """The centre of the bound, over all subsets of a size, averages to the score on all images."""
    from itertools import combinations

    from vision_plugin.metrics._steerability_screening import _Sums
    from vision_plugin.steering import Shift, Spread

    changes = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0)).double()
    full = float(changes.mean(1).square().sum())
    estimates = []
    for chosen in combinations(range(6), 3):
        some = changes[:, list(chosen)]
        sums = _Sums.empty(1, torch.zeros(4, 2, dtype=torch.float64))
        sums.add(torch.tensor([0]), Shift(some.sum(1), Spread.of(some), 3))
        estimates.append(float(sums.upper_bound(torch.tensor([0]), 6, 0.0)))
    assert sum(estimates) / len(estimates) == pytest.approx(full)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("scale", {"scale": 3.0}),
        ("concepts", {"concepts": list("gfedcba")}),
        ("concepts", {"concepts": None}),
        ("text_embeddings", {}),
    ],
)
def test_metrics_of_other_questions_do_not_merge(world, name: str, changed: dict[str, Any]) -> None:
    options = {"strength": 2.0, "latents": range(4), "concepts": list("abcdefg"), "scale": 2.0}
    texts = world.texts.flip(0) if name == "text_embeddings" else world.texts
    mine = Steerability(world.model, world.sae, world.texts, **options)
    theirs = Steerability(world.model, world.sae, texts, **{**options, **changed})
    for metric in (mine, theirs):
        metric.update(world.pixels[:2])
    before = mine.total.clone()
    with pytest.raises(ValueError, match=rf"cannot merge.*{name}"):
        mine.merge_state(theirs)
    assert torch.equal(mine.total, before)
    same = Steerability(world.model, world.sae, world.texts * 7.0, **options)
    same.update(world.pixels[:2])
    mine.merge_state(same)
    assert int(mine.n_images) == 4


def test_a_curve_refuses_a_single_strength(world) -> None:
    with pytest.raises(ValueError, match=r"strength=5\.0 has no meaning.*strengths="):
        steerability_curve(world.model, world.sae, world.pixels, world.texts, strength=5.0)
    assert "strength" not in inspect.signature(steerability_curve).parameters
    assert "strength" in inspect.signature(steerability).parameters
