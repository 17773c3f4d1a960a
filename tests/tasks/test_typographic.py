"""The typographic task on the drawn world: what it reports, chooses and writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import vision_plugin as vp
from vision_plugin import Edit
from vision_plugin.demo.attacks import typographic_data
from vision_plugin.metrics import random_dictionary
from vision_plugin.tasks import (
    Attack,
    TaskResult,
    TypographicData,
    TypographicSettings,
    typographic,
)

METHODS = ("none", "sae", "random_latents", "leace", "heads")


@pytest.fixture(scope="module")
def model():
    return vp.load_model("demo")


@pytest.fixture(scope="module")
def data(model) -> TypographicData:
    return typographic_data(model, "shape", train=120, validation=60, test=60)


@pytest.fixture(scope="module")
def sae():
    return random_dictionary(128, 60, k=None, seed=0).at("blocks.1.hook_resid_post")


@pytest.fixture(scope="module")
def result(model, sae, data) -> TaskResult:
    settings = TypographicSettings(
        methods=METHODS, sizes=(5, 20), rules=("attribution",), tokens=("cls",), random_seeds=2
    )
    return typographic(model, sae, data, settings=settings)


def answers(model, data: TypographicData, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return (model.encode_image(pixels) @ model.encode_text(list(data.prompts)).T).argmax(1)


def test_pairs_differ_by_the_word_alone(data) -> None:
    differs = (data.test.clean - data.test.attacked).abs().amax((1, 2, 3))
    assert (differs > 0.1).all()
    share = ((data.test.clean - data.test.attacked).abs().amax(1) > 1e-3).double().mean()
    assert 0.005 < float(share) < 0.3
    assert (data.test.labels != data.test.printed).all()
    assert len(set(data.test.printed.tolist())) == 9
    for known, unseen in data.halves():
        seen = set(known.train.printed.tolist()) | set(known.validation.printed.tolist())
        assert not seen & set(unseen.printed.tolist())
        assert len(known.test) + len(unseen) == len(data.test)


@pytest.mark.slow
def test_no_change_is_the_model_itself(model, data, result) -> None:
    row = result.row("none", kind="shape")
    attacked, clean = (
        answers(model, data, data.test.attacked),
        answers(model, data, data.test.clean),
    )
    expected = {
        "fooled": attacked == data.test.printed,
        "accuracy": attacked == data.test.labels,
        "clean_accuracy": clean == data.test.labels,
    }
    for name, values in expected.items():
        assert row.figures[name].value == pytest.approx(float(values.double().mean()))
    assert row.figures["fooled"].value > 0.4
    for name in ("collateral", "kl", "moved", "accuracy_gain", "clean_change"):
        assert row.figures[name].value == pytest.approx(0, abs=1e-6)
    groups = [float(expected["accuracy"][data.test.labels == c].double().mean()) for c in range(9)]
    assert row.figures["worst_group"].value == pytest.approx(min(groups))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sae", "leace", "heads"])
def test_a_row_is_what_its_edit_does(model, data, result, method) -> None:
    """The cached passes of the task, against whole passes under the saved edit."""
    row, edit = result.row(method, kind="shape"), result.edits["shape", method]
    with model.edit(edit):
        fooled = answers(model, data, data.test.attacked) == data.test.printed
        right = answers(model, data, data.test.clean) == data.test.labels
    assert row.figures["fooled"].value == pytest.approx(float(fooled.double().mean()), abs=0.02)
    assert row.figures["clean_accuracy"].value == pytest.approx(
        float(right.double().mean()), abs=0.02
    )


@pytest.mark.slow
def test_heads_and_leace_mend_and_random_latents_do_not(result) -> None:
    none = result.row("none", kind="shape").figures["fooled"].value
    for method in ("heads", "leace"):
        assert result.row(method, kind="shape").figures["fooled"].value < none - 0.2
        assert result.row(method, kind="shape").figures["accuracy_gain"].low > 0
    assert {row.split for row in result.rows} == {"test", "unseen_words"}
    assert {row.method for row in result.rows} == set(METHODS)


@pytest.mark.slow
def test_the_choice_is_that_of_an_exhaustive_search(model, data, sae) -> None:
    """Candidates that were dropped half way, against whole passes over all of them."""
    sizes, cap, split = (1, 5, 20), 0.05, data.validation
    settings = TypographicSettings(
        methods=("sae",), sizes=sizes, rules=("attribution", "difference"), cap=cap, batch_size=15,
        unseen_words=False,
    )  # fmt: skip
    result = typographic(model, sae, data, settings=settings)
    texts = model.encode_text(list(data.prompts))
    base = (answers(model, data, split.clean) == split.labels).double().mean()
    best, most = Edit(), (answers(model, data, split.attacked) == split.labels).double().mean()
    entries, dropped = iter(result.search), 0
    for tokens in settings.tokens:
        for rule in settings.rules:
            every = vp.find_latents(
                model, sae, data.train.attacked, clean=data.train.clean, rule=rule, n=60,
                labels=data.train.labels, wrong=data.train.printed, texts=texts, tokens=tokens,
            )  # fmt: skip
            for size in (size for size in sizes if size <= len(every)):
                found = every.best(size)
                edit = Edit.suppress(sae, found.latents, to=found.clean_mean, tokens=tokens)
                with model.edit(edit):
                    right = answers(model, data, split.attacked) == split.labels
                    clean = answers(model, data, split.clean) == split.labels
                entry = next(entries)
                assert (entry["size"], entry["how"]) == (size, f"{rule}, {tokens}")
                seen = right[: entry["images"]].double().mean()
                assert entry["accuracy"] == pytest.approx(float(seen), abs=0.02)
                dropped += entry["images"] < len(right)
                if right.double().mean() > most and clean.double().mean() >= base - cap:
                    best, most = edit, right.double().mean()
    assert next(entries, None) is None
    assert dropped > 2
    assert len(best) == 1
    assert str(result.edit) == str(best)


@pytest.mark.slow
def test_a_result_is_a_folder(model, data, sae, result, tmp_path: Path) -> None:
    out = result.save(tmp_path / "out")
    content = json.loads((out / "results.json").read_text())
    assert (content["schema"], content["task"]) == (1, "typographic")
    assert {row["method"] for row in content["rows"]} == set(METHODS)
    for row in content["rows"]:
        assert {"kind", "split", "size", "layer", "edit"} <= set(row)
        assert row["fooled"]["low"] <= row["fooled"]["value"] <= row["fooled"]["high"]
    assert {path.name for path in out.iterdir()} == {
        "results.json", "edit.json", "edits", "table.txt", "methods.png", "search.png",
    }  # fmt: skip
    assert "fooled" in (out / "table.txt").read_text()
    loaded = Edit.load(out / "edit.json", sae=sae)
    with model.edit(loaded):
        again = answers(model, data, data.test.attacked)
    with model.edit(result.edit):
        assert torch.equal(again, answers(model, data, data.test.attacked))
    assert len(Edit.load(out / "edits" / "shape-heads.json")) >= 1
    result.save(out)
    (out / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"mine\.txt"):
        result.save(out)


def test_an_interval_is_the_bootstraps(model, sae, data) -> None:
    settings = TypographicSettings(methods=("none",), unseen_words=False)
    result = typographic(model, sae, data, settings=settings)
    figure = result.row("none", kind="shape").figures["accuracy"]
    right = (answers(model, data, data.test.attacked) == data.test.labels).double().numpy()
    random = np.random.default_rng(0)
    drawn = random.choice(right, size=(4000, len(right))).mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert figure.low == pytest.approx(low, abs=0.03)
    assert figure.high == pytest.approx(high, abs=0.03)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("magic",)}, "methods= has 'magic'"),
        ({"sizes": ()}, "must be numbers of latents"),
        ({"cap": 2.0}, "from 0 to 1"),
    ],
)
def test_settings_are_checked(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        TypographicSettings(**change)


def test_bad_splits_are_refused(model, sae, data) -> None:
    few = data.test.where(torch.arange(60) < 10)
    small = TypographicData("shape", data.classes, data.prompts, data.train, data.validation, few)
    with pytest.raises(ValueError, match="10 images are too few for an interval, which needs 30"):
        typographic(
            model, sae, small, settings=TypographicSettings(methods=("none",), unseen_words=False)
        )
    with pytest.raises(ValueError, match="a split has no images"):
        data.test.where(torch.zeros(60).bool())
    with pytest.raises(ValueError, match="names the image's own class"):
        Attack(data.test.clean, data.test.attacked, data.test.labels, data.test.labels)
    with pytest.raises(ValueError, match="four classes or more"):
        TypographicData("x", ("a",), ("a",), data.train, data.validation, data.test)
