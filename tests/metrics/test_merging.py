"""Shards of any size, merged in any order or grouping, give what one pass gives."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.metrics._cases import CASES, IN_ORDER, Case, N, assert_same
from vision_plugin import metrics


def whole(case: Case) -> Any:
    metric = case.build()
    case.feed(metric, slice(0, N))
    return case.result(metric)


@pytest.mark.parametrize("name", CASES)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_any_split_merged_in_any_way_is_one_pass(name: str, data: st.DataObject) -> None:
    case = CASES[name]
    cuts = sorted(data.draw(st.lists(st.integers(0, N), min_size=1, max_size=3), label="cuts"))
    parts = []
    for start, stop in itertools.pairwise([0, *cuts, N]):
        part = case.build()
        case.feed(part, slice(start, stop))
        parts.append(part)
    if case.registered not in IN_ORDER:
        parts = data.draw(st.permutations(parts), label="order")
    while len(parts) > 1:
        at = data.draw(st.integers(0, len(parts) - 2), label="merge at")
        parts[at].merge_state(parts.pop(at + 1))
    assert_same(case.result(parts[0]), whole(case))


def test_every_metric_of_ours_is_among_the_cases() -> None:
    ours = {n for n, i in metrics.available().items() if i.package.startswith("vision-plugin ")}
    assert {case.registered for case in CASES.values()} == ours


@pytest.mark.parametrize("name", CASES)
def test_only_the_same_class_merges(name: str) -> None:
    other = "fvu" if name != "fvu" else "sparsity"
    with pytest.raises(ValueError, match="cannot merge"):
        CASES[name].build().merge_state(CASES[other].build())
