"""An extraction on a real cluster, whose workers, nodes, head and driver are killed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.activations._stores import content
from tests.scale._cluster import Cluster, kill, said, until
from tests.scale._extraction import N_SHARDS, extraction, finished, shards, times
from vision_plugin.activations import verify


def test_a_killed_worker_changes_nothing(straight: Path, tmp_path: Path) -> None:
    """The short form: two nodes, a worker killed, and the bytes of one process."""
    out = tmp_path / "store"
    with Cluster() as cluster:
        cluster.start(head=True)
        node = cluster.start()
        command = extraction(cluster, out)
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
def test_the_same_command_ends_with_the_same_bytes_whatever_died(
    straight: Path, tmp_path: Path
) -> None:
    """The driver, then a node, then the head; what was there is not made again."""
    out = tmp_path / "store"
    with Cluster() as cluster:
        head = cluster.start(head=True)
        node = cluster.start()
        command = extraction(cluster, out)
        until(lambda: shards(out) >= 4, 240, "four shards")
        command.kill()
        command.communicate(timeout=60)
        of_driver = times(out)
        command = extraction(cluster, out)
        until(lambda: shards(out) >= len(of_driver) + 3, 240, "three shards more")
        cluster.end(node)
        of_node = times(out)
        until(lambda: shards(out) >= len(of_node) + 4, 60, "the other node to go on")
        cluster.end(head)
        told = said(command, 150)
        assert command.returncode == 1, told
        assert "Traceback" not in told, told
        of_head = times(out)
        cluster.start(head=True)
        finished(extraction(cluster, out))
    assert 4 <= len(of_driver) < len(of_node) < len(of_head) < N_SHARDS, "a kill came too late"
    for before in (of_driver, of_node, of_head):
        assert before.items() <= times(out).items(), "a shard that was there was made again"
    assert content(out) == content(straight)
    assert verify(out).ok
