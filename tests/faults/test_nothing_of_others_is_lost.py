"""No command replaces or removes what this package did not write, whatever it is told."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.activations._stores import make_store
from tests.cli.conftest import images, sae
from vision_plugin.activations import ActivationStore, StoreError
from vision_plugin.cli import main
from vision_plugin.formats import convert

__all__ = ["images", "sae"]

HOOK = "blocks.1.hook_resid_post"
TRAIN = (
    f"train --model-name {{clip}} --images {{images}} --hook-name {HOOK} --architecture topk "
    "--training-tokens 640 --train-batch-size-tokens 64 --n-batches-in-buffer 4 --d-sae 8 --k 2 "
    "--n-checkpoints 2 --output-path {out}"
)
EXTRACT = (
    f"extract --model-name {{clip}} --images {{images}} --hook-names {HOOK} --n-workers 0 "
    "--output-path {out}"
)
DECOMPOSE = "decompose --model-name {clip} --images {images} --output-path {out}"
SPARSITY = "sparsity --saes {sae} --images {images} --output-path {out}"
REPORT = "report --sae {sae} --images {images} --output-path {out} --features 1"
EVAL = "eval --sae {sae} --images {images} --metrics fvu --controls neurons --output-path {out}"
STEER = "steer --sae {sae} --images {images} --latents 1 --concepts labels --output-path {out}"
DEMO = "demo --output-path {out} --training-images 8 --images 8"


@pytest.fixture
def run(
    tiny_clip: str, images: str, sae: str, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Run a line; its exit status, and the last line on the error stream."""

    def command(line: str, out: Path, *more: str) -> tuple[int, str]:
        places = {"clip": tiny_clip, "images": images, "sae": sae, "out": str(out)}
        status = main([*line.format(**places).split(), *more])
        return status, (capsys.readouterr().err.strip().splitlines() or [""])[-1]

    return command


