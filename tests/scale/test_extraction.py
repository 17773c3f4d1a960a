"""An extraction on a real cluster, whose workers, nodes, head and driver are killed."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.activations._stores import content
from tests.scale._cluster import COMMAND, Cluster, kill, until
from vision_plugin.activations import verify

N_SHARDS = 40
FLAGS = (
    *("--model-name", "demo", "--images", f"demo:{N_SHARDS * 16}@0"),
    *("--hook-names", "blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"),
    *("--images-per-shard", "16", "--batch-size", "16", "--n-workers", "0", "--device", "cpu"),
)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store that one process makes."""
    folder = tmp_path_factory.mktemp("straight") / "store"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": ""}
    done = subprocess.run(
        [COMMAND, "extract", *FLAGS, "--output-path", str(folder)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


def shards(folder: Path) -> int:
    return len(list(folder.glob("shard-*.json")))


def finished(command: subprocess.Popen[str], seconds: float = 240) -> str:
    said, _ = command.communicate(timeout=seconds)
    assert command.returncode == 0, said
    return said


def times(folder: Path) -> dict[str, int]:
    """When each marker was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.json")}


def test_a_killed_worker_changes_nothing(straight: Path, tmp_path: Path) -> None:
    """The short form: two nodes, a worker killed, and the bytes of one process."""
    out = tmp_path / "store"
    with Cluster() as cluster:
        cluster.start(head=True)
        node = cluster.start()
        command = cluster.command("extract", *FLAGS, "--output-path", str(out))
        until(lambda: shards(out) >= 3, 120, "three shards")
        victims = cluster.workers(node, "make_shard")
        if not victims:
            until(lambda: cluster.workers(node, "make_shard"), 60, "work on the second node")
            victims = cluster.workers(node, "make_shard")
        kill(victims)
        there = shards(out)
        finished(command)
    assert there < N_SHARDS, "the worker was killed too late to matter"
    assert content(out) == content(straight)


@pytest.mark.scale
def test_the_same_command_ends_with_the_same_bytes_when_the_driver_and_a_node_died(
    straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "store"
    line = ("extract", *FLAGS, "--output-path", str(out))
    with Cluster() as cluster:
        cluster.start(head=True)
        node = cluster.start()
        command = cluster.command(*line)
        until(lambda: shards(out) >= 5, 240, "five shards")
        command.kill()
        command.communicate(timeout=60)
        before = times(out)
        command = cluster.command(*line)
        until(lambda: shards(out) >= len(before) + 3, 240, "three shards more")
        cluster.end(node)
        begun = time.monotonic()
        there = shards(out)
        finished(command)
        assert time.monotonic() - begun < 60
    assert 5 <= len(before) < there < N_SHARDS, "a kill came too late to matter"
    assert before.items() <= times(out).items(), "a shard that was there was made again"
    assert content(out) == content(straight)
    assert verify(out).ok


@pytest.mark.scale
def test_a_lost_head_is_one_sentence_and_a_new_one_ends_the_work(
    straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "store"
    line = ("extract", *FLAGS, "--output-path", str(out))
    with Cluster() as cluster:
        head = cluster.start(head=True)
        command = cluster.command(*line)
        until(lambda: shards(out) >= 5, 240, "five shards")
        cluster.end(head)
        said, _ = command.communicate(timeout=150)
        assert command.returncode == 1, said
        assert "Traceback" not in said, said
        before = times(out)
        cluster.start(head=True)
        finished(cluster.command(*line))
    assert 5 <= len(before) < N_SHARDS, "the kill came too late to matter"
    assert before.items() <= times(out).items(), "a shard that was there was made again"
    assert content(out) == content(straight)
