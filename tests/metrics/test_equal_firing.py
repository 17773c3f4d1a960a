"""Trained latents against random directions that fire as often: the number, its interval, edges."""

from __future__ import annotations

import dataclasses
import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vision_plugin import metrics
from vision_plugin.demo import draw, factor_codes

N_IMAGES = 600


def result_of(score: Tensor, n_active: Tensor, **changes: object) -> metrics.MonosemanticityResult:
    """A result with these scores and firing counts."""
    some = metrics.monosemanticity(torch.rand(4, len(score)), torch.eye(4) + 0.1)
    return dataclasses.replace(some, score=score, n_active=n_active, n_images=N_IMAGES, **changes)


def slow(
    score: list[float],
    firing: list[int],
    control_score: list[float],
    control_firing: list[int],
    min_active: int,
    confidence: float,
) -> tuple[float, float, float, int]:
    """The docstring's formulas as loops over Python floats."""
    pairs = [(s, n) for s, n in zip(score, firing, strict=True) if n >= min_active and s == s]
    others = zip(control_score, control_firing, strict=True)
    controls = [(s, n) for s, n in others if n >= min_active and s == s]
    total, parts = 0, []
    for exponent in range(40):
        inside = [s for s, n in pairs if 2**exponent <= n < 2 ** (exponent + 1)]
        outside = [s for s, n in controls if 2**exponent <= n < 2 ** (exponent + 1)]
        if len(inside) < 5 or len(outside) < 5:
            continue
        means, errors = [], []
        for values in (inside, outside):
            mean = math.fsum(values) / len(values)
            variance = math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1)
            means.append(mean)
            errors.append(variance / len(values))
        total += len(inside)
        parts.append((len(inside), means[0] - means[1], sum(errors)))
    if not parts:
        return math.nan, math.nan, math.nan, 0
    difference = math.fsum(n * d for n, d, _ in parts) / total
    error = math.sqrt(math.fsum(n * n * e for n, _, e in parts)) / total
    reach = NormalDist().inv_cdf(0.5 + confidence / 2) * error
    return difference, difference - reach, difference + reach, total


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    sizes=st.tuples(st.integers(1, 120), st.integers(1, 120)),
    min_active=st.integers(1, 40),
    confidence=st.floats(0.5, 0.999),
)
def test_agrees_with_a_slow_loop_in_double_precision(
    seed: int, sizes: tuple[int, int], min_active: int, confidence: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores, firings = [], []
    for size in sizes:
        score = torch.randn(size, generator=generator, dtype=torch.float64)
        undefined = torch.rand(size, generator=generator) < 0.1
        scores.append(torch.where(undefined, torch.nan, score))
        firings.append((2 ** (9 * torch.rand(size, generator=generator))).long())
    found = metrics.compare_at_equal_firing(
        result_of(scores[0], firings[0]),
        result_of(scores[1], firings[1]),
        min_active=min_active,
        confidence=confidence,
    )
    lists = [t.tolist() for pair in zip(scores, firings, strict=True) for t in pair]
    difference, low, high, total = slow(*lists, min_active, confidence)
    expected = pytest.approx((difference, low, high), abs=1e-12, nan_ok=True)
    assert (found.difference, found.low, found.high) == expected
    assert found.n_latents == total
    assert found.n_latents + found.n_left_out == int((~scores[0].isnan()).sum())


def test_a_score_that_follows_firing_alone_makes_no_difference_at_equal_firing() -> None:
    generator = torch.Generator().manual_seed(3)

    def drawn(rarity: float) -> metrics.MonosemanticityResult:
        share = torch.rand(400, generator=generator, dtype=torch.float64) ** rarity
        firing = (2 ** (4 + 5 * share)).long()
        noise = 0.02 * torch.randn(400, generator=generator, dtype=torch.float64)
        # Constant within a bin, so that nothing but the bin decides.
        octave = firing.double().log2().floor()
        return result_of(1 / octave + noise, firing)

    often, rarely = drawn(0.5), drawn(2.0)
    assert float(rarely.score.mean() - often.score.mean()) > 0.03
    found = metrics.compare_at_equal_firing(rarely, often)
    assert found.verdict == "not told apart"
    assert abs(found.difference) < 0.005


@pytest.mark.slow
def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(4)
    truth, covered, n_trials = 0.03, 0, 400
    for _ in range(n_trials):
        both = []
        for lift in (truth, 0.0):
            firing = torch.randint(16, 500, (120,), generator=generator)
            spread = 0.1 + 0.2 * (firing < 64)
            noise = spread * torch.randn(120, generator=generator, dtype=torch.float64)
            both.append(result_of(lift + noise, firing))
        found = metrics.compare_at_equal_firing(*both, confidence=0.9)
        covered += found.low < truth < found.high
    assert 0.86 < covered / n_trials < 0.94


@pytest.fixture(scope="module")
def drawn_world() -> dict[str, metrics.MonosemanticityResult]:
    """True factors of drawn images, and the same activations with their images shuffled."""
    scenes = draw(N_IMAGES, seed=5).scenes
    codes = [torch.as_tensor(factor_codes(scenes, f)[0]).double() for f in ("shape", "colour")]
    factors, embeddings = torch.cat(codes, 1), torch.cat(codes, 1)
    generator = torch.Generator().manual_seed(6)
    strength = 0.5 + torch.rand(factors.shape, generator=generator, dtype=torch.float64)
    true = factors * strength
    shuffled = torch.stack(
        [column[torch.randperm(N_IMAGES, generator=generator)] for column in true.T], 1
    )
    more = torch.cat([shuffled, shuffled.roll(7, dims=0)], 1)
    return {
        name: metrics.monosemanticity(latents, embeddings)
        for name, latents in {"true": true, "shuffled": shuffled, "more": more}.items()
    }


def test_known_factors_are_above_latents_that_fire_as_often_at_random(
    drawn_world: dict[str, metrics.MonosemanticityResult],
) -> None:
    found = metrics.compare_at_equal_firing(drawn_world["true"], drawn_world["more"])
    assert found.verdict == "above"
    assert found.difference > 0.2
    back = metrics.compare_at_equal_firing(drawn_world["more"], drawn_world["true"])
    assert back.verdict == "below"
    alike = metrics.compare_at_equal_firing(drawn_world["shuffled"], drawn_world["more"])
    assert alike.verdict == "not told apart"


def test_bins_say_which_latents_they_hold_and_add_up(
    drawn_world: dict[str, metrics.MonosemanticityResult],
) -> None:
    found = metrics.compare_at_equal_firing(drawn_world["true"], drawn_world["more"], min_active=10)
    assert [each.fewest for each in found.bins] == sorted(each.fewest for each in found.bins)
    assert sum(each.n_latents for each in found.bins) == found.n_latents
    for each in found.bins:
        assert max(10, 2 ** int(math.log2(each.most))) == each.fewest
        firing = drawn_world["true"].n_active
        inside = (firing >= each.fewest) & (firing <= each.most)
        assert int(inside.sum()) == each.n_latents
        assert float(drawn_world["true"].score[inside].mean()) == pytest.approx(each.mean)
    plain = found.to_dict()
    assert plain["bins"][0]["n_latents"] == found.bins[0].n_latents
    assert found.summary()["difference"] == found.difference


def test_without_latents_that_fire_alike_there_is_no_number() -> None:
    score = torch.linspace(0, 1, 20, dtype=torch.float64)
    rare = result_of(score, torch.full((20,), 12))
    dense = result_of(score, torch.full((20,), 500))
    found = metrics.compare_at_equal_firing(rare, dense)
    assert found.verdict == "not comparable"
    assert math.isnan(found.difference)
    assert (found.n_latents, found.n_left_out, found.bins) == (0, 20, ())
    assert found.to_dict()["difference"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"definition": "top16"},
            "definition='all' is not the control's definition='top16'.*same definition",
        ),
        ({"mean_similarity": 0.9}, "mean similarity of the latents' images is .* same embeddings"),
    ],
)
def test_results_that_do_not_compare_are_refused(changes: dict[str, object], message: str) -> None:
    score, firing = torch.rand(20, dtype=torch.float64), torch.full((20,), 12)
    with pytest.raises(ValueError, match=message):
        metrics.compare_at_equal_firing(
            result_of(score, firing), result_of(score, firing, **changes)
        )


@pytest.mark.parametrize("argument", [{"min_active": 0}, {"confidence": 1.0}, {"confidence": 95.0}])
def test_an_argument_out_of_range_is_named(argument: dict[str, float]) -> None:
    one = result_of(torch.rand(20, dtype=torch.float64), torch.full((20,), 12))
    name, value = next(iter(argument.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        metrics.compare_at_equal_firing(one, one, **argument)
