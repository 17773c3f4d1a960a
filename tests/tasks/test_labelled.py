"""Words printed on labelled images: what is printed where, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vision_plugin as vp
from tests._images import image
from vision_plugin.tasks import LabelledImages, PrintStyle, TypographicSettings, typographic

CLASSES = ("ant", "bee", "cat", "dog", "eel")


@pytest.fixture(scope="module")
def model():
    return vp.load_model("demo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An imagefolder of 110 plain images in five classes, wider than high."""
    root = tmp_path_factory.mktemp("animals")
    for i in range(110):
        place = root / CLASSES[i % 5]
        place.mkdir(exist_ok=True)
        Image.new("RGB", (90, 70), (40 + i, 120, 90)).save(place / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def labelled(model, folder) -> LabelledImages:
    return LabelledImages(model, str(folder), train=30, validation=30, test=40, seed=3)


def test_a_word_lies_within_the_image_and_names_another_class(model, folder, labelled) -> None:
    data = labelled.data()
    assert data.classes == CLASSES
    assert data.prompts[1] == "a photo of a bee."
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 30, 40)
    for split in (data.train, data.validation, data.test):
        assert (split.labels != split.printed).all()
        differs = (split.clean - split.attacked).abs().amax(1) > 1e-3
        assert differs.flatten(1).any(1).all()
        # The images are plain: whatever is not the word is one colour, as on the clean image.
        assert float(differs.double().mean()) < 0.3
    colours = torch.cat([s.clean[:, 0, 0, 0] for s in (data.train, data.validation, data.test)])
    assert len(colours.unique()) == 100, "an image is in two splits, or twice in one"
    assert set(data.test.printed.tolist()) == set(range(5))
    by_colour = {}
    for i in range(110):
        pixels = model.preprocess([Image.new("RGB", (64, 64), (40 + i, 120, 90))])
        by_colour[round(float(pixels[0, 0, 0, 0]), 4)] = i % 5
    found = [by_colour[round(float(value), 4)] for value in data.test.clean[:, 0, 0, 0]]
    assert found == data.test.labels.tolist()


def test_a_seed_draws_the_same_words_again(model, folder, labelled) -> None:
    again = LabelledImages(model, str(folder), train=30, validation=30, test=40, seed=3).data()
    other = LabelledImages(model, str(folder), train=30, validation=30, test=40, seed=4).data()
    assert torch.equal(again.test.attacked, labelled.data().test.attacked)
    assert not torch.equal(other.test.attacked, again.test.attacked)


def test_an_sae_is_trained_on_the_training_part_alone(model, labelled) -> None:
    images = labelled.for_training(100)
    assert len(images) == 100
    clean = model.preprocess(images[0::2])[:, 0, 0, 0]
    train = labelled.data().train.clean[:, 0, 0, 0]
    assert set(clean.tolist()) <= set(train.tolist())
    assert all(a.tobytes() != b.tobytes() for a, b in zip(images[0::2], images[1::2], strict=True))
    # The same image comes again with another word.
    assert images[1].tobytes() != images[61].tobytes()


def test_styles_draw_fonts_sizes_places_and_colours() -> None:
    plain = Image.new("RGB", (120, 90), (90, 90, 90))
    style = PrintStyle(sizes=(0.2, 0.4), stroke=2)
    random = np.random.default_rng(0)
    heights, places, colours = set(), set(), set()
    for _ in range(30):
        printed = np.asarray(style.print_on(plain, "eel", random)).astype(int)
        rows, columns = np.nonzero((printed != 90).any(2))
        heights.add(int(rows.max() - rows.min()))
        places.add((int(rows.min()), int(columns.min())))
        colours |= set(map(tuple, printed[rows, columns].tolist()))
    assert len(heights) > 5
    assert len(places) > 20
    assert set(PrintStyle().colours) <= colours
    assert np.asarray(plain).max() == 90, "the image itself was written on"
    long = style.print_on(plain, "hippopotamus", random)
    assert 0 < (np.asarray(long) != 90).any(2).mean() < 1
    with pytest.raises(ValueError, match="is not a font that Pillow reads"):
        PrintStyle(fonts=("none.ttf",))
    with pytest.raises(ValueError, match="shares of an image's height"):
        PrintStyle(sizes=(0.5, 0.2))
    with pytest.raises(ValueError, match="needs two colours"):
        PrintStyle(colours=((0, 0, 0),))


@pytest.mark.slow
def test_the_task_runs_on_labelled_images(model, labelled) -> None:
    data = labelled.data()
    settings = TypographicSettings(methods=("none", "heads"), unseen_words=False)
    sae = vp.metrics.random_dictionary(128, 20, k=None, seed=0).at("blocks.1.hook_resid_post")
    row = typographic(model, sae, data, settings=settings).row("none", kind="class")
    with torch.no_grad():
        texts = model.encode_text([f"a photo of a {name}." for name in CLASSES])
        answers = (model.encode_image(data.test.attacked) @ texts.T).argmax(1)
    fooled = (answers == data.test.printed).double().mean()
    assert row.figures["fooled"].value == pytest.approx(float(fooled))


def test_what_cannot_be_used_is_refused_in_a_sentence(model, folder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no labels, .* label_column="):
        LabelledImages(model, [image(i) for i in range(5)])
    one = tmp_path / "one"
    (one / "cat").mkdir(parents=True)
    for i in range(3):
        image(i).save(one / "cat" / f"{i}.png")
    with pytest.raises(ValueError, match=r"labels of 1 class in .* need 4 classes or more"):
        LabelledImages(model, str(one))
    with pytest.raises(ValueError, match=r"the validation split has 22 of 110 .* needs 30"):
        LabelledImages(model, str(folder))
    with pytest.raises(ValueError, match=r"template='a photo' needs one \{\}"):
        LabelledImages(model, str(folder), template="a photo")
    long = tmp_path / "long"
    for name in ("x" * 40, "b", "c", "d"):
        (long / name).mkdir(parents=True)
        for i in range(30):
            image(i).save(long / name / f"{i}.png")
    with pytest.raises(ValueError, match=r"word 'x{40}' does not fit on an image of 64 x 64"):
        LabelledImages(model, str(long), train=40, validation=40, test=40).data()
