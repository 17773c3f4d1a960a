"""Codes over words are the Lasso's, by two solvers, and editing changes what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import vision_plugin as vp
from vision_plugin.demo import COLOURS, SHAPES
from vision_plugin.lens import Splice, SpliceSettings, WordDictionary, sparse_codes, splice


def problem(seed: int, n: int, v: int, d: int, alike: float = 0.0) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randn(v, d, generator=generator, dtype=torch.float64)
    words = words + alike * words[:1]
    targets = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return nn.functional.normalize(targets, dim=1), nn.functional.normalize(words, dim=1)


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 4),
    v=st.integers(1, 40),
    d=st.integers(6, 24),
    l1=st.sampled_from([0.05, 0.2, 0.5]),
    alike=st.sampled_from([0.0, 0.7]),
)
def test_the_solvers_agree_and_meet_the_optimality_conditions(
    seed: int, n: int, v: int, d: int, l1: float, alike: float
) -> None:
    targets, words = problem(seed, n, v, d, alike)

    def loss(w: torch.Tensor) -> torch.Tensor:
        return ((w @ words - targets) ** 2).sum(1) + l1 * w.sum(1)

    ours = sparse_codes(targets, words, l1, max_steps=20_000)
    peer = sparse_codes(targets, words, l1, solver="sklearn")
    for found, near in ((ours, 2e-6), (peer, 1e-3)):
        assert bool((found >= 0).all())
        for target, w in zip(targets, found, strict=True):  # the conditions, word by word
            for row, weight in zip(words, w, strict=True):
                slope = 2 * float(row @ (w @ words - target)) + l1
                assert slope > -near
                assert weight == 0 or abs(slope) < near
    # The loss has one smallest value, and the composed vector is unique where the weights are not.
    torch.testing.assert_close(loss(ours), loss(peer), atol=1e-6, rtol=0)
    torch.testing.assert_close(ours @ words, peer @ words, atol=1e-3, rtol=0)


def test_words_that_are_alike_are_solved_exactly() -> None:
    """A space whose directions matter less and less, as of real words, is slow for gradients."""
    scale = torch.arange(1, 49).double() ** -1.5
    targets, words = (
        nn.functional.normalize(rows * scale, dim=1) for rows in problem(0, 6, 300, 48)
    )
    found = sparse_codes(targets, words, 0.05)  # settles, or the warning is an error here
    peer = sparse_codes(targets, words, 0.05, solver="sklearn")
    assert 2 < float((found > 0).sum(1).double().mean()) < 48
    gradient = 2 * (found @ words - targets) @ words.T + 0.05
    assert float(gradient.min()) > -1e-6
    assert float(gradient[found > 0].abs().max()) < 1e-6
    torch.testing.assert_close(found, peer, atol=1e-5, rtol=0)


def test_one_word_alone_has_the_weight_of_the_formula() -> None:
    word = torch.tensor([[0.6, 0.8]], dtype=torch.float64)
    targets = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    found = sparse_codes(targets, word, 0.4)
    expected = (targets @ word[0] - 0.2).clamp(min=0)
    torch.testing.assert_close(found[:, 0], expected, atol=1e-6, rtol=0)


def test_what_cannot_be_solved_is_refused_and_what_does_not_settle_is_told() -> None:
    targets, words = problem(0, 2, 30, 8, alike=2.0)
    with pytest.warns(UserWarning, match="2 of 2 codes have not settled after 2 steps"):
        sparse_codes(targets, words, 0.01, max_steps=2)
    with pytest.raises(ValueError, match="need the same width"):
        sparse_codes(targets, words[:, :5], 0.1)
    with pytest.raises(ValueError, match=r"l1=0\.0 must be above 0"):
        sparse_codes(targets, words, 0.0)
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        sparse_codes(targets * torch.nan, words, 0.1)


@pytest.fixture(scope="module")
def model() -> Any:
    return vp.load_model("demo")


WORDS = [*SHAPES, *COLOURS, "night", "grass", "sand", "water", "bricks", "paper"]


@pytest.fixture(scope="module")
def result(model: Any) -> Splice:
    cfg = SpliceSettings(
        l1=(0.05, 0.2, 0.5), chosen=0.2, labels="column:colour", template="a {} object"
    )
    return splice(model, vp.open_images("demo:200"), WORDS, settings=cfg, progress=False)


def test_images_are_centred_as_the_paper_does(model: Any, result: Splice) -> None:
    images = vp.open_images("demo:200")
    with torch.no_grad():
        plain = model.encode_image(model.preprocess([images[i] for i in range(200)])).double()
    texts = model.encode_text([f"a {word} object" for word in WORDS]).double()
    mean = plain.mean(0)
    targets = nn.functional.normalize(plain - mean, dim=1)
    rows = nn.functional.normalize(texts - texts.mean(0), dim=1)
    torch.testing.assert_close(result.words.centred, rows, atol=1e-5, rtol=0)
    codes = sparse_codes(targets, rows, 0.2, solver="sklearn")
    torch.testing.assert_close(codes @ rows, result.codes @ rows, atol=1e-4, rtol=0)
    composed = nn.functional.normalize(nn.functional.normalize(codes @ rows, dim=1) + mean, dim=1)
    torch.testing.assert_close(result.compose(), composed, atol=1e-4, rtol=0)
    point = next(p for p in result.curve if (p.dictionary, p.l1) == ("words", 0.2))
    cosine = nn.functional.cosine_similarity(codes @ rows, targets, dim=1).mean()
    assert point.cosine.value == pytest.approx(float(cosine), abs=1e-4)
    assert point.l0.value == pytest.approx(float((codes > 1e-9).sum(1).double().mean()), abs=0.05)


def test_the_curve_rises_with_the_words_and_words_say_what_is_shown(result: Splice) -> None:
    words = [p for p in result.curve if p.dictionary == "words"]
    assert [p.l1 for p in words] == sorted(p.l1 for p in words)
    assert [p.l0.value for p in words] == sorted((p.l0.value for p in words), reverse=True)
    assert [p.cosine.value for p in words] == sorted((p.cosine.value for p in words), reverse=True)
    assert {p.dictionary for p in result.curve} == {"words", "random"}
    colours = vp.open_images("demo:200").column("colour")
    top = [
        next((word for word, _ in result.words_of(place) if word in COLOURS), None)
        for place in range(200)
    ]
    assert np.mean([a == b for a, b in zip(top, colours, strict=True)]) > 0.8


def test_removing_words_takes_their_classes_away_and_leaves_the_others(result: Splice) -> None:
    edit = result.without(["red", "pink"])
    columns = [WORDS.index("red"), WORDS.index("pink")]
    had = (result.codes[:, columns] > 0).any(1)
    assert edit.images == had.nonzero()[:, 0].tolist()
    kept = (~had).nonzero()[:, 0]
    torch.testing.assert_close(edit.embeddings[kept], result.compose()[kept], atol=0, rtol=0)
    assert edit.before is not None
    assert edit.after is not None
    assert edit.after.value < edit.before.value - 0.2
    with pytest.raises(ValueError, match="the vocabulary has no 'mauve'"):
        result.without(["mauve"])
    with pytest.raises(ValueError, match="at least one word"):
        result.without([])


def test_the_folder_holds_the_result(result: Splice, tmp_path: Path) -> None:
    place = result.save(tmp_path / "words", edits=[result.without(["red"])])
    assert sorted(p.name for p in place.iterdir()) == ["curve.png", "results.json", "table.txt"]
    content = json.loads((place / "results.json").read_text())
    assert content["schema"] == "vision_plugin.lens/splice/1"
    assert len(content["curve"]) == 6
    assert content["edits"][0]["words"] == ["red"]
    assert "random" in (place / "table.txt").read_text()


def test_bad_vocabularies_are_one_sentence(model: Any, tiny_clip: str, tmp_path: Path) -> None:
    images = vp.open_images("demo:4")
    with pytest.raises(ValueError, match="the vocabulary is empty: give at least one word"):
        splice(model, images, [], progress=False)
    empty = tmp_path / "words.txt"
    empty.write_text("\n  \n")
    with pytest.raises(ValueError, match="the vocabulary is empty"):
        splice(model, images, empty, progress=False)
    with pytest.raises(FileNotFoundError, match="there is no such file; give one word a line"):
        splice(model, images, tmp_path / "none.txt", progress=False)
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        splice(model, images, tmp_path / "bytes.txt", progress=False)
    other = WordDictionary.of(vp.load_model(tiny_clip), ["red", "blue"])
    with pytest.raises(ValueError, match=r"the vocabulary was embedded by .* another text space"):
        splice(model, images, other, progress=False)
    with pytest.raises(ValueError, match="has no text tower, and words need one"):
        splice(vp.load_vlm("demo").vision, images, ["red"], progress=False)


def test_one_image_and_one_word_have_nothing_to_be_centred_by(model: Any) -> None:
    found = splice(
        model,
        vp.open_images("demo:1"),
        ["red"],
        settings=SpliceSettings(l1=(0.01,), chosen=0.01),
        progress=False,
    )
    assert bool(found.codes.isfinite().all())
    assert found.words_of(0)[0][0] == "red"
