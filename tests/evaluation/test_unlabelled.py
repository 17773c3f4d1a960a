"""Images without a label have no class: what is about classes leaves them out, and says so."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

import vision_plugin as vp
from tests.metrics._steerability_reference import standard_sae
from vision_plugin.evaluation import (
    Evaluation,
    EvaluationConfig,
    Facts,
    evaluate_config,
    read_concepts,
)
from vision_plugin.images import ImageSource, open_images

HOOK = "blocks.3.hook_resid_post"
N = 120
METRICS = ("sparse_probing", "downstream_preservation", "loss_recovered", "monosemanticity", "fvu")


def source(which: list[int], labels: dict[int, str | None]) -> ImageSource:
    """Some of the drawn images, with labels."""
    drawn = open_images(f"demo:{N}@3")
    cells = []
    for index in which:
        stream = io.BytesIO()
        drawn[index].save(stream, "PNG")
        cells.append({"bytes": stream.getvalue(), "path": None})
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("string"))
    rows = {"image": cells, "label": [labels[index] for index in which]}
    return open_images(datasets.Dataset.from_dict(rows, features=features))


@pytest.fixture(scope="module")
def world() -> SimpleNamespace:
    shapes = open_images(f"demo:{N}@3").labels
    assert shapes is not None
    nothing = [None, "", "-1"]
    labels = {i: nothing[i % 9 // 3] if i % 3 == 0 else shapes[i] for i in range(N)}
    some = [i for i in range(N) if i % 3]
    model = vp.load_model("demo")
    torch.manual_seed(0)
    sae = standard_sae(HOOK, int(model.cfg.d_model), d_sae=64)
    everything, labelled = source(list(range(N)), labels), source(some, labels)
    return SimpleNamespace(all=everything, labelled=labelled, model=model, sae=sae)


def score(world: SimpleNamespace, images: Any, path: Path, **changes: Any) -> Evaluation:
    settings: dict[str, Any] = {"metrics": METRICS, "controls": (), "embedder": ("labels",)}
    cfg = EvaluationConfig(
        sae="sae", images="drawn", output_path=str(path / "scores.json"), **settings | changes
    )
    return evaluate_config(cfg, model=world.model, sae=world.sae, images=images)


@pytest.mark.parametrize("centre", [False, True])
def test_they_change_nothing_about_classes_and_count_in_the_rest(
    centre: bool, world: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ("monosemanticity",) if centre else METRICS
    results = [
        score(world, images, tmp_path, centre_embeddings=centre, metrics=names).results
        for images in (world.all, world.labelled)
    ]
    assert f"40 of {N} images have no label" in caplog.text
    for name in set(names) - {"fvu"}:
        every, labelled = (found[name]["sae"].summary() for found in results)
        every.pop("n_excluded", None), labelled.pop("n_excluded", None)
        assert every == pytest.approx(labelled, rel=1e-4, abs=1e-5, nan_ok=True), name
    if not centre:
        counted = [found["fvu"]["sae"].n_tokens for found in results]
        assert counted[0] * 2 == counted[1] * 3


def test_no_class_is_named_for_them(world: SimpleNamespace) -> None:
    facts = Facts(world.all)
    assert set(facts.class_names) == set(world.labelled.labels)
    assert int((facts.labels < 0).sum()) == N // 3
    concepts = read_concepts("labels", world.all)
    assert set(concepts) == set(facts.class_names) == set(read_concepts("column:label", world.all))
    assert Facts(world.all, labels="column:label").class_names == facts.class_names


def test_images_without_any_label_have_no_classes(world: SimpleNamespace, tmp_path: Path) -> None:
    nameless = source([0, 3, 6], dict.fromkeys((0, 3, 6)))
    assert not Facts(nameless).has_labels
    with pytest.raises(ValueError, match="the labels of the images has no concepts"):
        read_concepts("labels", nameless)
    with pytest.raises(ValueError, match=r"embedder='labels': no image has a label"):
        score(world, nameless, tmp_path)


def test_images_of_other_domains_may_have_splits(tmp_path: Path) -> None:
    for name in ("train", "test"):
        (tmp_path / name / "heart").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "heart" / f"{name}.png")
    with pytest.raises(ValueError, match="the splits test, train"):
        Facts([], domain_images=[str(tmp_path)]).domains  # noqa: B018
    found = Facts([], domain_images=[str(tmp_path)], domain_split="test").domains
    assert found[str(tmp_path)].ids == ["heart/test.png"]


@pytest.mark.parametrize("damage", [b"", b"no image", b"\x89PNG\r\n\x1a\n"])
def test_a_mask_that_cannot_be_read_is_named(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("heart\n")
    (tmp_path / "0.png").write_bytes(damage)
    images = open_images([Image.new("RGB", (8, 8))])
    masks = Facts(images, masks=str(tmp_path)).masks
    assert masks is not None
    with pytest.raises(ValueError, match=r"0\.png cannot be read as a mask in PNG"):
        masks.of_image(0)
