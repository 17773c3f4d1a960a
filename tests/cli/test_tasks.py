"""``vision-plugin tasks``: from flags to a folder whose edit can be applied again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import vision_plugin as vp
from vision_plugin.cli import main

SMALL = [
    *("--train-pairs", "40", "--validation-pairs", "30", "--test-pairs", "30", "--sizes", "5"),
    *("--training-images", "60", "--training-tokens", "8192", "--d-sae", "64", "--k", "4"),
    *("--kinds", "shape", "--no-unseen-words"),
]


@pytest.mark.slow
def test_the_task_trains_its_sae_and_writes_an_edit_that_loads(tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert main(["tasks", "typographic", "--output-path", str(out), *SMALL]) == 0
    assert "results.json, edit.json" in capsys.readouterr().out
    assert "difference_subspace" in (out / "table.txt").read_text()
    content = json.loads((out / "results.json").read_text())
    assert content["settings"]["pairs"] == {"shape": {"train": 40, "validation": 30, "test": 30}}
    methods = [row["method"] for row in content["rows"]]
    assert methods[0] == "none"
    assert {"sae", "neurons", "diff_mean", "leace", "heads", "probe", "pca"} <= set(methods)
    edit = vp.Edit.load(out / "edit.json")  # the SAE lies beside it
    mended = vp.load_model("demo", edit=out / "edit.json")
    assert len(edit) > 0
    assert any(hook.fwd_hooks for hook in mended.hook_dict.values())
    for file in (out / "edits").iterdir():
        vp.Edit.load(file)
    capsys.readouterr()
    again = ["tasks", "typographic", "--sae", str(out / "sae"), "--output-path", str(out)]
    (out / "notes.txt").write_text("mine")
    assert main([*again, *SMALL]) == 2
    assert "notes.txt" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_what_a_vision_language_model_says_is_steered(tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    small = ["--train-images", "120", "--validation-images", "60", "--test-images", "60"]
    small += ["--sizes", "2", "--strengths", "2", "--training-images", "200"]
    small += ["--training-tokens", "65536", "--d-sae", "256", "--k", "8"]
    assert main(["tasks", "llava", "--output-path", str(out), *small]) == 0
    said = capsys.readouterr().out
    assert "insertion of colour" in said
    assert "results.json, edit.json, edits/, table.txt with dialogues, sae/" in said
    content = json.loads((out / "results.json").read_text())
    rows = {(row["kind"], row["how"], row["method"]): row for row in content["rows"]}
    assert rows["colour", "as it is", "none"]["accuracy"]["value"] > 0.9
    mean = rows["colour", "insertion, best", "diff_mean"]["inserted"]
    few = rows["colour", "insertion, best", "random_active_latents"]["inserted"]
    assert mean["low"] > few["high"]
    assert "insertion, best" in (out / "table.txt").read_text()
    again = ["tasks", "llava", "--output-path", str(out), *small, "--sae"]
    assert main([*again, str(out / "x")]) == 2
    capsys.readouterr()
    assert main([*again, str(out / "sae"), "--latents", "3", "256"]) == 2
    assert "latent 256 is out of range: the SAE has 256" in capsys.readouterr().err


@pytest.mark.slow
def test_an_attribute_is_swapped_and_the_swap_loads(tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    small = ["--train", "60", "--validation", "40", "--test", "40", "--sizes", "5", "--ranks", "4"]
    small += ["--training-images", "300", "--training-tokens", "8192", "--d-sae", "64", "--k", "4"]
    small += ["--factors", "shape", "colour", "--steps", "10", "--layers", "2"]
    assert main(["tasks", "ravel", "--output-path", str(out), *small]) == 0
    assert "results.json, edit.json" in capsys.readouterr().out
    content = json.loads((out / "results.json").read_text())
    rows = {(row["kind"], row["method"]): row for row in content["rows"]}
    for kind in ("shape", "colour"):
        assert rows[kind, "none"]["cause"]["value"] < 0.2
        assert rows[kind, "none"]["isolate"]["value"] > 0.9
        # The whole class token behind block 2 takes all attributes along.
        assert (
            rows[kind, "full_swap"]["cause"]["value"] > rows[kind, "none"]["cause"]["value"] + 0.3
        )
        assert rows[kind, "full_swap"]["isolate"]["value"] < 0.7
    edits = [vp.Edit.load(file) for file in (out / "edits").iterdir()]
    assert {change.operation for edit in edits for change in edit} == {"swap"}
    assert "disentangle" in (out / "table.txt").read_text()
    given = ["--sae", str(out / "sae"), "--latents", "7", "2", "7"]
    again = tmp_path / "again"
    assert main(["tasks", "ravel", "--output-path", str(again), *small, *given]) == 0
    content = json.loads((again / "results.json").read_text())
    found = [e for e in content["search"] if e["method"] == "sae"]
    assert [(e["kind"], e["how"], e["size"]) for e in found] == [
        ("shape", "given, cls", 2), ("colour", "given, cls", 2)
    ]  # fmt: skip
    given = ["--sae", str(out / "sae"), "--latents", "64"]
    assert main(["tasks", "ravel", "--output-path", str(again), *small, *given]) == 2
    assert "latent 64 is out of range: the SAE has 64" in capsys.readouterr().err


GROUPS = [
    *("--usual", "40", "--unusual", "4", "--validation", "12", "--test", "30", "--sizes", "10"),
    *("--training-images", "60", "--training-tokens", "16384", "--d-sae", "64", "--k", "4"),
    *("--rules", "difference", "--layers", "0", "1", "--cap", "0.3"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "label"), [("background", "shape"), ("attribute", "texture")])
def test_a_worst_group_task_trains_saes_at_both_layers(
    tmp_path: Path, capsys, task: str, label: str
) -> None:
    out = tmp_path / "out"
    assert main(["tasks", task, "--output-path", str(out), *GROUPS]) == 0
    assert "results.json, edit.json" in capsys.readouterr().out
    content = json.loads((out / "results.json").read_text())
    assert content["task"] == task
    assert content["settings"]["label"] == label
    assert set(content["settings"]["images"]["test"].values()) == {30}
    assert {e["layer"] for e in content["search"] if e["method"] == "sae"} == {0, 1}
    methods = [row["method"] for row in content["rows"]]
    assert {"none", "sae", "neurons", "pca", "leace", "reweighted", "balanced"} <= set(methods)
    if task == "background":  # so few images of the other one let no edit win
        assert len(vp.Edit.load(out / "edit.json")) == 1  # the SAE lies beside it
        mended = vp.load_model("demo", edit=out / "edit.json")
        assert any(hook.fwd_hooks for hook in mended.hook_dict.values())


@pytest.mark.slow
def test_the_task_prints_on_labelled_images_and_reports_on_published_ones(
    tmp_path: Path, capsys
) -> None:
    for i in range(100):
        place = tmp_path / "animals" / ("ant", "bee", "cat", "dog")[i % 4]
        place.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (2 * i, 90, 40)).save(place / f"{i}.png")
    rta = tmp_path / "rta"
    rta.mkdir()
    for i in range(32):
        Image.new("RGB", (64, 64), (90, 4 * i, 40)).save(rta / f"label=ant_text=bee_{i}.png")
    out = tmp_path / "out"
    line = ["tasks", "typographic", "--output-path", str(out), "--published", str(rta)]
    line += ["--images", str(tmp_path / "animals"), "--template", "a picture of {}."]
    small = [part for part in SMALL if part not in ("--kinds", "shape")]
    assert main([*line, *small]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "rta: no figures on clean images, as the set has no photographs" in said
    content = json.loads((out / "results.json").read_text())
    assert content["settings"]["pairs"] == {"class": {"train": 40, "validation": 30, "test": 30}}
    assert {row["split"] for row in content["rows"]} == {"test", "rta"}
    row = next(row for row in content["rows"] if row["split"] == "rta")
    assert "clean_accuracy" not in row
    assert row["accuracy"]["low"] <= row["accuracy"]["value"] <= row["accuracy"]["high"]
    line = ["tasks", "typographic", "--output-path", str(out), "--images", str(rta), *small]
    assert main(line) == 2
    assert "too few images to train an SAE on: name one" in capsys.readouterr().err
    assert main([*line, "--sae", str(out / "sae")]) == 2
    assert "so latents cannot be found on it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tasks", "name a task: typographic"),
        ("tasks juggling", "there is no task 'juggling': use typographic"),
        ("tasks typographic --output-path {out} --kinds size", "must be shape, colour, or both"),
        ("tasks typographic --output-path {out} --test-pairs 3", "--test-pairs 3 is too few"),
        ("tasks typographic --output-path {out} --sae {out}/none", "is neither a file, a folder"),
        ("tasks typographic --output-path {out} --train-pairs 50001", "at most 50,000"),
        ("tasks attribute --output-path {out} --training-images 99999999999", "at most 50,000"),
        ("tasks llava --output-path {out} --test-images 50001", "at most 50,000"),
        ("tasks llava --output-path {out} --test-images 3", "too few for an interval"),
        ("tasks llava --output-path {out} --strengths nan", "must be numbers above 0"),
        ("tasks llava --output-path {out} --latents 3", "--latents are of one SAE: name it with"),
        ("tasks ravel --output-path {out} --latents 3", "--latents are of one SAE: name it with"),
        ("tasks typographic --output-path {out} --cap 2", "from 0 to 1"),
        ("tasks typographic --output-path {out} --images demo:60", "the train split has 18"),
        ("tasks typographic --output-path {out} --published {out}/none", "none does not exist"),
        ("tasks typographic --output-path {out} --sizes 0", "--sizes (0,) must be"),
        ("tasks background --output-path {out} --test 3", "--test 3 is too few for an interval"),
        ("tasks background --output-path {out} --rules magic", "--rules has 'magic': use some of"),
        ("tasks background --output-path {out} --images {out}", "is not a folder that exists"),
        ("tasks attribute --output-path {out} --images x --label Male", "name two attributes"),
    ],
)
def test_a_bad_line_is_refused_in_a_sentence(tmp_path: Path, capsys, line, message) -> None:
    assert main(line.format(out=tmp_path / "out").split()) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
