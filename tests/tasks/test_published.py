"""Published typographic attacks: small folders in their layouts."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

import vision_plugin as vp
from vision_plugin.metrics import random_dictionary
from vision_plugin.tasks import (
    Attack,
    PublishedSet,
    TypographicData,
    TypographicSettings,
    Unpaired,
    is_published,
    read_published,
    typographic,
)

PAIRS = [("alarm clock", "dog"), ("dog", "cup"), ("cup", "alarm clock"), ("pen", "dog")]


@pytest.fixture(scope="module")
def model():
    return vp.load_model("demo")


def photo(i: int) -> Image.Image:
    return Image.new("RGB", (80, 70), (5 * i % 256, 60, 200 - i))


def names_folder(root: Path, n: int = 40) -> Path:
    """RTA-100's and PAINT's layout."""
    root.mkdir()
    for i in range(n):
        label, text = PAIRS[i % 4]
        end = f"_{i}" if i >= 4 else ""
        photo(i).save(root / f"label={label}_text={text}{end}.{'png' if i % 2 else 'jpg'}")
    return root


def scam_table(n: int = 100, *, without: int = 0, with_id: bool = True) -> datasets.Dataset:
    """SCAM's columns: each scene three times, the types in blocks and not in one order."""
    rows: dict[str, list[object]] = {
        name: [] for name in ("image", "type", "object_label", "attack_word", "id")
    }
    for kind, step in (("SCAM", 1), ("NoSCAM", -1 if with_id else 1), ("SynthSCAM", 1)):
        for i in list(range(n))[::step]:
            if kind == "NoSCAM" and i < without:
                continue
            label, text = PAIRS[i % 4]
            colour = (2 * i, 0, {"SCAM": 250, "NoSCAM": 0, "SynthSCAM": 120}[kind])
            values = (Image.new("RGB", (64, 64), colour), kind, label, text, f"{kind}_img_{i:04}")
            for name, value in zip(rows, values, strict=True):
                rows[name].append(value)
    if not with_id:
        del rows["id"]
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def names_of(found: PublishedSet) -> list[tuple[str, str]]:
    numbers = zip(found.attack.labels.tolist(), found.attack.printed.tolist(), strict=True)
    return [(found.classes[label], found.classes[printed]) for label, printed in numbers]


def test_file_names_say_label_and_text(model, tmp_path: Path) -> None:
    root = names_folder(tmp_path / "rta100")
    (found,) = read_published(model, str(root))
    assert is_published(str(root))
    assert found.name == "rta100"
    assert found.classes == ("alarm clock", "cup", "dog", "pen")
    assert found.prompts[0] == "a photo of a alarm clock."
    assert sorted(names_of(found)) == sorted(PAIRS * 10)
    assert isinstance(found.attack, Unpaired)
    for file, pixels, pair in zip(
        sorted(p.name for p in root.iterdir()), found.attack.attacked, names_of(found), strict=True
    ):
        assert file.startswith(f"label={pair[0]}_text={pair[1]}")
        with Image.open(root / file) as image:
            torch.testing.assert_close(pixels, model.preprocess([image.convert("RGB")])[0])
    with pytest.raises(ValueError, match="no photographs of the same scenes without the word, so"):
        found.data()


def test_annotations_name_objects_and_labels(model, tmp_path: Path) -> None:
    root = tmp_path / "disentangling"
    root.mkdir()
    annotated = {}
    for i, (label, text) in enumerate([*PAIRS, ("cup", "")]):
        photo(i).save(root / f"IMG_{i}.JPG", format="JPEG")
        annotated[f"IMG_{i}.JPG"] = {"true object": label, "typographic attack label": text}
    (root / "annotations.json").write_text(json.dumps(annotated))
    (found,) = read_published(model, root)
    assert is_published(root)
    assert names_of(found) == PAIRS
    assert isinstance(found.attack, Unpaired)
    (root / "annotations.json").write_text('{"IMG_0.JPG": "cup"}')
    with pytest.raises(ValueError, match=r'annotations.json does not name a "true object"'):
        read_published(model, root)


