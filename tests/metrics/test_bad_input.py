"""NaN, infinity, images that do not match, and nothing at all, for every metric of the registry."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.metrics._cases import CASES, N, images
from vision_plugin import metrics

DATA = [
    (name, entry)
    for name, case in CASES.items()
    for entry in metrics.takes(case.registered)[1]
    if entry in images()
]
EXTRA = {"cross_domain": {"domain": "far"}}


def batch_for(name: str) -> dict[str, Any]:
    registered = CASES[name].registered
    taken = metrics.takes(registered)[1]
    batch: dict[str, Any] = {entry: images()[entry] for entry in taken if entry in images()}
    if registered == "stability":
        batch = {entry: value[0] for entry, value in batch.items()}
    return batch | EXTRA.get(registered, {})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("name", "entry"), [d for d in DATA if d[1] not in ("labels", "masks")])
def test_nan_and_infinity_are_refused_and_leave_no_trace(name: str, entry: str, bad: float) -> None:
    batch = batch_for(name)
    spoilt = batch[entry].clone()
    spoilt.view(-1)[3] = bad
    metric = CASES[name].build()
    with pytest.raises(ValueError, match="NaN or infin"):
        metrics.feed(metric, batch | {entry: spoilt})
    for state in metric.metric_state.values():
        states = state if isinstance(state, list) else [state]
        assert all(not bool(part.isnan().any()) for part in states if part.is_floating_point())


# Two dictionaries may differ in size; that their widths may not is tested with stability.
TOGETHER = [
    (name, entry)
    for name, entry in DATA
    if name != "stability" and len(metrics.takes(CASES[name].registered)[1]) > 1
]


@pytest.mark.parametrize(("name", "entry"), TOGETHER)
def test_entries_for_other_images_are_refused(name: str, entry: str) -> None:
    batch = batch_for(name)
    with pytest.raises(ValueError, match=r"\d"):
        metrics.feed(CASES[name].build(), batch | {entry: batch[entry][: N - 1]})


@pytest.mark.parametrize("name", ["monosemanticity", "monosemanticity top16"])
def test_one_image_is_no_pair(name: str) -> None:
    metric = CASES[name].build()
    CASES[name].feed(metric, slice(0, 1))
    with pytest.raises(ValueError, match="compares pairs of images, and there are 1"):
        metric.compute()


def test_summaries_of_what_other_packages_return() -> None:
    assert metrics.summary_of(torch.tensor(2.5)) == {"value": 2.5}
    assert metrics.summary_of({"a": torch.tensor(1.0), "b": 2, "c": "text"}) == {"a": 1.0, "b": 2}
    scores = metrics.summary_of(torch.tensor([1.0, math.nan, 3.0]))
    assert scores == {"mean_score": 2.0, "n_undefined": 1}
    with pytest.raises(TypeError, match="no number"):
        metrics.summary_of("text")