def photos(folder: Path) -> Path:
    """A folder of somebody's own."""
    (folder / "trip").mkdir(parents=True)
    (folder / "trip" / "beach.png").write_bytes(b"a photograph")
    (folder / "list.txt").write_text("what is where")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        (TRAIN, ()),
        (TRAIN, ("--overwrite",)),
        (EXTRACT, ()),
        (EXTRACT, ("--overwrite",)),
        (SPARSITY, ()),
        (REPORT, ()),
        ("convert --sae {sae} --output-path {out}", ()),
    ],
)
def test_a_folder_of_photographs_is_left_alone(
    line: str, flags: tuple[str, ...], run: Any, tmp_path: Path
) -> None:
    mine = photos(tmp_path / "photos")
    before = content(tmp_path)
    status, said = run(line, mine, *flags)
    assert status == 2
    assert str(mine) in said
    assert content(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize("line", [EVAL, STEER])
@pytest.mark.parametrize("text", ["{}", '{"schema": "my own"}', "pixels", ""])
def test_a_file_that_no_command_wrote_is_left_alone(
    line: str, text: str, run: Any, tmp_path: Path
) -> None:
    mine = tmp_path / "thesis.json"
    mine.write_text(text)
    status, said = run(line, mine)
    assert status == 2
    assert f"{mine} was not written by this command" in said
    assert mine.read_text() == text


@pytest.mark.parametrize("line", [EVAL, STEER])
def test_a_file_of_the_same_command_is_replaced(line: str, run: Any, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    assert run(line, out)[0] == 0
    first = out.read_text()
    assert run(line, out)[0] == 0
    assert out.read_text() == first
    other = {EVAL: STEER, STEER: EVAL}[line]
    assert run(other, out)[0] == 2
    assert out.read_text() == first


def test_an_sae_is_replaced_and_not_what_somebody_put_beside_it(run: Any, tmp_path: Path) -> None:
    out = tmp_path / "sae"
    assert run(TRAIN, out)[0] == 0
    status, said = run(TRAIN, out)
    assert status == 2
    assert "--overwrite" in said
    assert run(TRAIN, out, "--overwrite", "--seed", "3")[0] == 0
    assert json.loads((out / "runner_cfg.json").read_text())["seed"] == 3
    for note in (out / "notes.txt", out / "figures" / "first.png"):
        note.parent.mkdir(exist_ok=True)
        note.write_text("mine")
        status, said = run(TRAIN, out, "--overwrite")
        assert status == 2
        assert note.relative_to(out).as_posix() in said
        assert note.read_text() == "mine"
        note.unlink()
        if note.parent != out:
            note.parent.rmdir()


def test_an_sae_that_somebody_else_trained_is_left_alone(run: Any, tmp_path: Path) -> None:
    from sae_lens import TopKSAE, TopKSAEConfig

    out = tmp_path / "sae"
    TopKSAE(TopKSAEConfig(d_in=8, d_sae=16, k=2)).save_model(str(out))
    before = content(out)
    status, said = run(TRAIN, out, "--overwrite")
    assert status == 2
    assert str(out) in said
    assert content(out) == before


@pytest.mark.slow
def test_what_lies_among_the_checkpoints_stays(run: Any, tmp_path: Path) -> None:
    beside = tmp_path / "sae.checkpoints"
    mine = photos(beside / "step-000000005")
    (beside / "notes.txt").write_text("mine")
    (beside / "step-7").mkdir()
    before = content(beside)
    assert run(TRAIN, tmp_path / "sae", "--overwrite")[0] == 0
    assert content(beside) == before
    assert mine.is_dir()
    assert (beside / "step-7").is_dir()
    assert run(TRAIN, tmp_path / "other")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "sae", "sae.checkpoints"]


def test_a_store_is_replaced_and_not_what_somebody_put_beside_it(
    run: Any, tmp_path: Path, images: str
) -> None:
    out = tmp_path / "store"
    make_store(out, 20)
    before = content(out)
    status, said = run(EXTRACT, out)
    assert status == 2
    assert "--overwrite" in said
    (out / "notes.txt").write_text("mine")
    status, said = run(EXTRACT, out, "--overwrite")
    assert status == 2
    assert "'notes.txt'" in said
    (out / "notes.txt").unlink()
    assert content(out) == before
    assert run(EXTRACT, out, "--overwrite")[0] == 0
    assert len(ActivationStore(out)) == 18
    assert not [path.name for path in out.iterdir() if "00002" in path.name]


def test_partial_files_of_others_stay(tmp_path: Path) -> None:
    out = tmp_path / "store"
    out.mkdir()
    (out / ".partial-draft.txt").write_text("mine")
    (out / ".partial-12-shard-00000.safetensors").write_text("of a killed extraction")
    make_store(out, 4)
    hidden = sorted(path.name for path in out.iterdir() if path.name.startswith("."))
    assert hidden == [".lock", ".partial-draft.txt"]


@pytest.mark.parametrize(
    ("line", "noun"),
    [(SPARSITY, "study"), pytest.param(REPORT, "report", marks=pytest.mark.slow)],
)
def test_a_result_is_replaced_and_not_what_somebody_put_into_it(
    line: str, noun: str, run: Any, tmp_path: Path
) -> None:
    out = tmp_path / "result"
    assert run(line, out)[0] == 0
    assert run(line, out)[0] == 0
    deep = out / "images" / "mine" if noun == "report" else out / "mine"
    for note in (out / "notes.txt", deep / "photo.png", deep):
        if note == deep:
            deep.mkdir()  # and nothing in it
        else:
            note.parent.mkdir(exist_ok=True)
            note.write_text("mine")
        status, said = run(line, out)
        assert status == 2
        assert noun in said
        assert note.relative_to(out).as_posix() in said
        assert note.exists()
        if note.is_file():
            note.unlink()
        if deep.is_dir():
            deep.rmdir()
    assert run(line, out)[0] == 0


def test_a_text_of_that_name_is_no_study(run: Any, tmp_path: Path) -> None:
    (tmp_path / "sparsity.txt").write_text("my notes on sparsity")
    status, said = run(SPARSITY, tmp_path)
    assert status == 2
    assert "'sparsity.txt'" in said
    assert content(tmp_path) == {"sparsity.txt": b"my notes on sparsity"}


def test_converting_replaces_an_sae_alone(sae: str, tmp_path: Path) -> None:
    mine = photos(tmp_path / "photos")
    before = content(mine)
    with pytest.raises(FileExistsError, match="left alone"):
        convert(sae, mine, overwrite=True)
    assert content(mine) == before
    convert(sae, tmp_path / "sae")
    first = content(tmp_path / "sae")
    with pytest.raises(FileExistsError, match="exists"):
        convert(sae, tmp_path / "sae")
    convert(sae, tmp_path / "sae", overwrite=True)
    assert content(tmp_path / "sae") == first


@pytest.mark.parametrize("part", ["sae", "activations", "report", "results.json"])
def test_the_demo_leaves_alone_what_no_demo_wrote(part: str, run: Any, tmp_path: Path) -> None:
    out = tmp_path / "X"
    out.mkdir()
    if part == "results.json":
        (out / part).write_text('{"of": "my experiment"}')
    else:
        photos(out / part)
    (out / "photo.png").write_text("mine")
    before = content(tmp_path)
    status, said = run(DEMO, out)
    assert status == 2
    assert str(out / part) in said
    assert content(tmp_path) == before
    assert sorted(path.name for path in out.iterdir()) == sorted([part, "photo.png"])


def test_the_demo_leaves_alone_what_lies_in_its_store(run: Any, tmp_path: Path) -> None:
    store = tmp_path / "X" / "activations"
    make_store(store, 4)
    (store / "notes.txt").write_text("mine")
    before = content(tmp_path)
    status, said = run(DEMO, tmp_path / "X")
    assert status == 2
    assert "'notes.txt'" in said
    assert content(tmp_path) == before


def test_a_damaged_plan_does_not_make_a_store_ours(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"of": "my garden"}')
    with pytest.raises(StoreError, match=r"plan\.json"):
        make_store(tmp_path, 4, overwrite=True)
    assert content(tmp_path) == {"plan.json": b'{"of": "my garden"}', ".lock": b""}


def test_a_link_is_followed_and_stays(run: Any, tmp_path: Path) -> None:
    assert run(TRAIN, tmp_path / "real")[0] == 0
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert run(TRAIN, tmp_path / "link", "--overwrite", "--seed", "3")[0] == 0
    assert os.path.islink(tmp_path / "link")  # noqa: PTH114
    assert json.loads((tmp_path / "real" / "runner_cfg.json").read_text())["seed"] == 3