@pytest.mark.parametrize("with_id", [True, False])
def test_scams_scenes_have_their_clean_twins(model, tmp_path: Path, with_id) -> None:
    path = tmp_path / "scam.parquet"
    scam_table(with_id=with_id).to_parquet(str(path))
    scam, synth = read_published(model, str(path))
    assert is_published(str(path))
    assert (scam.name, synth.name) == ("SCAM", "SynthSCAM")
    for found, blue in ((scam, 250), (synth, 120)):
        assert isinstance(found.attack, Attack)
        assert names_of(found) == PAIRS * 25
        for i in (0, 7, 99):
            clean, attacked = (
                model.preprocess([Image.new("RGB", (64, 64), (2 * i, 0, b))])[0] for b in (0, blue)
            )
            torch.testing.assert_close(found.attack.clean[i], clean)
            torch.testing.assert_close(found.attack.attacked[i], attacked)
    data = scam.data(train=60, validation=60, test=80, seed=1)
    assert isinstance(data, TypographicData)
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 30, 40)
    red = torch.cat([s.clean[:, 0, 0, 0] for s in (data.train, data.validation, data.test)])
    assert len(red.unique()) == 100
    with pytest.raises(ValueError, match="the validation split has 20 of 100"):
        scam.data()


def test_scam_without_all_clean_images_has_no_clean_figures(model, tmp_path: Path) -> None:
    path = tmp_path / "scam.parquet"
    scam_table(40, without=3).to_parquet(str(path))
    found = read_published(model, str(path))[0]
    assert found.without_clean == "3 of 40 images have no row of NoSCAM"


@pytest.mark.slow
def test_the_chosen_edits_are_reported_on_published_sets(model, tmp_path: Path) -> None:
    from vision_plugin.demo.attacks import typographic_data

    (found,) = read_published(model, str(names_folder(tmp_path / "paint")))
    data = typographic_data(model, "shape", train=60, validation=30, test=30)
    sae = random_dictionary(128, 60, k=None, seed=0).at("blocks.1.hook_resid_post")
    settings = TypographicSettings(
        methods=("none", "leace"), tokens=("cls",), unseen_words=False
    )  # fmt: skip
    result = typographic(model, sae, data, settings=settings, published=[found])
    row = result.row("leace", kind="shape", split="paint")
    assert set(row.figures) == {"fooled", "accuracy", "accuracy_gain", "worst_group"}
    edit = result.edits["shape", "leace"]
    with torch.no_grad(), model.edit(edit):
        texts = model.encode_text(list(found.prompts))
        answers = (model.encode_image(found.attack.attacked) @ texts.T).argmax(1)
    right = (answers == found.attack.labels).double().mean()
    assert row.figures["accuracy"].value == pytest.approx(float(right), abs=0.03)
    out = result.save(tmp_path / "out")
    content = json.loads((out / "results.json").read_text())
    assert content["settings"]["published"]["paint"]["images"] == 40
    assert "no photographs" in content["settings"]["published"]["paint"]["without_clean"]
    assert "paint" in (out / "table.txt").read_text()


def test_what_is_no_attack_is_refused_in_a_sentence(model, tmp_path: Path) -> None:
    root = tmp_path / "plain"
    root.mkdir()
    photo(0).save(root / "cat.png")
    assert not is_published(str(root))
    with pytest.raises(ValueError, match=r"no layout of a published attack: .* image is cat.png"):
        read_published(model, str(root))
    (root / "cat.png").rename(root / "label=cat_text=cat.png")
    with pytest.raises(ValueError, match="no image whose word names another class"):
        read_published(model, str(root))
    path = tmp_path / "scam.parquet"
    table = scam_table(4)
    table.filter(lambda row: row["type"] == "NoSCAM").to_parquet(str(path))
    with pytest.raises(ValueError, match="no row of the type SCAM or SynthSCAM"):
        read_published(model, str(path))
    with pytest.raises(ValueError, match="needs one"):
        read_published(model, str(path), template="a {} {}")
