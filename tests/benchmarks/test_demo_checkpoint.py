"""The parts of the training that can be wrong without anybody noticing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks.demo_checkpoint._muon import Muon, orthogonalize
from benchmarks.demo_checkpoint._tokenizer import build_tokenizer
from vision_plugin.demo import concept_vocabulary, draw
from vision_plugin.demo._pixels import draw_pixels


@settings(max_examples=20, deadline=None)
@given(
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    seed=st.integers(0, 1000),
)
def test_orthogonalize_keeps_directions_and_levels_singular_values(
    rows: int, columns: int, seed: int
) -> None:
    random = np.random.default_rng(seed)
    left, _ = np.linalg.qr(random.normal(size=(rows, min(rows, columns))))
    right, _ = np.linalg.qr(random.normal(size=(columns, min(rows, columns))))
    values = random.uniform(0.3, 3.0, min(rows, columns))
    matrix = torch.from_numpy(left * values @ right.T)[None]
    levelled = left.T @ orthogonalize(matrix)[0].numpy() @ right
    assert np.abs(levelled - np.diag(np.diag(levelled))).max() < 1e-9
    assert np.diag(levelled).min() > 0.6
    assert np.diag(levelled).max() < 1.3


def test_muon_finds_the_minimum_of_a_badly_scaled_problem() -> None:
    torch.manual_seed(0)
    goal, scales = torch.randn(8, 6), torch.logspace(0, 2, 6)
    weight = torch.nn.Parameter(torch.zeros(8, 6))
    muon = Muon([weight], lr=0.1, weight_decay=0.0)
    for step in range(300):
        weight.grad = None
        ((weight - goal) * scales).square().sum().backward()
        muon.step(1 - step / 300)
    assert (weight - goal).abs().max() < 0.1


@pytest.mark.slow
def test_pixels_drawn_in_parallel_are_the_shrunken_images() -> None:
    world = draw(501, seed=0, words=0.5)
    pixels = draw_pixels(world.scenes, 64, workers=2)
    assert pixels.shape == (501, 64, 64, 3)
    for index in (0, 250, 500):
        small = world.images[index].resize((64, 64), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(pixels[index], np.asarray(small))


def test_the_tokenizer_is_the_same_each_time_it_is_learned() -> None:
    words = [concept.text for concept in concept_vocabulary()]
    first, *others = (build_tokenizer(words, max_length=16) for _ in range(8))
    for other in others:
        assert other.get_vocab() == first.get_vocab()
        assert other.backend_tokenizer.to_str() == first.backend_tokenizer.to_str()


@pytest.mark.parametrize("text", ["a red star", "starry", "日本", "100% ♥", ""])
def test_the_tokenizer_loses_nothing(text: str) -> None:
    tokenizer = build_tokenizer(["a red star"], max_length=16)
    tokens = tokenizer(text)["input_ids"]
    assert tokens[0] == tokenizer.bos_token_id
    assert tokens.count(tokenizer.eos_token_id) == 1
    restored = tokenizer.decode(tokens, skip_special_tokens=True)
    assert restored.replace(" ", "") == text.replace(" ", "")
