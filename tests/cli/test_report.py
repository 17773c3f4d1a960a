"""What ``vision-plugin report`` finds beside an SAE, what it asks for, what it says at the end."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch

import vision_plugin as vp
from tests._clip import make_sae
from vision_plugin.cli import main


def read_data(folder: Path) -> Any:
    text = (folder / "data.js").read_text(encoding="ascii")
    return json.loads(text.split(" = ", 1)[1].rstrip()[:-1])


@pytest.fixture
def copied(sae: str, tmp_path: Path) -> Path:
    """The SAE in a folder that others may be put beside."""
    folder = tmp_path / "an sae"
    shutil.copytree(sae, folder)
    return folder


def words(line: str, sae: Path, images: str, out: Path) -> list[str]:
    place = {"SAE": str(sae), "IMAGES": images, "OUT": str(out)}
    return [place.get(word, word) for word in line.split()]


def test_what_lies_beside_the_sae_is_shown(
    copied: Path, images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pages"
    vocabulary = tmp_path / "words.txt"
    vocabulary.write_text("a red circle\na blue square\na green star\n")
    made = "name --sae SAE --images demo:24@2 --methods decoder --vocabulary"
    assert main([*words(made, copied, images, out), str(vocabulary)]) == 0
    scored = "eval --sae SAE --images IMAGES --metrics fvu sparsity --controls neurons"
    assert main(words(scored, copied, images, out)) == 0
    assert "vision-plugin report --sae" in capsys.readouterr().out.splitlines()[-1]
    log = [{"step": 10, "l0": 8.0}, {"step": 20, "l0": 9.0}]
    (copied / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    kinds = [{"kind": "patch", "l0": 4.0, "explained_variance": 0.5}]
    study = {"schema": "vision_plugin.sparsity/1"}
    study["saes"] = [{"layer": layer, "kinds": kinds} for layer in (1, 3)]  # type: ignore[assignment]
    (copied / "sparsity.json").write_text(json.dumps(study))

    place = copied / "report"
    assert (
        main(words("report --sae SAE --images IMAGES --output-path OUT", copied, images, place))
        == 0
    )
    assert capsys.readouterr().out.splitlines()[-1] == f"Open {place}/index.html in a browser."
    names = vp.lens.read_names(copied)
    data = read_data(place)
    assert data["names"] == [name or "" for name in names.names]
    summary = (place / "summary.html").read_text()
    for text in ("explained variance", "L0 by layer", "By layer", "Training"):
        assert text in summary
    # The next evaluation ends with the address of the report that is there.
    assert main(words(scored, copied, images, out)) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Open {place}/index.html in a browser."


def test_names_of_a_file_and_those_of_another_sae(
    copied: Path,
    images: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    vocabulary = tmp_path / "words.txt"
    vocabulary.write_text("a red circle\na blue square\n")
    made = "name --sae SAE --images demo:24@2 --methods decoder --output-path OUT --vocabulary"
    assert main([*words(made, copied, images, tmp_path / "mine.json"), str(vocabulary)]) == 0
    line = "report --sae SAE --images IMAGES --features 1 2 --output-path OUT"
    flags = words(line, copied, images, tmp_path / "pages")
    assert main([*flags, "--names", str(tmp_path / "mine.json")]) == 0
    names = vp.lens.read_names(tmp_path / "mine.json")
    assert read_data(tmp_path / "pages")["names"] == [name or "" for name in names.names[1:3]]
    shutil.copy(tmp_path / "mine.json", copied / "names.json")
    other = sae_lens.SAE.load_from_disk(copied)
    with torch.no_grad():
        other.W_dec.copy_(other.W_dec.flip(0))
    other.save_model(copied)
    assert main(flags) == 0
    assert "the report shows no names of names.json" in caplog.text
    assert read_data(tmp_path / "pages")["names"] is None
    assert main([*flags, "--names", str(copied / "names.json")]) == 2
    assert "another one" in capsys.readouterr().err


def test_answers_of_a_language_model_are_asked_for_or_read(
    images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = make_sae("blocks.2.hook_resid_post", 128)
    sae.cfg.metadata.tokens = "patch"
    sae.save_model(str(tmp_path / "sae"))
    line = "report --sae SAE --images IMAGES --model-name demo --features 3 5 --output-path OUT"
    flags = words(line, tmp_path / "sae", images, tmp_path / "r")
    asked = ["--vlm", "demo", "--asked", "5", "--prompts", "What colour is shown?"]
    assert main([*flags, *asked, "--strengths", "400", "--n-asked-images", "2"]) == 0
    page = (tmp_path / "r" / "features" / "5.html").read_text()
    assert page.count("What colour is shown?") == 2
    assert "What the language model says" not in (tmp_path / "r/features/3.html").read_text()
    vlm = vp.load_vlm("demo")
    source = vp.open_images(images)
    shown = [source[0], source[len(source) // 2]]
    found = vp.tasks.feature_answers(
        vlm, sae, shown, [3], prompts=["What colour is shown?"], strengths=[400.0]
    )
    for said in (*found.answers[0].before,):
        assert f"<bdi>{said}</bdi>" in page
    (tmp_path / "said.json").write_text(json.dumps(found.to_dict()))
    assert main([*flags, "--answers", str(tmp_path / "said.json")]) == 0
    page = (tmp_path / "r" / "features" / "3.html").read_text()
    assert page.count("What colour is shown?") == 2


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--vlm demo", "name the latents that vlm is asked about"),
        ("--vlm demo --features 1 --answers a.json", "leave out --vlm or --answers"),
        ("--asked 1", "needs a vision-language model"),
        ("--strengths 9", "has nothing to show"),
        ("--vlm demo --features 1 --n-asked-images 0", "--n-asked-images 0"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    flags: str, why: str, sae: str, images: str, tmp_path: Path, capsys: Any
) -> None:
    line = f"report --sae SAE --images IMAGES --output-path OUT {flags}"
    assert main(words(line, Path(sae), images, tmp_path / "r")) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("content", ["{}", '{"answers": 3}', '{"answers": [{}]}', "no json"])
def test_a_file_that_holds_no_answers_is_refused(
    content: str, sae: str, images: str, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "a.json").write_text(content)
    line = "report --sae SAE --images IMAGES --features 1 --output-path OUT --answers"
    flags = words(line, Path(sae), images, tmp_path / "r")
    assert main([*flags, str(tmp_path / "a.json")]) == 2
    assert "answers" in capsys.readouterr().err or content == "no json"
    assert not (tmp_path / "r").exists()


def test_open_opens_the_index_in_the_users_browser(
    sae: str, images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The browser is a program of the user's choice, that writes down what it is to open."""
    browser = tmp_path / "browser"
    browser.write_text(
        f'#!{sys.executable}\nimport sys\nopen("{tmp_path}/opened", "w").write(sys.argv[1])\n'
    )
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", str(browser))
    import importlib
    import webbrowser

    importlib.reload(webbrowser)
    line = "report --sae SAE --images IMAGES --features 1 --output-path OUT --open"
    assert main(words(line, Path(sae), images, tmp_path / "a b")) == 0
    assert (tmp_path / "opened").read_text() == (tmp_path / "a b" / "index.html").as_uri()
