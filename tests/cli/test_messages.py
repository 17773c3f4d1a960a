"""What a command says while it works and when it fails."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest

from vision_plugin import _progress
from vision_plugin.cli import main
from vision_plugin.demo import SHAPES, concept_vocabulary
from vision_plugin.evaluation import read_concepts
from vision_plugin.images import open_images

HOOK = "blocks.1.hook_resid_post"
LINES = {
    "eval": "eval --sae {sae} --images {images} --concepts labels --steering-images 4 "
    "--output-path {out}/scores.json",
    "extract": f"extract --model-name {{clip}} --images {{images}} --hook-names {HOOK} "
    "--batch-size 6 --output-path {out}/store",
    "sparsity": "sparsity --saes {sae} --images {images} --batch-size 6 --output-path {out}/study",
    "steer": "steer --sae {sae} --images {images} --latents 1 --concepts labels --n-images 18",
    "report": "report --sae {sae} --images {images} --output-path {out}/report",
}
WORK = {
    "eval": ("scoring: 18 of 18 images", "steering sae: 160 of 160 passes"),
    "extract": ("extracting to .*: 18 of 18 images",),
    "sparsity": ("studying: 18 of 18 images",),
    "steer": ("steering: 18 of 18 images",),
    "report": ("encoding: 18 of 18 images", "writing pages: 40 of 40 pages"),
}


@pytest.mark.parametrize("command", LINES)
def test_a_long_run_says_how_far_it_is(
    command: str,
    tiny_clip: str,
    images: str,
    sae: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Into a file, where there is no bar: the count, the rate and what is left, now and then."""
    monkeypatch.setattr(_progress, "LOG_EVERY_S", 0.0)
    places = {"clip": tiny_clip, "images": images, "sae": sae, "out": str(tmp_path)}
    root = logging.getLogger()
    before = root.level
    root.setLevel(logging.WARNING)  # as it is in a process of its own
    try:
        assert main(LINES[command].format(**places).split()) == 0
    finally:
        root.setLevel(before)
    for work in WORK[command]:
        wanted = re.compile(rf"{work}, \S+ a second, \S+ s left")
        assert any(wanted.fullmatch(line) for line in caplog.messages), caplog.messages


@pytest.mark.parametrize(
    "line",
    [
        "eval --sae {sae} --images {images} --metrics fvu --controls neurons",
        "steer --sae {sae} --images {images} --latents 1 --concepts labels --n-images 2",
        "sparsity --saes {sae} --images {images}",
        "report --sae {sae} --images {images} --features 1",
    ],
)
def test_an_sae_of_another_model_is_used_where_a_flag_says_so(
    line: str,
    images: str,
    sae: str,
    tiny_clip: str,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tests.cli.test_cli import _save_another_clip

    other = tmp_path_factory.mktemp("other")
    _save_another_clip(tiny_clip, other)
    words = line.format(sae=sae, images=images).split()
    words += ["--model-name", str(other), "--output-path", str(tmp_path / "out")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "whose weights differ from" in said
    assert said.strip().endswith("with --no-check-model")
    assert main([*words, "--no-check-model"]) == 0


def test_a_flag_takes_no_effect_on_an_sae_in_hand(sae: str) -> None:
    import vision_plugin as vp
    from vision_plugin._inputs import Inputs

    loaded = vp.load_sae(sae)
    signature = loaded.cfg.metadata["model_signature"]
    of_any = Inputs(images="demo:1", check_model=False).open_sae(loaded)
    assert of_any.cfg.metadata["model_signature"] is None
    assert loaded.cfg.metadata["model_signature"] == signature
    assert of_any.W_dec is loaded.W_dec


def test_the_concepts_of_drawn_images(
    images: str, sae: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    drawn = open_images("demo:40")
    everything = [concept.text for concept in concept_vocabulary()]
    assert read_concepts("demo", drawn) == everything
    assert len(everything) > 100
    with caplog.at_level(logging.INFO, "vision_plugin"):
        assert set(read_concepts("labels", drawn)) <= set(SHAPES)
    assert any("concepts=demo has every factor" in line for line in caplog.messages)
    line = f"steer --sae {sae} --latents 1 --images {images} --concepts demo"
    assert main(line.split()) == 2
    assert "--concepts 'demo' needs the drawn images of --images demo:N" in capsys.readouterr().err


def test_a_fault_of_our_own_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vision_plugin.cli import _info

    def broken(path: str) -> Any:
        raise KeyError("left\nout\x1b[31m")

    monkeypatch.setattr(_info, "inside", broken)
    assert main(["info", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "\x1b" not in said
    assert "failed with KeyError" in said
    assert "VISION_PLUGIN_DEBUG=1" in said
    monkeypatch.setenv("VISION_PLUGIN_DEBUG", "1")
    with pytest.raises(KeyError):
        main(["info", str(tmp_path)])
