"""One SAE over workers by the command: here, under torchrun, and under Ray Train, killed there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sae import _runs
from tests.scale._cluster import COMMAND, Cluster, kill, patience, title, tree, until
from tests.scale._extraction import finished
from tests.scale._here import here
from vision_plugin.cli import main

ENV = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONDONTWRITEBYTECODE": "",
    "MKL_CBWR": "AUTO,STRICT",
    "HF_HUB_OFFLINE": "1",
}
FLAGS = (
    *("--model-name", "demo", "--hook-name", "blocks.1.hook_resid_post"),
    *("--d-sae", "96", "--k", "6"),
    *("--train-batch-size-tokens", "256", "--device", "cpu", "--n-quality-tokens", "512"),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the packaged model's activations."""
    folder = tmp_path_factory.mktemp("store") / "acts"
    images = ("--model-name", "demo", "--images", "demo:64@0", "--n-workers", "0")
    hooks = ("--hook-names", "blocks.1.hook_resid_post", "--output-path", str(folder))
    here("extract", *images, *hooks, "--images-per-shard", "16", "--device", "cpu")
    return folder


@pytest.fixture(scope="module")
def one(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE that this process trained alone, in lanes."""
    folder = tmp_path_factory.mktemp("one") / "sae"
    here(*flags(store, folder, 4096, "--share", "lanes"))
    return folder


def run(*command: str) -> str:
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def flags(store: Path, out: Path, n_tokens: int = 8192, *more: str) -> list[str]:
    path = ("--images", str(store), "--output-path", str(out))
    return ["train", *path, *FLAGS, "--training-tokens", str(n_tokens), *more]


@pytest.mark.slow
def test_two_workers_by_the_command_have_the_bits_of_one(
    store: Path, one: Path, tmp_path: Path
) -> None:
    two = tmp_path / "two"
    said = run(COMMAND, *flags(store, two, 4096, "--workers", "2"))
    assert _runs.weights(two) == _runs.weights(one)
    assert said.count("Trained a batchtopk SAE") == 1


def test_what_workers_refuse_is_one_sentence_before_any_starts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = flags(Path("demo:4"), tmp_path / "out", 4096, "--workers", "2", "--n-lanes", "3")
    assert main(line) == 2
    told = capfd.readouterr().err.splitlines()
    assert told == ["vision-plugin train: --n-lanes 3: use a power of two, such as 4 or 8"]


@pytest.mark.scale
def test_torchrun_runs_the_same_command_to_the_same_bits(
    store: Path, one: Path, tmp_path: Path
) -> None:
    two = tmp_path / "two"
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    run(
        *(torchrun, "--standalone", "--no-python", "--nproc-per-node", "2"),
        *(COMMAND, *flags(store, two, 4096)),
    )
    assert _runs.weights(two) == _runs.weights(one)


@pytest.mark.scale
def test_ray_train_ends_with_the_bits_of_one_process_whatever_dies(
    store: Path, tmp_path: Path
) -> None:
    """Two workers; one is killed, then its node, which comes back: 2, 2, 1 and 2 workers."""
    straight, out = tmp_path / "straight", tmp_path / "out"
    often = ("--n-checkpoints", "60")
    here(*flags(store, straight, 130_000, "--share", "lanes", *often))
    checkpoints = out.with_name("out.checkpoints")

    def steps() -> int:
        found = [int(path.name[5:]) for path in checkpoints.glob("step-*")]
        return max(found, default=0)

    with Cluster() as cluster:
        cluster.env["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = f"{patience(30):.0f}"
        head = cluster.start(head=True)
        node = cluster.start()
        command = cluster.command(*flags(store, out, 130_000, "--workers", "2", *often))

        def members(of: int) -> set[int]:
            return {p for p in tree(of) if "RayTrainWorker" in title(p)}

        until(lambda: steps() > 50, 240, "a checkpoint")
        killed_at = steps()
        kill(members(node.pid))
        until(lambda: steps() > killed_at + 100, 240, "training to go on")
        killed_at = steps()
        cluster.end(node)
        until(lambda: steps() > killed_at + 100 or command.poll() is not None, 240, "one worker")
        cluster.start()
        finished(command, 300)
        assert head.poll() is None
    assert killed_at < 130_000 // 256, "the node was killed too late to matter"
    assert _runs.weights(out) == _runs.weights(straight)
    assert not list(tmp_path.glob(".out*")), "Ray Train's notes stayed"
