"""Our metrics under what torchmetrics does to metrics: wrappers, plots, types, and no data."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torchmetrics import BootStrapper, MetricCollection, MetricTracker

from tests.metrics._cases import CASES, Case, N, assert_same
from vision_plugin import metrics
from vision_plugin.metrics import StreamingMetric

cases = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))


def _main(result: Any) -> float:
    """The number that the metric's ``higher_is_better`` is about, looked up by hand."""
    name = "fvu" if "fvu" in result.summary() else (result.headline or list(result.summary()))[0]
    return float(result.summary()[name])


@cases
def test_no_data_is_one_and_the_same_error(case: Case) -> None:
    metric = case.build()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=f"{type(metric).__name__} has seen no data: call"):
            metric.compute()
    case.feed(metric, slice(0, N))
    expected = case.result(metric)
    metric.reset()
    with pytest.raises(ValueError, match="has seen no data"):
        metric.compute()
    case.feed(metric, slice(0, N))
    assert_same(case.result(metric), expected)


@cases
def test_merged_and_loaded_states_are_data(case: Case) -> None:
    fed, merged, loaded = case.build(), case.build(), case.build()
    for metric in (fed, loaded):
        metric.persistent(True)
    case.feed(fed, slice(0, N))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged.merge_state(fed.metric_state)
        assert_same(case.result(merged), case.result(fed))
        loaded.load_state_dict(fed.state_dict())
        assert_same(case.result(loaded), case.result(fed))


@cases
def test_half_precision_changes_no_result(case: Case) -> None:
    plain, half = case.build(), case.build()
    half.set_dtype(torch.float16)
    for metric in (plain, half):
        case.feed(metric, slice(0, N))
    half.set_dtype(torch.float16)
    MetricCollection({"one": half}).set_dtype(torch.float16)
    assert_same(case.result(half), case.result(plain))


def test_counts_go_on_above_the_largest_half() -> None:
    metric = metrics.Sparsity(n_features=2)
    metric.set_dtype(torch.half)
    for _ in range(3):
        metric.update(torch.ones(30_000, 2))
    result = metric.compute()
    assert result.summary()["n_tokens"] == 90_000
    assert result.l0 == 2


@cases
def test_a_tracker_finds_the_best(case: Case) -> None:
    higher = case.build().higher_is_better
    tracker = MetricTracker(case.build(), maximize=higher is not False)
    expected = []
    for rows in (slice(0, N), slice(0, N, 2), slice(0, N)):
        tracker.increment()
        metric = tracker[-1]
        assert isinstance(metric, StreamingMetric)
        case.feed(metric, rows)
        expected.append(_main(metric.compute()))
    everything = tracker.compute_all()
    wanted = torch.tensor(expected).double()
    torch.testing.assert_close(everything.double(), wanted, equal_nan=True)
    if any(map(math.isnan, expected)):
        return
    best = min if higher is False else max
    value, step = tracker.best_metric(return_step=True)
    assert value == pytest.approx(best(expected))
    assert expected[step] == pytest.approx(best(expected))


def test_a_bootstrap_has_the_spread_of_the_main_number() -> None:
    generator = torch.Generator().manual_seed(0)
    latents = (torch.rand(400, 5, generator=generator) < 0.3).double()
    torch.manual_seed(0)
    bootstrap = BootStrapper(metrics.Sparsity(n_features=5), num_bootstraps=200, raw=True)
    bootstrap.update(latents)
    found = bootstrap.compute()
    per_row = latents.sum(1)
    assert found["raw"].shape == (200,)
    assert float(found["mean"]) == pytest.approx(float(per_row.mean()), abs=0.02)
    # Of a mean, the bootstrap's spread is the standard error.
    assert float(found["std"]) == pytest.approx(float(per_row.std()) / 400**0.5, rel=0.2)


@cases
def test_a_plot_shows_the_numbers_of_the_table(case: Case) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    metric = case.build()
    case.feed(metric, slice(0, N))
    result = metric.compute()
    numbers = metrics.headline_of(result)
    for value, n_points in ((None, 1), (result, 1), ([result, result, result], 3)):
        figure, axes = metric.plot(value)
        lines = {line.get_label(): line.get_ydata() for line in axes.get_lines()}
        for name, number in numbers.items():
            drawn = torch.as_tensor([float(v) for v in lines[name]])
            expected = torch.full((n_points,), float(number))
            torch.testing.assert_close(drawn, expected, equal_nan=True)
        pyplot.close(figure)


def test_results_stack_by_their_main_number_and_do_nothing_else() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    metric = metrics.FVU(d_in=4, definition="per_dimension")
    metric.update(x, 0.5 * x)
    result = metric.compute()
    assert not metric.higher_is_better
    assert torch.stack([result, result]).tolist() == pytest.approx([result.fvu] * 2)
    with pytest.raises(TypeError):
        torch.cat([result, result])
