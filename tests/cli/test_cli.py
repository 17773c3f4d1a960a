"""The command as a person meets it: real processes, their output and exit codes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import vision_plugin as vp
from vision_plugin.cli import COMMANDS, main

SCRIPT = str(Path(sys.executable).with_name("vision-plugin"))


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )


def test_the_flags_became_the_run(sae: str, tiny_clip: str) -> None:
    run = json.loads(Path(sae, "runner_cfg.json").read_text())
    assert run["model_name"] == tiny_clip
    assert run["lr"] == 0.003
    assert run["sae"]["architecture"] == "topk"
    assert (run["sae"]["d_in"], run["sae"]["d_sae"], run["sae"]["k"]) == (32, 40, 3)
    assert run["logger"]["log_to_wandb"] is False


@pytest.mark.slow
def test_eval_prints_a_table_and_writes_every_number(sae: str, images: str, tmp_path) -> None:
    out = tmp_path / "scores.json"
    done = command(
        *f"eval --sae {sae} --images {images} --output-path {out} --steering-images 4".split(),
        "--concepts",
        "labels",
    )
    assert done.returncode == 0, done.stderr
    assert "monosemanticity, mean" in done.stdout
    assert "steerable latents" in done.stdout
    scores = json.loads(out.read_text())
    assert scores["n_images"] == 18
    assert sorted(scores["concepts"]) == ["a blue square", "a green star", "a red circle"]
    latents = scores["per_latent"]
    assert len(latents["monosemanticity"]["sae"]["score"]) == 40
    assert len(latents["monosemanticity"]["neurons"]["score"]) == 32
    assert len(latents["steerability"]["sae"]["power"]) == 40
    assert scores["embeddings"] == "model"


@pytest.mark.slow
def test_steer_says_what_is_seen_before_and_while(sae: str, images: str, tmp_path) -> None:
    out = tmp_path / "steered.json"
    done = command(
        *f"steer --sae {sae} --images {images} --latents 3 7 --strength 60 --n-images 2".split(),
        *("--concepts", "labels", "--output-path", str(out)),
    )
    assert done.returncode == 0, done.stderr
    assert "latent 3, 7 held at 60" in done.stdout
    steered = json.loads(out.read_text())
    assert np.allclose(np.sum(steered["after"], axis=1), 1, atol=1e-5)
    assert not np.allclose(steered["before"], steered["after"], atol=1e-4)


def test_steer_makes_an_edit_that_was_saved(sae: str, images: str, tmp_path, capsys) -> None:
    edit = vp.Edit.clamp(vp.load_sae(sae), {3: 60.0, 7: 60.0}, tokens="all")
    edit.save(tmp_path / "edit.json", sae=sae)
    line = ["steer", "--images", images, "--n-images", "2", "--concepts", "labels"]
    clamped, edited = tmp_path / "clamped.json", tmp_path / "edited.json"
    by_hand = ["--sae", sae, "--latents", "3", "7", "--strength", "60"]
    assert main([*line, *by_hand, "--output-path", str(clamped)]) == 0
    assert main([*line, "--edit", str(tmp_path / "edit.json"), "--output-path", str(edited)]) == 0
    first, second = json.loads(clamped.read_text()), json.loads(edited.read_text())
    assert np.allclose(first["after"], second["after"], atol=1e-6)
    assert first["edit"]["changes"][0]["targets"] == second["edit"]["changes"][0]["targets"]
    moved = np.mean(np.array(second["after"]) - np.array(second["before"]), axis=0)
    assert second["steerability"] == pytest.approx(np.sum(moved**2), abs=1e-6)
    for more, message in (
        (["--edit", "edit.json", "--latents", "3"], "leave out --latents or --edit"),
        ([], "--edit FILE"),
        (["--latents", "3"], "--sae FOLDER"),
    ):
        capsys.readouterr()
        assert main([*line, *more]) == 2
        assert message in capsys.readouterr().err


BAD = {
    "model": (
        "train --model-name {tmp}/nowhere --images {images} --hook-name blocks.1.hook_resid_post "
        "--d-sae 8 --k 2 --output-path {tmp}/out",
        "could not load a model",
    ),
    "hook": (
        "train --model-name {clip} --images {images} --hook-name blocks.1.hook_resid_pst "
        "--d-sae 8 --k 2 --output-path {tmp}/out",
        "blocks.1.hook_resid_post",
    ),
    "folder": (
        "train --model-name {clip} --images {tmp}/none --hook-name blocks.1.hook_resid_post "
        "--d-sae 8 --k 2 --output-path {tmp}/out",
        "{tmp}/none",
    ),
    "image": (
        "train --model-name {clip} --images {broken} --hook-name blocks.1.hook_resid_post "
        "--d-sae 8 --k 2 --training-tokens 4096 --output-path {tmp}/out",
        "cannot be read",
    ),
    "architecture": (
        "train --architecture nonsense --model-name {clip} --images {images} --hook-name "
        "blocks.1.hook_resid_post --d-sae 8 --output-path {tmp}/out",
        "unknown architecture 'nonsense': choose from",
    ),
    "sae": ("eval --sae {images} --images {images} --output-path {tmp}/out", "{images}"),
    "another width": (
        "train --model-name {clip} --images {images} --hook-name blocks.1.hook_resid_post "
        "--d-in 99 --d-sae 8 --k 2 --output-path {tmp}/out",
        "--d-in 99",
    ),
    "another model": (
        "eval --sae {sae} --model-name {other} --images {images} --output-path {tmp}/out",
        "whose weights differ from",
    ),
    "latent": (
        "steer --sae {sae} --images {images} --latents 4000 --concepts labels "
        "--output-path {tmp}/out",
        "latent 4000 is out of range",
    ),
    "concepts": (
        "steer --sae {sae} --images {images} --latents 1 --concepts {tmp}/words.txt "
        "--output-path {tmp}/out",
        "there is no such file",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_sentence_and_leaves_nothing(
    case: str, tiny_clip, images, sae, tmp_path, tmp_path_factory, capsys
) -> None:
    line, message = BAD[case]
    aside = tmp_path_factory.mktemp("aside")
    places = {"tmp": str(tmp_path), "clip": tiny_clip, "images": images, "sae": sae}
    places |= {"broken": str(aside / "broken"), "other": str(aside / "other")}
    if "{broken}" in line:
        (aside / "broken").mkdir()
        (aside / "broken" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n, and then nothing of use")
    if "{other}" in line:
        _save_another_clip(tiny_clip, aside / "other")
    assert main(line.format(**places).split()) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("vision-plugin ")
    assert message.format(**places) in error
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command_and_no_command_list_what_there_is() -> None:
    for done in (command("trian"), command()):
        assert done.returncode == 2
        assert all(name in done.stdout + done.stderr for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: vision-plugin {name} ")
    assert "options" in printed


def _save_another_clip(folder: str, out: Path) -> None:
    import torch
    from transformers import AutoProcessor, CLIPModel

    model = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(out)
    AutoProcessor.from_pretrained(folder).save_pretrained(out)


def test_steering_leaves_out_images_that_cannot_be_read(
    sae: str, images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = shutil.copytree(images, tmp_path / "mixed")
    broken = mixed / "a red circle" / "0.png"
    broken.write_bytes(b"no image")
    line = ["steer", "--sae", sae, "--latents", "3", "--concepts", "labels", "--n-images", "6"]
    path = tmp_path / "effect.json"
    assert main([*line, "--images", str(mixed), "--output-path", str(path)]) == 0
    ids = json.loads(path.read_text())["ids"]
    assert len(ids) == 5
    assert "a red circle/0.png" not in ids
    for other in mixed.rglob("*.png"):
        other.write_bytes(b"no image")
    capsys.readouterr()
    assert main([*line, "--images", str(mixed)]) != 0
    said = capsys.readouterr().err.strip().splitlines()
    assert "none of 6 images can be read: image a blue square/0.png: not an image" in said[-1]
