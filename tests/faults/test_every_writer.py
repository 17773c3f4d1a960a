"""A full disk, a kill and a second process at every command that writes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests._processes import ended, in_child, kill_at_change
from tests.cli.conftest import images, sae
from tests.faults.test_nothing_of_others_is_lost import (
    DECOMPOSE,
    EVAL,
    EXTRACT,
    REPORT,
    SPARSITY,
    STEER,
    TRAIN,
    content,
)
from vision_plugin.cli import main
from vision_plugin.formats import convert

__all__ = ["images", "sae"]

pytestmark = pytest.mark.usefixtures("one_thread")

CONVERT = "convert --sae {sae} --output-path {out}"
WRITERS = {
    "extract": EXTRACT,
    "train": TRAIN + " --overwrite",
    "eval": EVAL,
    "sparsity": SPARSITY,
    "decompose": DECOMPOSE,
    "steer": STEER,
    "report": REPORT,
    "convert": CONVERT,
}
ROOM = {"extract": 3000, "steer": 200}
"""Bytes that a file may have; one is larger in each command."""


@pytest.fixture
def words(tiny_clip: str, images: str, sae: str) -> Callable[[str, Path], list[str]]:
    """The words of a command."""
    places = {"clip": tiny_clip, "images": images, "sae": sae}
    return lambda line, out: line.format(**places, out=out).split()


@pytest.mark.slow
@pytest.mark.parametrize("command", WRITERS)
def test_a_full_disk_is_one_sentence_and_loses_nothing(
    command: str, words: Any, tmp_path: Path
) -> None:
    out, told = tmp_path / "out", tmp_path / "told"
    line = words(WRITERS[command], out)
    if command not in ("convert", "extract"):  # these two write over nothing
        assert main(line) == 0
    before = content(tmp_path)

    def with_little_room() -> None:
        said = io.StringIO()
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM.get(command, 1000), limits[1]))
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            status = main(line)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        told.write_text(f"{status}\n{said.getvalue()}")

    assert ended(in_child(with_little_room)) == 0
    status, *said = told.read_text().splitlines()
    told.unlink()
    assert status == "1", said
    told_of = [line.partition(f"vision-plugin {command}: ")[2] for line in said]
    (sentence,) = filter(None, told_of)  # a bar may stand before it
    assert "no room to write" in sentence
    assert "again" in sentence
    found = content(tmp_path)
    if command == "extract":
        found = {name: text for name, text in found.items() if name.startswith("out/shard-")}
    if command == "train":  # its checkpoints stay where there was room for any
        found = {name: text for name, text in found.items() if ".checkpoints" not in name}
    assert found == before
    assert main(line) == 0


def test_converting_is_all_or_nothing_at_a_kill_at_each_change(sae: str, tmp_path: Path) -> None:
    convert(sae, tmp_path / "right")
    whole, survived = content(tmp_path / "right"), False
    for number in range(1, 60, 2):
        out = tmp_path / str(number) / "sae"

        def work(out: Path = out, number: int = number) -> None:
            kill_at_change(number)
            convert(sae, out)

        survived = ended(in_child(work)) == 0
        if out.exists():
            assert content(out) == whole
        convert(sae, out, overwrite=True)
        assert content(out.parent) == {f"sae/{name}": text for name, text in whole.items()}
        if survived:
            break
    assert survived


@pytest.mark.parametrize(
    "command",
    ["eval", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sparsity", "steer"))],
)
def test_a_command_that_is_killed_at_some_moment_and_run_again(
    command: str, words: Any, tmp_path: Path
) -> None:
    line = words(WRITERS[command], tmp_path / "a" / "out")
    start = time.monotonic()
    assert main(line) == 0
    seconds = time.monotonic() - start
    whole = content(tmp_path / "a")
    ends = []
    for moment in (0.3, 0.7, 0.9, 0.97):
        child = in_child(lambda: main(line))
        time.sleep(seconds * moment)
        os.kill(child, signal.SIGKILL)
        ends.append(ended(child))
        found = {n: t for n, t in content(tmp_path / "a").items() if not n.startswith(".")}
        assert found == whole
    assert -signal.SIGKILL in ends, "no kill came before the end"
    assert main(line) == 0
    assert content(tmp_path / "a") == whole


def test_a_run_of_several_that_was_killed_while_it_saved_them_goes_on(
    tiny_clip: str, images: str, tmp_path: Path
) -> None:
    from sae_lens import TopKTrainingSAEConfig

    import vision_plugin as vp

    cfgs = {
        name: vp.VisionSAERunnerConfig(
            sae=TopKTrainingSAEConfig(d_in=32, d_sae=8, k=k),
            model_name=tiny_clip,
            images=images,
            hook_name="blocks.1.hook_resid_post",
            training_tokens=320,
            train_batch_size_tokens=64,
            n_batches_in_buffer=4,
            n_checkpoints=2,
        )
        for name, k in (("two", 2), ("three", 3))
    }
    out = tmp_path / "killed" / "out"

    def work() -> None:
        replace = Path.replace

        def killing(self: Path, target: Path) -> Path:
            if (out / "two").exists():  # and the other is about to be put in place
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(self, target)

        Path.replace = killing  # type: ignore[method-assign,assignment]
        vp.train_many(cfgs, output_path=str(out))

    assert ended(in_child(work)) == -signal.SIGKILL
    assert list(weights(out)) == ["two"]
    vp.train_many(cfgs, output_path=str(out))
    assert not out.with_name("out.checkpoints").exists()
    vp.train_many(cfgs, output_path=str(tmp_path / "straight"))
    assert weights(out) == weights(tmp_path / "straight")


def weights(out: Path) -> dict[str, bytes]:
    """Bytes of the weights of each SAE."""
    return {p.parent.name: p.read_bytes() for p in sorted(out.glob("*/sae_weights.safetensors"))}


def test_two_evaluations_into_one_file(words: Any, tmp_path: Path) -> None:
    line = words(EVAL, tmp_path / "scores.json")
    children = [in_child(lambda: _exit(main(line))) for _ in range(2)]
    assert [ended(child) for child in children] == [0, 0]
    assert json.loads((tmp_path / "scores.json").read_text())["n_images"] == 18
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def _exit(status: int) -> None:
    os._exit(status)
