"""``~`` is a person's home wherever a path is named, and in one place of the code."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import vision_plugin
from vision_plugin._paths import local_path
from vision_plugin.cli import main

HOOK = "blocks.1.hook_resid_post"


def test_one_place_expands_it() -> None:
    package = Path(vision_plugin.__file__).parent
    found = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if "expanduser" in file.read_text()
    }
    assert found == {"_paths.py"}


def test_a_name_that_begins_so_is_itself_as_in_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~nosuch").mkdir()
    assert local_path("~nosuch") == Path("~nosuch")
    with pytest.raises(ValueError, match=r"there is no user 'nobodyhere' on this machine"):
        local_path("~nobodyhere/x")
    with pytest.raises(ValueError, match=r"\./~nobodyhere/x for a name that begins with ~"):
        local_path("~nobodyhere/x")


@pytest.mark.slow
def test_every_command_takes_it(
    tiny_clip: str,
    images: str,
    sae: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    shutil.copytree(tiny_clip, home / "clip")
    shutil.copytree(images, home / "images")
    shutil.copytree(sae, home / "sae")
    (home / "words.txt").write_text("a red circle\na blue square\n")
    away = tmp_path / "away"
    away.mkdir()
    monkeypatch.chdir(away)
    inputs = "--images ~/images --model-name ~/clip"
    train = "--training-tokens 640 --train-batch-size-tokens 64 --n-batches-in-buffer 4"
    lines = [
        f"extract {inputs} --hook-names {HOOK} --n-workers 0 --output-path ~/out/store",
        "info ~/out/store",
        "verify ~/out/store",
        f"train --model-name ~/clip --images ~/out/store --hook-name {HOOK} --d-sae 8 --k 2 {train}"
        " --output-path ~/out/trained --architecture topk",
        "info ~/out/trained",
        f"eval --sae ~/sae {inputs} --metrics fvu steerability --controls neurons --concepts "
        "~/words.txt --steering-images 2 --output-path ~/out/scores.json",
        f"sparsity --saes ~/sae {inputs} --output-path ~/out/study",
        f"decompose {inputs} --texts ~/words.txt --n-images 2 --output-path ~/out/parts",
        f"steer --sae ~/sae {inputs} --latents 1 --concepts ~/words.txt --n-images 1 "
        "--output-path ~/out/steered.json",
        f"report --sae ~/sae {inputs} --features 1 --evaluation ~/out/scores.json "
        "--output-path ~/out/report",
        "convert --sae ~/sae --output-path ~/out/converted",
    ]
    for line in lines:
        assert main(line.split()) == 0, (line, capsys.readouterr().err)
    assert sorted(path.name for path in (home / "out").iterdir()) == [
        *(
            "converted",
            "parts",
            "report",
            "scores.json",
            "steered.json",
            "store",
            "study",
            "trained",
        ),
    ]
    assert list(away.iterdir()) == []
