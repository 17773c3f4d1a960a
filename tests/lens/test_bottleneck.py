"""A concept bottleneck is the head it says, its explanations add up, and planted concepts show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import vision_plugin as vp
from vision_plugin.demo import COLOURS
from vision_plugin.lens import BottleneckSettings, ConceptBottleneck, FeatureNames, NameCandidates
from vision_plugin.metrics import ControlDictionary, neuron_dictionary

HOOK = "blocks.3.hook_resid_post"
QUICK = BottleneckSettings(
    labels="column:colour", l1=(1.0,), learning_rates=(0.05,), epochs=150, template="a {} object"
)
N = 360


@pytest.fixture(scope="module")
def model() -> Any:
    return vp.load_model("demo")


@pytest.fixture(scope="module")
def images() -> Any:
    return vp.open_images(f"demo:{N}")


@pytest.fixture(scope="module")
def planted(model: Any, images: Any) -> ControlDictionary:
    """A dictionary with a direction per colour: the readers of a least-squares fit."""
    pixels = model.preprocess([images[i] for i in range(N)])
    stream = torch.cat([model.harvest(some, HOOK)[HOOK][:, 0] for some in pixels.split(120)])
    colours = images.column("colour")
    truth = torch.tensor([[colour == name for name in COLOURS] for colour in colours]).float()
    centred = stream - stream.mean(0)
    readers = torch.linalg.lstsq(centred, truth - truth.mean(0), driver="gelsd").solution.T
    rows = torch.nn.functional.normalize(readers, dim=1)
    return ControlDictionary("planted", rows, stream.mean(0), k=1, hook_name=HOOK, tokens="cls")


@pytest.fixture(scope="module")
def result(model: Any, images: Any, planted: Any) -> ConceptBottleneck:
    names = {str(k): {"name": colour} for k, colour in enumerate(COLOURS)}
    return vp.concept_bottleneck(model, planted, images, names=names, settings=QUICK)


def test_planted_concepts_decide_for_their_own_class(result: ConceptBottleneck) -> None:
    for colour in COLOURS:
        assert result.strongest(colour, 1)[0][1] == colour
    assert result.row("bottleneck").accuracy.value > 0.9
    assert result.row("probe_embedding").accuracy.value > 0.9
    assert result.row("zero_shot").accuracy.value > 0.9
    # One latent fires per image, so one concept makes up all of a decision.
    assert all(share.value == 1 for share in result.concepts_needed.values())


def test_removing_a_concept_takes_its_class_away_and_no_other(result: ConceptBottleneck) -> None:
    before, after, random = result.without(["red"])
    assert after.worst == "red"
    assert after.worst_group.value == 0
    share_of_red = result.data.labels[result.parts["test"]].eq(result.data.classes.index("red"))
    lost = before.accuracy.value - after.accuracy.value
    assert 0 < lost <= float(share_of_red.double().mean()) + 1e-9
    assert random.removed == 1
    assert random.worst != "red"
    with pytest.raises(ValueError, match="no latent is named 'mauve': there are"):
        result.without(["mauve"])
    with pytest.raises(ValueError, match="there is no latent 8: the SAE has 8, from 0"):
        result.without([8])


def test_an_explanation_adds_up_to_the_logit(result: ConceptBottleneck) -> None:
    for place in result.parts["test"][:10].tolist():
        codes = result.data.codes.sparse.to_dense()[place].double() * result.codes.scale
        logits = result.head.weight.double() @ codes
        found = result.explain(place)
        assert found.decided == result.data.classes[int(logits.argmax())]
        assert found.logit == pytest.approx(float(logits.max()), abs=1e-5)
        by_id = result.explain(found.image, n=0)
        assert by_id.rest == pytest.approx(found.logit, abs=1e-5)


def test_the_figures_are_counted_as_a_loop_counts_them(model: Any, images: Any) -> None:
    dictionary = neuron_dictionary(128).at(HOOK, tokens="cls")
    found = vp.concept_bottleneck(model, dictionary, images, settings=QUICK)
    dense = found.data.codes.sparse.to_dense().double() * found.codes.scale
    weight, labels = found.head.weight.double(), found.data.labels
    right, needed = [], []
    for row in found.parts["test"].tolist():
        logits = weight @ dense[row]
        right.append(int(logits.argmax()) == int(labels[row]))
        parts = sorted(float(v) for v in weight[logits.argmax()] * dense[row] if v > 0)[::-1]
        total, so_far, count = sum(parts), 0.0, 0
        while so_far < 0.9 * total - 1e-9:
            so_far += parts[count]
            count += 1
        needed.append(count)
    assert found.row("bottleneck").accuracy.value == pytest.approx(np.mean(right))
    assert found.concepts_needed[0.9].value == pytest.approx(np.mean(needed), abs=0.02)
    counts = [found.concepts_needed[share].value for share in (0.9, 0.95, 0.99)]
    assert counts == sorted(counts)
    # The parts are disjoint, and every class is in each.
    every = torch.cat(list(found.parts.values()))
    assert len(torch.unique(every)) == len(found.data) == len(every)
    for rows in found.parts.values():
        assert len(torch.unique(labels[rows])) == len(COLOURS)


def test_the_fit_reaches_the_optimum_that_another_solver_finds(model: Any, images: Any) -> None:
    """Scikit-learn minimises the same loss: an L1 penalty, no intercept."""
    settings = BottleneckSettings(
        labels="column:texture", l1=(5.0,), learning_rates=(0.02,), epochs=800, fit_batch_size=9999
    )
    dictionary = neuron_dictionary(128).at(HOOK, tokens="cls")
    found = vp.concept_bottleneck(model, dictionary, images, settings=settings)
    rows = found.parts["train"]
    z = (found.data.codes.sparse.to_dense()[rows] * found.codes.scale).double()
    y = found.data.labels[rows]

    def loss(weight: torch.Tensor) -> float:
        cross = torch.nn.functional.cross_entropy(z @ weight.T, y)
        return float(cross + 5.0 * weight.abs().mean())

    size = found.head.weight.numel()
    peer = LogisticRegression(
        C=size / (5.0 * len(y)), l1_ratio=1.0, solver="saga", fit_intercept=False, max_iter=3000,
        tol=1e-6,
    ).fit(z.numpy(), y.numpy())  # fmt: skip
    best = loss(torch.from_numpy(peer.coef_))
    ours = loss(found.head.weight.double())
    assert best <= ours * (1 + 1e-4)
    assert ours < best * 1.02
    assert loss(torch.zeros(4, 128).double()) > best * 1.1


@pytest.mark.slow
def test_the_folder_holds_the_result(result: ConceptBottleneck, tmp_path: Path) -> None:
    removals = result.without(["red", "blue"])
    place = result.save(tmp_path / "bottleneck", removals=removals)
    assert sorted(p.name for p in place.iterdir()) == [
        "accuracy.png", "explanations.png", "results.json", "table.txt",
    ]  # fmt: skip
    content = json.loads((place / "results.json").read_text())
    assert content["schema"] == "vision_plugin.lens/bottleneck/1"
    methods = [row["method"] for row in content["rows"]]
    assert methods == [
        "bottleneck", "probe_embedding", "probe_neurons", "zero_shot", "without red, blue",
        "random latents",
    ]  # fmt: skip
    first = content["rows"][0]["accuracy"]
    assert first["low"] <= first["value"] <= first["high"]
    result.save(place)  # replaces its own
    (place / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"mine\.txt"):
        result.save(place)


@pytest.mark.slow
def test_names_come_from_a_file_or_a_list(model: Any, images: Any, planted: Any, tmp_path) -> None:
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"schema": "x", "names": {"1": "orange", "3": None}}))
    settings = BottleneckSettings(
        labels="column:colour", l1=(1.0,), learning_rates=(0.05,), epochs=1
    )
    found = vp.concept_bottleneck(model, planted, images, names=path, settings=settings)
    assert dict(found.names) == {1: "orange"}
    assert found.name(2) == "latent 2"
    unknown = torch.full((8,), torch.nan)
    one = NameCandidates((None, "orange", *[None] * 6), unknown, "", "", unknown, None)
    given = FeatureNames({"caption": one}, (None, "caption", *[None] * 6), {}, {}, {}, {})
    again = vp.concept_bottleneck(model, planted, images, names=given, settings=settings)
    assert again.names == found.names
    with pytest.raises(ValueError, match="names= names '8', but the SAE's latents are 0 to 7"):
        vp.concept_bottleneck(model, planted, images, names={8: "x"}, settings=settings)
    with pytest.raises(ValueError, match="names= gives latent 0 a int: give a text"):
        vp.concept_bottleneck(model, planted, images, names=[1], settings=settings)


def test_classes_with_too_few_images_and_no_classes(model: Any, planted: Any) -> None:
    few = vp.open_images("demo:40")
    with pytest.raises(ValueError, match=r"the class '\w+' has \d images, and a bottleneck needs"):
        vp.concept_bottleneck(model, planted, few, settings=QUICK)
    plain = vp.open_images([few[0], few[1]])
    with pytest.raises(ValueError, match="no labels"):
        vp.concept_bottleneck(model, planted, plain, settings=BottleneckSettings())


@pytest.mark.slow
def test_a_model_without_text_has_no_zero_shot(images: Any) -> None:
    import transformers

    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    torch.manual_seed(0)
    blind = vp.wrap(transformers.Dinov2Model(config).eval(), image_processor=processor)
    dictionary = neuron_dictionary(32).at("blocks.1.hook_resid_post", tokens="cls")
    settings = BottleneckSettings(
        labels="column:background", l1=(1.0,), learning_rates=(0.05,), epochs=2
    )
    found = vp.concept_bottleneck(blind, dictionary, images, settings=settings)
    assert "has no text tower" in found.left_out["zero_shot"]
    assert [row.method for row in found.rows] == ["bottleneck", "probe_embedding", "probe_neurons"]
