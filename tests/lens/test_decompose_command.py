"""``vision-plugin decompose``: its folder, and one sentence for what it cannot do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTModel

import vision_plugin as vp
from tests._clip import make_sae
from vision_plugin.cli import main


@pytest.mark.slow
def test_the_folder_holds_tables_figures_and_every_number(
    tiny_clip: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("a red circle\na blue square\na green star\n")
    line = ["decompose", "--model-name", tiny_clip, "--images", "demo:9@2", "--texts", str(texts)]
    line += ["--output-path", str(tmp_path / "out"), "--n-images", "6", "--batch-size", "4"]
    assert main([*line, "--layers", "2", "--n-texts", "2"]) == 0
    printed = capsys.readouterr().out
    assert "layer 2" in printed
    assert "TEXTSPAN" in printed
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"decomposition.json", "table.txt", "shares.png", "ablation.png", "maps.png"}
    found = json.loads((tmp_path / "out" / "decomposition.json").read_text())
    assert found["config"]["layers"] == 2
    assert len(found["ids"]) == 6
    parts = found["decomposition"]["parts"]
    assert sum(part["share"] for part in parts) == pytest.approx(1, abs=1e-4)
    assert len(found["heads"]) == 8
    # the shares are those of the embeddings, computed here from the model alone
    model = vp.load_model(tiny_clip)
    world = vp.demo.draw(9, seed=2)
    pixels = model.preprocess([world.images[i] for i in range(6)])
    length = model.encode_image(pixels, normalize=False).norm(dim=1).mean()
    assert found["decomposition"]["length"] == pytest.approx(float(length), rel=1e-4)
    assert main([*line, "--layers", "1"]) == 0  # its own folder may be replaced
    (tmp_path / "out" / "notes.txt").write_text("mine")
    assert main(line) == 2
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_labels_among_the_texts_give_an_accuracy(tmp_path: Path) -> None:
    line = ["decompose", "--model-name", "demo", "--images", "demo:24@2", "--texts", "labels"]
    line += ["--output-path", str(tmp_path / "out"), "--n-images", "24"]
    assert main(line) == 0
    found = json.loads((tmp_path / "out" / "decomposition.json").read_text())
    assert found["second_order"] is None
    rows = {row["name"]: row for row in found["ablation"]["rows"]}
    assert rows["nothing"]["accuracy"] > 0.5
    assert rows["all attention"]["accuracy"] < rows["nothing"]["accuracy"]


@pytest.mark.slow
def test_what_later_heads_make_of_neurons_and_latents_is_there_when_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    line = ["decompose", "--model-name", "demo", "--images", "demo:12@2", "--texts", "demo"]
    line += ["--output-path", str(out), "--n-images", "12"]
    made = make_sae("blocks.1.hook_resid_post", 128)
    made.save_model(tmp_path / "sae")
    model = vp.load_model("demo")
    pixels = model.preprocess([vp.demo.draw(12, seed=2).images[i] for i in range(12)])
    for asked, source in (("1", 1), (str(tmp_path / "sae"), made)):
        assert main([*line, "--second-order", asked, "--components", "3", "7"]) == 0
        found = json.loads((out / "decomposition.json").read_text())["second_order"]
        assert [one["component"] for one in found["components"]] == [3, 7]
        assert all(one["words"] for one in found["components"])
        own = vp.lens.second_order(model, pixels, source, which=[3, 7], progress=False)
        strength = [one["strength"] for one in found["components"]]
        assert strength == pytest.approx(own.strength().tolist(), rel=1e-3)
        assert (out / "second_order.png").is_file()
    assert "first direction" in capsys.readouterr().out
    assert main([*line, "--components", "3"]) == 2
    assert "--second-order" in capsys.readouterr().err


def test_without_texts_shares_and_cosines_are_left(tiny_clip: str, tmp_path: Path) -> None:
    line = ["decompose", "--model-name", tiny_clip, "--images", "demo:4@2"]
    assert main([*line, "--output-path", str(tmp_path / "out")]) == 0
    assert not (tmp_path / "out" / "maps.png").exists()
    found = json.loads((tmp_path / "out" / "decomposition.json").read_text())
    assert found["heads"] == []
    assert found["ablation"]["rows"][0]["agreement"] is None


def saved_tower(folder: Path) -> str:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    small = {**sizes, "num_hidden_layers": 2, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(**small)).save_pretrained(folder)
    _save_processor(folder)
    return str(folder)


def saved_vit(folder: Path) -> str:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    torch.manual_seed(0)
    ViTModel(ViTConfig(**sizes, num_hidden_layers=2, image_size=32, patch_size=8)).save_pretrained(
        folder
    )
    _save_processor(folder)
    return str(folder)


def _save_processor(folder: Path) -> None:
    from transformers import CLIPImageProcessor

    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)


@pytest.mark.parametrize(
    ("model", "texts", "more", "sentence"),
    [
        ("tower", "one\ntwo\n", [], "has no text tower to embed texts="),
        ("vit", None, [], "ends in a pooler with a tanh"),
        ("tiny", "", [], "has no texts; write one per line of a text file"),
        ("tiny", "one\n", ["--template", "no place"], "must have one {}"),
        ("tiny", "one\n", ["--layers", "0"], "must be at least 1"),
        ("tiny", "one\n", ["--texts", "/nowhere.txt"], "there is no such file"),
        ("tiny", "one\n", ["--images", "/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(
    model: str,
    texts: str | None,
    more: list[str],
    sentence: str,
    tiny_clip: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = {"tower": saved_tower, "vit": saved_vit}
    folder = tiny_clip if model == "tiny" else made[model](tmp_path / model)
    line = ["decompose", "--model-name", folder, "--images", "demo:3@2"]
    line += ["--output-path", str(tmp_path / "out")]
    if texts is not None:
        (tmp_path / "texts.txt").write_text(texts)
        line += ["--texts", str(tmp_path / "texts.txt")]
    assert main([*line, *more]) == 2
    said = capsys.readouterr().err.strip()
    assert sentence.replace("texts=", "--texts") in said.splitlines()[-1]
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()
