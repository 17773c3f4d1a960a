"""The commands of the lenses: what they print and write, and one sentence for bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from vision_plugin.cli import main


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An SAE of random weights at the demo CLIP's last block but one."""
    from sae_lens import TopKSAE, TopKSAEConfig

    torch.manual_seed(0)
    one = TopKSAE(TopKSAEConfig(d_in=128, d_sae=256, k=12))
    one.cfg.metadata.hook_name = "blocks.2.hook_resid_post"
    one.cfg.metadata.model_name = "demo"
    one.cfg.metadata.tokens = "cls"
    folder = tmp_path_factory.mktemp("sae") / "sae"
    one.save_model(str(folder))
    return str(folder)


@pytest.mark.slow
def test_a_bottleneck_is_fitted_explained_and_written(sae: str, tmp_path: Path, capsys) -> None:
    names = tmp_path / "names.json"
    names.write_text(json.dumps({"3": "three", "5": "five"}))
    out = tmp_path / "bottleneck"
    assert (
        main(
            ["bottleneck", "--sae", sae, "--images", "demo:200", "--labels", "column:texture",
             "--names", str(names), "--remove", "three", "5", "--l1", "1", "--learning-rates",
             "0.05", "--epochs", "20", "--output-path", str(out)]
        )
        == 0
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "probe_embedding" in printed
    assert "without three, five" in printed
    assert "concepts per decision" in printed
    content = json.loads((out / "results.json").read_text())
    assert content["settings"]["l1"] == [1.0]
    assert content["rows"][-2]["removed"] == 2
    assert not Path(sae, "evaluation.json").exists()


def test_images_become_words(tmp_path: Path, capsys) -> None:
    out = tmp_path / "words"
    assert (
        main(
            ["splice", "--model-name", "demo", "--images", "demo:40", "--vocabulary", "demo",
             "--l1", "0.1", "0.3", "--remove", "red", "--output-path", str(out)]
        )
        == 0
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "words per image" in printed
    assert "without red" in printed
    assert (out / "curve.png").is_file()


@pytest.mark.slow
def test_every_lens_writes_its_folder(tmp_path: Path, capsys) -> None:
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=8, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path / "vit"
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    common = ["--images", "demo:50", "--output-path"]
    asked = {
        "classes": ["--model-name", str(folder)],
        "text": ["--model-name", "demo", "--texts", "column:colour"],
        "language": ["--model-name", "demo", "--prompt", "What colour is shown?", "--top", "2"],
    }
    for name, flags in asked.items():
        out = tmp_path / name
        assert main(["lens", name, *flags, *common, str(out)]) == 0
        content = json.loads((out / "results.json").read_text())
        assert content["schema"] == f"vision_plugin.lens/{name}/1"
    printed = capsys.readouterr().out
    assert "identifiability" in (tmp_path / "classes" / "table.txt").read_text()
    assert "tuned" in printed
    assert (tmp_path / "language" / "image-49.html").is_file()
    text = json.loads((tmp_path / "text" / "results.json").read_text())
    assert "accuracy" in text["rows"][0]


@pytest.mark.slow
def test_objects_that_are_not_there(tmp_path: Path, capsys) -> None:
    out = tmp_path / "objects"
    flags = ["--n-images", "66", "--absent", "1", "--layers", "1", "--weights", "2", "--strengths",
             "3", "--demonstrations", "2", "--n-masks", "2", "--n-random", "1"]  # fmt: skip
    assert main(["hallucination", *flags, "--output-path", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "project_away:hidden" in printed
    assert "internal vocabulary" in printed
    assert (out / "edits" / "vti-textual.json").is_file()


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (["splice", "--images", "demo:4", "--vocabulary", "demo"], "--model-name"),
        (["splice", "--model-name", "demo", "--images", "demo:4", "--vocabulary", "{empty}"],
         "the vocabulary is empty"),
        (["splice", "--model-name", "demo", "--images", "demo:4", "--vocabulary", "nowhere.txt"],
         "there is no such file"),
        (["bottleneck", "--sae", "{sae}", "--images", "demo:30"], "a bottleneck needs 10"),
        (["bottleneck", "--sae", "{sae}", "--images", "demo:30", "--epochs", "0"],
         "--epochs 0 must be at least 1"),
        (["lens", "--x"], "there is no lens '--x'"),
        (["lens", "text", "--images", "demo:4", "--texts", "labels"], "--model-name"),
        (["lens", "classes", "--model-name", "demo", "--images", "demo:4"], "has no classes"),
        (["hallucination", "--n-images", "20"], "give more images"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(
    line: list[str], sentence: str, sae: str, tmp_path: Path, capsys
) -> None:
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    out = tmp_path / "out"
    filled = [part.format(sae=sae, empty=empty) for part in line]
    if line[1] != "--x":
        filled += ["--output-path", str(out)]
    assert main(filled) == 2
    error = capsys.readouterr().err
    # A process of its own shows no bars; this one has loaded transformers before.
    said = [line for line in error.splitlines() if line and not line.startswith("Loading weights")]
    assert len(said) == 1
    assert sentence in said[0]
    assert not out.exists()
