"""Lines and files that cannot be meant: one sentence, exit status 2, soon, and nothing written."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.activations._stores import make_store
from vision_plugin.cli import main
from vision_plugin.cli._console import console

HOOK = "blocks.1.hook_resid_post"
IMAGES = "--images {images}"
LINES = {
    "extract": f"extract --model-name {{clip}} {IMAGES} --hook-names {HOOK} --output-path {{out}}",
    "train": f"train --model-name {{clip}} {IMAGES} --hook-name {HOOK} --training-tokens 640 "
    "--d-sae 8 --k 2 --output-path {out}",
    "eval": f"eval --sae {{sae}} {IMAGES} --output-path {{out}}",
    "sparsity": f"sparsity --saes {{sae}} {IMAGES} --output-path {{out}}",
    "decompose": f"decompose --model-name {{clip}} {IMAGES} --output-path {{out}}",
    "steer": f"steer --sae {{sae}} {IMAGES} --latents 1 --concepts labels --output-path {{out}}",
    "name": f"name --sae {{sae}} {IMAGES} --output-path {{out}}",
    "report": f"report --sae {{sae}} {IMAGES} --output-path {{out}}",
    "convert": "convert --sae {sae} --output-path {out}",
    "demo": "demo --output-path {out} --training-images 2 --images 2",
}
WITH_DEVICE = ("extract", "train", "eval", "sparsity", "decompose", "steer", "name", "report")


@pytest.fixture
def refused(
    tiny_clip: str, images: str, sae: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run a line that has to be refused; the sentence."""

    def run(line: str, *more: str, out: str | None = None) -> str:
        before = everything(tmp_path)
        places = {"clip": tiny_clip, "images": images, "sae": sae, "tmp": str(tmp_path)}
        places["out"] = out or str(tmp_path / "out")
        start = time.process_time()
        status = main([*line.format(**places).split(), *more])
        seconds = time.process_time() - start
        said = capsys.readouterr()
        assert status == 2, said.err
        assert "Traceback" not in said.err
        assert seconds < 2
        assert everything(tmp_path) == before
        return said.err.strip().splitlines()[-1]

    return run


def everything(folder: Path) -> dict[str, Any]:
    """Name of everything in a folder, with the content of its files."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in folders:
            found[f"{parent}/{name}"] = None
        for name in files:
            path = Path(parent, name)
            found[str(path)] = path.read_bytes() if path.is_file() else path.lstat().st_mode
    return found


@pytest.mark.parametrize("command", WITH_DEVICE)
@pytest.mark.parametrize("device", ["nosuch", "cuda:99", "cpu:", "meta", "cuda:-1", "../cpu"])
def test_a_device_that_is_not_there(command: str, device: str, refused: Any) -> None:
    if device == "cuda:99" and torch.cuda.device_count() > 99:
        pytest.skip("this machine has a hundred GPUs")
    said = refused(f"{LINES[command]} --device {device}")
    assert f"--device '{device}'" in said
    assert "is no device: use cpu" in said or "cannot be used here" in said


DEEP = "[" * 50_000
OPTIONS = {
    "deep lists": (DEEP, "nested more than 64 deep"),
    "deep objects": ('{"a":' * 20_000, "nested more than 64 deep"),
    "cut off": ('{"fvu": {"a": ', "is not JSON"),
    "a list": ("[]", "must be a JSON object from metric to its arguments"),
    "a number": ("7", "must be a JSON object from metric to its arguments"),
    "a metric's number": ('{"fvu": 1}', "must be a JSON object from metric to its arguments"),
    "a huge number": (f'{{"fvu": {"9" * 9_000}}}', "is not JSON"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_metric_options_that_are_no_object_of_objects(case: str, refused: Any) -> None:
    options, message = OPTIONS[case]
    said = refused(LINES["eval"], "--metric-options", options)
    assert message in said
    assert "--metric-options" in said
    assert len(said) < 400


def test_a_list_in_a_sweeps_flag_that_ends_too_soon(refused: Any) -> None:
    line = LINES["train"].replace("train", "train --architecture matryoshka_batchtopk", 1)
    for value in ("[8,", DEEP, "[8,16", "(", "[__import__('os')]"):
        assert "is no list: write [8, 16]" in refused(line, f"--matryoshka_widths={value}")


SOUND: dict[str, Any] = {
    "schema": "vision_plugin.evaluation/1",
    "concepts": ["red", "blue"],
    "per_latent": {
        "monosemanticity": {"sae": {"score": [0.5, None] * 20}},
        "steerability": {"sae": {"score": [0.5] * 40, "top_concept": [1, -1] * 20}},
    },
}


def changed(*path: Any, value: Any) -> dict[str, Any]:
    """The sound evaluation with one value in another's place."""
    document = json.loads(json.dumps(SOUND))
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return document


EVALUATIONS: dict[str, Any] = {
    "a list": [SOUND],
    "a number": 7,
    "nothing": None,
    "of another schema": changed("schema", value="vision_plugin.sparsity/1"),
    "whose schema is a list": changed("schema", value=["vision_plugin.evaluation/1"]),
    "without per_latent": {"schema": "vision_plugin.evaluation/1"},
    "whose per_latent is a list": changed("per_latent", value=[1]),
    "whose metric is a list": changed("per_latent", "monosemanticity", value=[1]),
    "whose dictionary is a list": changed("per_latent", "monosemanticity", "sae", value=[1]),
    "without a score": changed("per_latent", "monosemanticity", "sae", value={"power": []}),
    "whose score is a text": changed("per_latent", "monosemanticity", "sae", "score", value="x"),
    "whose scores are texts": changed("per_latent", "steerability", "sae", "score", value=["x"]),
    "whose scores are lists": changed("per_latent", "steerability", "sae", "score", value=[[1]]),
    "whose concepts are a text": changed("concepts", value="red"),
    "without that concept": changed("concepts", value=[]),
    "whose concept is a text": changed(
        "per_latent", "steerability", "sae", "top_concept", value=["red"] * 40
    ),
    "whose concept is a fraction": changed(
        "per_latent", "steerability", "sae", "top_concept", value=[0.5] * 40
    ),
    "whose concept is huge": changed(
        "per_latent", "steerability", "sae", "top_concept", value=[10**30] * 40
    ),
}


