"""TEXTSPAN against the algorithm as the paper prints it, and what must hold of any outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vision_plugin.lens import textspan


def by_loop(outputs: Tensor, texts: Tensor, n_texts: int) -> tuple[list[int], list[float]]:
    """Algorithm 1 step by step: no covariance, no coordinates, one text at a time."""
    a = outputs.double().clone()
    _, singular, rows = torch.linalg.svd(a, full_matrices=False)
    rows = rows[singular > 1e-6 * singular[0]]
    t = texts.double() @ rows.T @ rows
    a = a - a.mean(0)
    total = float(a.square().sum())
    chosen, explained = [], []
    for _ in range(n_texts):
        deviations = [float((a @ text).std(unbiased=False)) for text in t]
        for place in chosen:
            deviations[place] = -1.0
        best = max(range(len(t)), key=deviations.__getitem__)
        chosen.append(best)
        own = t[best].clone()
        for row in range(len(a)):
            a[row] -= (a[row] @ own) / (own @ own) * own
        for row in range(len(t)):
            t[row] -= (t[row] @ own) / (own @ own) * own
        explained.append(1 - float(a.square().sum()) / total)
    return chosen, explained


def made(seed: int, n: int, d: int, v: int, rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(n, rank, generator=generator) @ torch.randn(rank, d, generator=generator)
    return outputs, torch.randn(v, d, generator=generator)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(6, 30),
    d=st.integers(2, 12),
    v=st.integers(1, 20),
    rank=st.integers(1, 6),
)
def test_it_is_the_printed_algorithm(seed: int, n: int, d: int, v: int, rank: int) -> None:
    outputs, texts = made(seed, n, d, v, rank)
    wanted = min(v, rank, d, n - 1)
    found = textspan(outputs, texts, [str(i) for i in range(v)], n_texts=wanted)
    chosen, explained = by_loop(outputs, texts, len(found.texts))
    assert found.chosen.tolist() == chosen
    assert found.explained.tolist() == pytest.approx(explained, abs=1e-6)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), rank=st.integers(1, 6), extra=st.integers(0, 10))
def test_what_is_left_falls_and_texts_that_span_leave_nothing(
    seed: int, rank: int, extra: int
) -> None:
    outputs, texts = made(seed, 40, 12, rank + extra, rank)
    found = textspan(outputs, texts, [str(i) for i in range(len(texts))], n_texts=len(texts))
    explained = found.explained.tolist()
    assert explained == sorted(explained)
    assert explained[-1] == pytest.approx(1, abs=1e-8)
    assert len(explained) <= rank
    torch.testing.assert_close(
        found.project(outputs.double()), outputs.double(), atol=1e-6, rtol=1e-6
    )
    basis = found.basis
    torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)).double())


def test_a_planted_text_comes_first() -> None:
    outputs, texts = made(3, 50, 12, 8, 3)
    outputs = outputs * 0.1 + torch.linspace(-1, 1, 50)[:, None] * texts[5]
    found = textspan(outputs, texts, list("abcdefgh"), n_texts=3)
    assert found.texts[0] == "f"
    assert found.explained[0] > 0.8
    assert found.table().row_count == 3


def test_outputs_that_never_vary_have_no_texts() -> None:
    found = textspan(torch.ones(5, 4), torch.randn(6, 4), list("abcdef"))
    assert found.texts == ()
    assert found.to_dict() == {"texts": [], "explained": []}


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="names= holds 1 texts and texts= 2"):
        textspan(torch.ones(5, 4), torch.ones(2, 4), ["a"])
    with pytest.raises(ValueError, match="the same model"):
        textspan(torch.ones(5, 4), torch.ones(1, 3), ["a"])
    with pytest.raises(ValueError, match="at least one output"):
        textspan(torch.ones(0, 4), torch.ones(1, 4), ["a"])
    with pytest.raises(ValueError, match="n_texts=0"):
        textspan(torch.ones(5, 4), torch.ones(1, 4), ["a"], n_texts=0)
