"""``vision-plugin extract``, ``verify`` and ``info`` at work on real folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.activations._stores import MLP, RESID, make_store
from vision_plugin.activations import ActivationStore
from vision_plugin.cli import main

HOOKS = ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]


def test_extract_then_info_then_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(tmp_path / "s")
    flags = ["--model-name", "demo", "--images", "demo:6", "--tokens", "cls", "--n_workers", "0"]
    assert main(["extract", *flags, "--hook-names", *HOOKS, "--output-path", path]) == 0
    told = capsys.readouterr().out
    store = ActivationStore(path)
    assert len(store) == 6
    assert store.hook_names == HOOKS
    assert main(["info", path]) == 0
    shown = capsys.readouterr().out
    assert "".join(shown.split()) == "".join(told.split())
    for fact in ("complete: True", "n_images: 6", "dtype: float32", *HOOKS):
        assert fact in shown
    assert main(["verify", path]) == 0
    assert "complete, 1 shards, 6 images" in " ".join(capsys.readouterr().out.split())


def test_verify_fails_and_names_each_damaged_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_store(tmp_path / "s", 20, hook_names=[RESID, MLP])
    for name in ("shard-00000.safetensors", "shard-00002.safetensors"):
        raw = bytearray((tmp_path / "s" / name).read_bytes())
        raw[-1] ^= 1
        (tmp_path / "s" / name).write_bytes(raw)
    assert main(["verify", str(tmp_path / "s")]) == 1
    said = capsys.readouterr().err
    assert "shard-00000.safetensors" in said
    assert "shard-00001" not in said
    assert "shard-00002.safetensors" in said


@pytest.mark.parametrize("command", ["verify", "info"])
def test_what_is_no_store_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert main([command, str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "no activation store" in said
    assert len(said.splitlines()) == 1
