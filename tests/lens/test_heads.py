"""What heads write: ablated by their means, compared between images, named by texts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vision_plugin as vp
from tests._clip import model as model  # the fixtures
from vision_plugin.lens import (
    HeadOutputs,
    TextSpan,
    head_outputs,
    head_properties,
    mean_ablation,
)
from vision_plugin.models import VisionBridge

TEXTS = ["a red circle", "a blue square", "a green star"]


@pytest.fixture(scope="module")
def many() -> Tensor:
    return torch.randn(14, 3, 32, 32, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def read(model: VisionBridge, many: Tensor) -> HeadOutputs:
    return head_outputs(model, many, layers=2, batch_size=5)


def test_an_ablation_is_each_part_s_mean_in_its_place(model: VisionBridge, many: Tensor) -> None:
    labels = [i % 3 for i in range(14)]
    found = mean_ablation(model, many, classes=TEXTS, labels=labels, batch_size=5)
    parts = dict(model.decompose(many).parts())
    whole = sum(parts.values())
    texts = model.encode_text(TEXTS)
    rows = {row.name: row for row in found.rows}

    def expected(replaced: list[str]) -> tuple[float, float, float]:
        left = sum(
            part.mean(0).expand_as(part) if name in replaced else part
            for name, part in parts.items()
        )
        cosine = torch.nn.functional.cosine_similarity(left, whole).mean()
        seen, before = (left @ texts.T).argmax(1), (whole @ texts.T).argmax(1)
        own = torch.tensor(labels)
        return (
            float(cosine),
            float((seen == before).float().mean()),
            float((seen == own).float().mean()),
        )

    heads = {layer: [f"head {layer}.{h}" for h in range(4)] for layer in range(3)}
    mlps = [f"mlp {layer}" for layer in range(3)]
    cases: dict[str, list[str]] = {
        "nothing": [],
        "all MLPs": mlps,
        "all attention": [*heads[0], *heads[1], *heads[2]],
        "everything but attention": ["embed", *mlps],
        "attention of layer 1": heads[1],
        "MLP of layer 2": ["mlp 2"],
        "attention below layer 2": heads[0] + heads[1],
        "all but the attention of the last 1": ["embed", *mlps, *heads[0], *heads[1]],
        "head 2.3": ["head 2.3"],
    }
    for name, replaced in cases.items():
        row = rows[name]
        assert (row.cosine, row.agreement, row.accuracy) == pytest.approx(
            expected(replaced), abs=1e-5
        ), name
    assert rows["nothing"].cosine == pytest.approx(1)
    assert len(found.of("head")) == 12
    worst = found.heads(12)
    scores = [rows[f"head {layer}.{head}"].accuracy for layer, head in worst]
    assert scores == sorted(scores)
    assert found.table().row_count == len(found.rows) - 12
    assert found.plot().axes
    assert found.to_dict()["n_images"] == 14


def test_an_ablation_without_texts_compares_embeddings_alone(
    model: VisionBridge, many: Tensor
) -> None:
    found = mean_ablation(model, many, batch_size=14)
    assert {row.agreement for row in found.rows} == {None}
    assert found.plot().axes
    with pytest.raises(ValueError, match="3 classes of 14 images"):
        mean_ablation(model, many, classes=TEXTS, labels=[0, 1, 2])
    with pytest.raises(ValueError, match="classes= holds no text"):
        mean_ablation(model, many, classes=[])


def test_nearest_images_and_texts_are_those_of_a_loop(
    model: VisionBridge, many: Tensor, read: HeadOutputs
) -> None:
    parts = dict(model.decompose(many).parts())
    for heads in ([(2, 1)], [(1, 0), (2, 1), (2, 3)]):
        values = sum(parts[f"head {layer}.{head}"] for layer, head in heads)
        torch.testing.assert_close(read.of(*heads), values, atol=1e-5, rtol=1e-4)
        moved = values - values.mean(0)
        scores = [
            float(torch.nn.functional.cosine_similarity(moved[3], moved[i], dim=0))
            for i in range(14)
        ]
        order = sorted((i for i in range(14) if i != 3), key=lambda i: -scores[i])
        near = read.nearest_images(3, *heads, k=5)
        assert list(near.places) == order[:5]
        assert list(near.scores) == pytest.approx([scores[i] for i in order[:5]], abs=1e-5)
        assert near.names == tuple(str(i) for i in order[:5])
        texts = model.encode_text(TEXTS)
        texts = texts - texts.mean(0)
        scores = [
            float(torch.nn.functional.cosine_similarity(moved[3], text, dim=0)) for text in texts
        ]
        named = read.nearest_texts(3, *heads, texts=TEXTS)
        assert list(named.scores) == pytest.approx(sorted(scores, reverse=True), abs=1e-5)


def test_heads_of_a_demo_model_are_named_by_factors() -> None:
    model = vp.load_model("demo")
    world = vp.demo.draw(160, seed=21)
    pixels = model.preprocess(list(world.images))
    concepts = [c for c in vp.demo.concept_vocabulary() if c.factor != "word"]
    outputs = head_outputs(model, pixels, layers=2)
    spans = outputs.textspan([concept.text for concept in concepts])
    for span in spans.values():
        assert span.explained.tolist() == sorted(span.explained.tolist())
    found = head_properties(spans, {concept.text: concept.factor for concept in concepts})
    summary = found.summary()
    assert summary["consistency"] > summary["chance"]
    assert 0 <= summary["disentanglement"] <= 1
    assert found.table().row_count == 8


def span(*texts: str) -> TextSpan:
    n = len(texts)
    return TextSpan(texts, torch.arange(n), torch.ones(n), torch.zeros(n, 4), torch.zeros(4))


def test_scores_of_heads_are_counted_out() -> None:
    factors = {"red": "colour", "blue": "colour", "star": "shape", "moon": "shape", "big": "size"}
    spans: dict[Any, TextSpan] = {
        (0, 0): span("red", "blue", "star"),
        (0, 1): span("red", "blue"),
        (1, 0): span("moon", "big"),
    }
    found = head_properties(spans, factors)
    assert found.property == {(0, 0): "colour", (0, 1): "colour", (1, 0): "shape"}
    assert found.consistency == pytest.approx({(0, 0): 2 / 3, (0, 1): 1.0, (1, 0): 0.5})
    # overlaps: 2 of 3 texts between the first two, none with the third
    expected = {(0, 0): 1 - (2 / 3) / 2, (0, 1): 1 - (2 / 3) / 2, (1, 0): 1.0}
    assert found.disentanglement == pytest.approx(expected)
    assert found.heads_of("colour") == [(0, 1), (0, 0)]
    assert found.heads_of("colour", at_least=0.9) == [(0, 1)]
    assert 0.3 < found.chance < 1
    with pytest.raises(ValueError, match="says nothing about the text 'cat'"):
        head_properties({(0, 0): span("cat")}, factors)
    with pytest.raises(ValueError, match="no head with texts"):
        head_properties({(0, 0): span()}, factors)


def test_a_head_or_image_that_does_not_exist_is_refused(
    model: VisionBridge, many: Tensor, read: HeadOutputs
) -> None:
    with pytest.raises(ValueError, match=r"no head 3\.0: its layers are 0 to 2 and the heads of "):
        head_outputs(model, many, heads=[(3, 0)])
    with pytest.raises(ValueError, match=r"head 0\.0 was not read"):
        read.of((0, 0))
    with pytest.raises(ValueError, match="image=14 is not one of the 14"):
        read.nearest_images(14, (2, 0))
    with pytest.raises(ValueError, match="no head is named"):
        read.of()
