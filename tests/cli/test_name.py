"""``vision-plugin name``, and what other commands make of its names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sae_lens
import torch
from sae_lens.saes.sae import SAEMetadata

from vision_plugin.cli import main
from vision_plugin.lens import read_names

HOOK = "blocks.3.hook_resid_post"


@pytest.fixture
def sae(tmp_path: Path) -> Path:
    """An SAE of random directions in the drawn world's CLIP."""
    torch.manual_seed(0)
    metadata = SAEMetadata(model_name="demo", hook_name=HOOK, tokens="cls")
    made = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=128, d_sae=40, k=6, metadata=metadata))
    with torch.no_grad():
        made.W_enc.copy_(torch.randn(128, 40) / 128**0.5)
        made.W_dec.copy_(made.W_enc.T)
    made.save_model(tmp_path / "sae")
    return tmp_path / "sae"


def test_names_are_written_beside_the_sae_and_used_by_other_commands(
    sae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("# what is drawn\na picture of a circle\na picture of a red object\n")
    line = ["--sae", str(sae), "--images", "demo:40@2"]
    assert main(["name", *line, "--vocabulary", str(words), "--labels", "column:texture"]) == 0
    shown = capsys.readouterr().out
    for text in ("decoder", "dissect", "labels", "chosen", "names.json"):
        assert text in shown
    names = read_names(sae)
    assert set(names.candidates) == {"decoder", "dissect", "labels"}
    word = next(w for w in ("circle", "red") if any(w in (n or "") for n in names.names))
    out = tmp_path / "steered.json"
    steer = ["steer", *line, "--concepts", "demo", "--n-images", "2", "--output-path", str(out)]
    assert main([*steer, "--latents", f"name:{word}"]) == 0
    assert json.loads(out.read_text())["latents"] == names.find(word)
    assert main([*steer, "--latents", "name:nothing"]) == 2
    assert "no feature is named 'nothing'" in capsys.readouterr().err
    assert main([*steer, "--latents", "circle"]) == 2
    assert "name:WORD" in capsys.readouterr().err
    scored = ["eval", *line, "--metrics", "monosemanticity", "--controls", "neurons"]
    assert main([*scored, "--latents", f"name:{word}", "7"]) == 0
    shown = capsys.readouterr().out
    assert "scores of single latents" in shown
    assert word in shown


def test_names_of_another_sae_are_refused(
    sae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--sae", str(sae), "--images", "demo:24@2"]
    assert main(["name", *line, "--methods", "decoder"]) == 0
    other = sae_lens.TopKSAE.load_from_disk(sae)
    with torch.no_grad():
        other.W_dec.copy_(other.W_dec.flip(0))
    (sae / "names.json").rename(tmp_path / "names.json")
    other.save_model(tmp_path / "other")
    (tmp_path / "names.json").rename(tmp_path / "other" / "names.json")
    steer = ["steer", "--sae", str(tmp_path / "other"), "--images", "demo:4@2"]
    assert main([*steer, "--concepts", "demo", "--latents", "name:cat"]) == 2
    assert "this SAE is another one" in capsys.readouterr().err


def named(sae: Path, tmp_path: Path) -> str:
    """Name the features of an SAE, and return a word that some of them have."""
    words = tmp_path / "words.txt"
    words.write_text("a picture of a circle\na picture of a red object\n")
    flags = ["--images", "demo:40@2", "--vocabulary", str(words), "--methods", "decoder"]
    assert main(["name", "--sae", str(sae), *flags]) == 0
    names = read_names(sae)
    return next(w for w in ("circle", "red") if any(w in (n or "") for n in names.names))


@pytest.mark.slow
def test_tasks_take_latents_by_the_names_of_their_features(
    sae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A word that no feature has is refused by every task that takes latents, before any work."""
    word = named(sae, tmp_path)
    for task in ("typographic", "background", "attribute"):
        line = ["tasks", task, "--sae", str(sae), "--output-path", str(tmp_path / "out")]
        capsys.readouterr()
        assert main([*line, "--latents", "name:nothing"]) == 2
        assert "no feature is named 'nothing'" in capsys.readouterr().err
        assert main([*line, "--latents", word]) == 2
        assert "name:WORD" in capsys.readouterr().err
    assert main(["tasks", "typographic", "--output-path", "out", "--latents", "name:x"]) == 2
    assert "of one SAE" in capsys.readouterr().err
    (sae / "names.json").unlink()
    assert main([*line, "--latents", f"name:{word}"]) == 2
    assert "vision-plugin name" in capsys.readouterr().err


@pytest.mark.slow
def test_a_task_edits_the_latents_that_a_name_stands_for(sae: Path, tmp_path: Path) -> None:
    word = named(sae, tmp_path)
    out = tmp_path / "out"
    small = ["--train-pairs", "30", "--validation-pairs", "30", "--test-pairs", "30"]
    small += ["--sizes", "5", "--kinds", "shape", "--no-unseen-words", "--cap", "0.9"]
    line = ["tasks", "typographic", "--sae", str(sae), "--output-path", str(out), *small]
    assert main([*line, "--latents", f"name:{word}"]) == 0
    asked = json.loads((out / "results.json").read_text())["settings"]["latents"]
    assert asked == read_names(sae).find(word)
