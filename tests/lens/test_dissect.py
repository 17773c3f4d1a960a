"""CLIP-Dissect's soft-WPMI against its formula as float64 loops, and average precision."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from torch import Tensor
from torch.nn import functional as F

from vision_plugin.lens import DissectSettings, average_precision, dissect


def unit(rows: int, width: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)))


def sparse_latents(n: int, k: int, share: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(n, k, generator=generator)
    return values * (torch.rand(n, k, generator=generator) < share)


def looped(
    latents: Tensor,
    images: Tensor,
    texts: Tensor,
    settings: DissectSettings,
    *,
    as_published: bool = False,
) -> list[list[float]]:
    """soft-WPMI, a latent, an image and a word at a time.

    As published, all top images count and terms are ``log(1 + p (P - 1) + 1e-7)``. Else images on
    which the latent does not fire say nothing, and each term is relative to its value at ``P = 0``.
    """
    n, d_sae = latents.shape
    chances = []
    for image in images.double().tolist():
        logits = [
            settings.sharpness * sum(a * b for a, b in zip(image, text, strict=True))
            for text in texts.double().tolist()
        ]
        total = sum(map(math.exp, logits))
        chances.append([math.exp(value) / total for value in logits])
    scores = [[0.0] * len(texts) for _ in range(d_sae)]
    for latent in range(d_sae):
        column = latents[:, latent].tolist()
        order = sorted(range(n), key=lambda i: (-column[i], i))[: settings.n_images]
        for rank, image in enumerate(order):
            if column[image] <= 0 and not as_published:
                break
            p = settings.first - rank / settings.n_images * (settings.first - settings.last)
            for word in range(len(texts)):
                term = math.log(1 + p * (chances[image][word] - 1) + 1e-7)
                scores[latent][word] += term - (0 if as_published else math.log(1 - p + 1e-7))
    for word in range(len(texts)):
        mean = sum(math.exp(scores[latent][word]) for latent in range(d_sae)) / d_sae
        for latent in range(d_sae):
            scores[latent][word] -= settings.weight * math.log(mean)
    return scores


def every_score(latents: Tensor, images: Tensor, texts: Tensor, options: DissectSettings) -> Tensor:
    """All scores as ``[d_sae, words]``, in the order of the words."""
    found = dissect(latents, images, texts, n_words=len(texts), settings=options)
    return torch.zeros(found.scores.shape).scatter(1, found.words, found.scores)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(3, 25),
    k=st.integers(1, 9),
    words=st.integers(1, 12),
    n_images=st.integers(1, 30),
    share=st.sampled_from((0.2, 0.6, 1.0)),
)
def test_soft_wpmi_is_the_formula(
    seed: int, n: int, k: int, words: int, n_images: int, share: float
) -> None:
    images, texts = unit(n, 5, seed), unit(words, 5, seed + 1)
    latents = sparse_latents(n, k, share, seed + 2)
    options = DissectSettings(n_images=n_images, weight=0.7)
    expected = torch.tensor(looped(latents, images, texts, options), dtype=torch.float64)
    fires = (latents > 0).any(0)
    for given_as in (latents, latents.to_sparse(), latents.to_sparse_csr()):
        found = dissect(given_as, images, texts, n_words=words, settings=options)
        assert bool((found.words[~fires] == -1).all() and found.scores[~fires].isnan().all())
        chosen = expected[fires].gather(1, found.words[fires])
        torch.testing.assert_close(found.scores[fires].double(), chosen, atol=2e-4, rtol=1e-4)
        best = expected[fires].max(1).values
        torch.testing.assert_close(chosen[:, 0], best, atol=2e-4, rtol=1e-4)


def test_where_every_latent_has_enough_images_it_is_the_published_formula() -> None:
    images, texts = unit(40, 6, 0), unit(11, 6, 1)
    latents = torch.rand(40, 7, generator=torch.Generator().manual_seed(2)) + 0.01
    options = DissectSettings(n_images=30)
    scores = looped(latents, images, texts, options, as_published=True)
    expected = torch.tensor(scores, dtype=torch.float64)
    found = every_score(latents, images, texts, options)
    torch.testing.assert_close(found.double(), expected, atol=2e-4, rtol=1e-4)


def test_blocks_of_words_and_of_latents_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from vision_plugin.lens import _dissect

    images, texts = unit(50, 6, 0), unit(37, 6, 1)
    latents = sparse_latents(50, 23, 0.4, 2)
    whole = dissect(latents, images, texts, n_words=3)
    monkeypatch.setattr(_dissect, "_BLOCK_BYTES", 4 * 51 * 5)
    monkeypatch.setattr(_dissect, "_CHUNK_ELEMENTS", 4 * 5)
    seen: list[int] = []
    parts = dissect(latents, images, texts, n_words=3, watch=seen.append)
    assert len(seen) > 5
    assert sum(seen) == 37
    assert torch.equal(whole.words, parts.words)
    torch.testing.assert_close(whole.scores, parts.scores, atol=1e-5, rtol=1e-5)


def test_a_latent_of_a_word_gets_that_word() -> None:
    texts = torch.eye(8)
    about = torch.arange(400) % 8
    images = F.normalize(texts[about] + 0.3 * unit(400, 8, 3), dim=1)
    latents = F.one_hot(about, 8).float() * torch.rand(400, 1)
    found = dissect(latents, images, texts)
    assert found.words.flatten().tolist() == list(range(8))


def test_images_and_words_of_two_models_are_refused() -> None:
    latents = torch.ones(4, 2)
    with pytest.raises(ValueError, match="of two models"):
        dissect(latents, unit(4, 5, 0), unit(3, 6, 0))
    with pytest.raises(ValueError, match="at least one word"):
        dissect(latents, unit(4, 5, 0), torch.empty(0, 5))
    with pytest.raises(ValueError, match="of the same images"):
        dissect(latents, unit(5, 5, 0), unit(3, 5, 0))
    with pytest.raises(ValueError, match="probabilities"):
        DissectSettings(first=0.9, last=0.95)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(2, 40),
    k=st.integers(1, 6),
    n_labels=st.integers(1, 5),
    ties=st.booleans(),
)
def test_average_precision_is_scikit_learns(
    seed: int, n: int, k: int, n_labels: int, ties: bool
) -> None:
    latents = sparse_latents(n, k, 0.6, seed)
    if ties:
        latents = (latents * 3).round() / 3
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, n_labels, (n,), generator=generator)
    found = average_precision(latents.to_sparse(), labels, n_labels)
    for label in range(n_labels):
        truth = (labels == label).numpy()
        if not truth.any():
            assert bool(found[:, label].isnan().all())
            continue
        for latent in range(k):
            expected = average_precision_score(truth, latents[:, latent].numpy())
            assert found[latent, label].item() == pytest.approx(expected, abs=1e-9)