@pytest.mark.parametrize("case", EVALUATIONS)
def test_a_report_of_an_evaluation(case: str, refused: Any, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(EVALUATIONS[case]))
    said = refused(LINES["report"], "--evaluation", str(path))
    assert str(path) in said
    assert "vision-plugin eval" in said


@pytest.mark.parametrize("content", [DEEP, "{", "", "\xff\xfe", '{"schema": NaN}'])
def test_a_report_of_what_is_no_json(content: str, refused: Any, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    path.write_bytes(content.encode("latin-1"))
    assert str(path) in refused(LINES["report"], "--evaluation", str(path))


def test_a_pipe_in_place_of_a_file(refused: Any, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "a named pipe" in refused(LINES["report"], "--evaluation", str(pipe))
    steer = LINES["steer"].replace("--concepts labels", f"--concepts {pipe}")
    assert str(pipe) in refused(steer)


def test_a_sound_evaluation_is_shown(tiny_clip: str, images: str, sae: str, tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(SOUND))
    line = LINES["report"].format(images=images, sae=sae, out=tmp_path / "report")
    assert main([*line.split(), "--evaluation", str(tmp_path / "evaluation.json")]) == 0
    assert "blue" in (tmp_path / "report" / "data.js").read_text()


@pytest.mark.parametrize("command", LINES)
def test_links_that_lead_round_in_a_circle(command: str, refused: Any, tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to(tmp_path / "back")
    (tmp_path / "back").symlink_to(tmp_path / "out")
    assert "lead round in a circle" in refused(LINES[command])
    assert "lead round in a circle" in refused(LINES[command], out=str(tmp_path / "out" / "below"))


@pytest.mark.parametrize("command", LINES)
def test_a_home_of_nobody(command: str, refused: Any) -> None:
    assert "there is no user 'nosuch'" in refused(LINES[command], out="~nosuch/x")
    for place in ("{sae}", "{images}"):
        if place in LINES[command]:
            line = LINES[command].replace(place, "~nosuch/x")
            assert "there is no user 'nosuch'" in refused(line)


@pytest.mark.parametrize("command", LINES)
def test_an_output_below_a_file(command: str, refused: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    said = refused(LINES[command], out=str(tmp_path / "file" / "below"))
    assert str(tmp_path / "file") in said


NO_SAE: dict[str, Any] = {
    "a list": "[1]",
    "a number": "1",
    "whose metadata is a list": '{"metadata": [1]}',
    "whose metadata is nothing": '{"metadata": null}',
    "deep": DEEP,
    "cut off": '{"d_in": ',
    "too long": " " * 2_000_000 + "{}",
}


@pytest.mark.parametrize("case", NO_SAE)
def test_info_on_a_configuration_of_no_sae(case: str, refused: Any, tmp_path: Path) -> None:
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "cfg.json").write_text(NO_SAE[case])
    assert "cfg.json" in refused("info {tmp}/sae")


def test_info_on_a_folder_of_neither_kind(refused: Any) -> None:
    said = refused("info {images}")
    assert "is no activation store, for want of a manifest.json or plan.json, and no SAE:" in said
    assert "does not exist: name the folder of an SAE or of a store" in refused("info {tmp}/none")
    assert "there is no user 'nosuch'" in refused("info ~nosuch/x")
    assert "there is no user 'nosuch'" in refused("verify ~nosuch/x")


def test_names_in_files_are_shown_and_not_read_as_markup(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console().print("[/red]: [bold]:smile:[/nothing]")
    assert capsys.readouterr().out == "[/red]: [bold]:smile:[/nothing]\n"


@pytest.mark.parametrize("file", ["plan.json", "manifest.json"])
@pytest.mark.parametrize("command", ["info", "verify"])
def test_a_manifest_that_claims_more_than_there_can_be(
    file: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "s"
    make_store(store, 20)
    document = json.loads((store / file).read_text())
    document["images"]["n_images"] = 10**12
    document["images_per_shard"] = 1
    (store / file).write_text(json.dumps(document))
    if file == "plan.json":
        (store / "manifest.json").unlink()
    start = time.process_time()
    assert main([command, str(store)]) in (1, 2)
    assert time.process_time() - start < 2
    assert "images.n_images: expected a number from 1 to" in " ".join(
        capsys.readouterr().err.split()
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--seed", "x"), "Error parsing --seed: invalid literal for int() with base 10: 'x'"),
        (("--seed",), "Missing value for argument '--seed'. Expected 1 values"),
        (("--nosuch", "1"), "Unrecognized options: --nosuch, 1"),
        (("nosuch",), "Unrecognized options: nosuch"),
    ],
)
def test_a_line_that_cannot_be_read_is_one_sentence(
    flags: tuple[str, ...], said: str, refused: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    told = refused(LINES["demo"], *flags)
    assert told == f"vision-plugin demo: {said}: vision-plugin demo --help lists the flags"


def test_a_long_value_is_not_repeated(refused: Any) -> None:
    for command in ("verify", "info"):
        assert len(refused(f"{command} {'x' * 20_000}")) < 300


def test_a_file_is_no_model(refused: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(DEEP)
    line = LINES["extract"].replace("{clip}", str(path))
    assert "model.json is no folder, so it holds no Hugging Face checkpoint" in refused(line)
