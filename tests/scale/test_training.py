"""Whole runs in lanes, killed and continued on another number of workers; groups of SAEs."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist

from tests.sae import _runs
from tests.scale._workers import together
from vision_plugin.sae import VisionSAERunnerConfig, streams, train_many
from vision_plugin.scale import ClusterError, RayEngine, train_by_latents, train_in_lanes
from vision_plugin.scale._groups import GroupWork, train_group
from vision_plugin.scale._versions import Home

EVERY = 4


def run_of(path: Path, store: Path, **changes: Any) -> VisionSAERunnerConfig:
    return _runs.config(path, "batchtopk", images=str(store), n_checkpoints=EVERY, **changes)


def train(path: Path, store: Path, monkeypatch: Any = None, kill_at: int = -1) -> None:
    """Train in four lanes; kill every worker in the middle of a step."""
    if kill_at >= 0:
        _runs.stop_at(monkeypatch, kill_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
    train_in_lanes(run_of(path, store), n_lanes=4)


@pytest.mark.slow
def test_killed_workers_continue_on_another_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(1)
    store = tmp_path / "store"
    _runs.store_of(store)
    assert together(1, lambda: train(tmp_path / "straight", store)) == [0]
    out = tmp_path / "out"
    assert together(2, lambda: train(out, store, monkeypatch, 7)) == [-signal.SIGKILL] * 2
    assert not out.exists()
    assert together(1, lambda: train(out, store, monkeypatch, 13)) == [-signal.SIGKILL]
    assert together(2, lambda: train(out, store)) == [0, 0]
    assert not dist.is_initialized()
    assert _runs.weights(out) == _runs.weights(tmp_path / "straight")
    assert not list(tmp_path.glob("out.checkpoints*"))


@pytest.mark.slow
def test_killed_holders_of_latents_continue_on_another_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, where 24 steps cannot make rounding large."""
    torch.set_num_threads(1)
    store = tmp_path / "store"
    _runs.store_of(store)

    def train(path: Path, kill_at: int = -1) -> None:
        if kill_at >= 0:
            _runs.stop_at(monkeypatch, kill_at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        sae = _runs.ARCHITECTURES["batchtopk"](dtype="float64")
        train_by_latents(run_of(path, store, sae=sae, dtype="float64"))

    assert together(1, lambda: train(tmp_path / "straight")) == [0]
    out = tmp_path / "out"
    assert together(2, lambda: train(out, 7)) == [-signal.SIGKILL] * 2
    assert together(1, lambda: train(out, 13)) == [-signal.SIGKILL]
    assert together(4, lambda: train(out)) == [0] * 4
    found, straight = (
        load_file(path / "sae_weights.safetensors") for path in (out, tmp_path / "straight")
    )
    for name, tensor in straight.items():
        assert torch.allclose(found[name], tensor, rtol=1e-9, atol=1e-12), name


def many(store: Path) -> dict[str, VisionSAERunnerConfig]:
    """Three runs, two of which share a pass over the images."""
    wide = run_of(Path("unused"), store)
    return {
        "batchtopk": wide,
        "topk": dataclasses.replace(wide, sae=_runs.ARCHITECTURES["topk"]()),
        "seeded": dataclasses.replace(wide, seed=7),
    }


def test_a_group_that_is_done_is_not_trained_again(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    store = tmp_path / "store"
    _runs.store_of(store)
    cfgs = many(store)
    assert [list(group) for group in streams(cfgs)] == [["batchtopk", "topk"], ["seeded"]]
    group = streams(cfgs)[0]
    work = GroupWork(group, str(tmp_path / "group"), Home())
    train_group(work)
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "group").rglob("*.safetensors")}
    assert len(made) >= 2
    train_group(work)
    assert all(path.stat().st_mtime_ns == when for path, when in made.items())
    train_many(group, output_path=str(tmp_path / "local"))
    for name in group:
        assert _runs.weights(tmp_path / "group" / name) == _runs.weights(tmp_path / "local" / name)


@pytest.mark.parametrize(
    ("address", "token", "said"),
    [
        ("127.0.0.1:1", "x", "nothing answers at address=127.0.0.1:1 .*ray start --head"),
        ("nowhere", "x", "use auto, or HOST:PORT"),
        ("127.0.0.1:1", "", "there is no token for the cluster"),
    ],
)
def test_a_cluster_that_does_not_answer_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, address: str, token: str, said: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", token)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    with pytest.raises(ClusterError, match=said), RayEngine(address):
        pass


def test_other_versions_elsewhere_are_one_sentence() -> None:
    with pytest.raises(ClusterError, match=r"has other versions .* \(torch .* there, 0.1 here\)"):
        Home(versions={"torch": "0.1"}, variables={}).settle()


@pytest.mark.slow
def test_without_ray_the_engine_is_one_sentence(tmp_path: Path) -> None:
    """A fresh process in which Ray cannot be imported."""
    code = (
        "import sys; sys.modules['ray'] = None; from vision_plugin.cli import main;"
        "sys.exit(main(sys.argv[1:]))"
    )
    hook = ("--hook-names", "blocks.1.hook_resid_post")
    flags = ("--model-name", "demo", "--images", "demo:4", *hook)
    line = [sys.executable, "-c", code, "extract", *flags, "--output-path", str(tmp_path / "out")]
    done = subprocess.run([*line, "--engine", "ray"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "vision-plugin extract: --engine 'ray' needs Ray; install it with 'pip install "
        "vision-plugin[ray]'"
    )
    assert "Traceback" not in done.stderr
