"""Two hosts: a pulled cable, the packets on the wire, an idle node's memory, a wrong token."""

from __future__ import annotations

import logging
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.activations._stores import content
from tests.scale._cluster import Cluster, patience, said, tree, until
from tests.scale._extraction import FLAGS, N_SHARDS, extraction, finished, shards
from tests.scale._hosts import captured, memory, two_hosts

TRAINING = (
    *("--hook-name", "blocks.1.hook_resid_post", "--d-sae", "64", "--k", "4"),
    *("--training-tokens", "1024", "--train-batch-size-tokens", "128", "--device", "cpu"),
)

logger = logging.getLogger(__name__)


@pytest.mark.scale
def test_two_hosts_share_an_extraction_and_one_ends_it_when_the_cable_is_pulled(
    straight: Path, tmp_path: Path
) -> None:
    """The two see one disk. Nothing but the cluster's own packets is on the wire."""
    out, wire = tmp_path / "store", tmp_path / "packets.json"
    with (
        two_hosts() as (first, second),
        Cluster(prefix=first.prefix, host=first.address) as cluster,
        captured(first, wire) as packets,
    ):
        cluster.start(head=True)
        node = cluster.start(prefix=second.prefix, host=second.address)
        time.sleep(3)
        idle = memory(tree(node.pid))
        command = extraction(cluster, out)
        until(lambda: shards(out) >= 5, 240, "five shards")
        until(lambda: cluster.workers(node, "make_shard"), 120, "work on the second host")
        assert shards(out) < N_SHARDS - 5, "the cable was pulled too late to matter"
        second.ip("link", "set", "eth0", "down")
        begun = time.monotonic()
        finished(command)
        seconds = time.monotonic() - begun
    assert content(out) == content(straight)
    assert seconds < patience(60), f"it took {seconds:.0f} s after the cable was pulled"
    assert idle < 350e6, f"an idle node takes {idle / 1e6:.0f} MB"
    between = {f"{a} {b}" for a in ("10.77.0.1", "10.77.0.2") for b in ("10.77.0.1", "10.77.0.2")}
    spoken = {pair: n for pair, n in packets.items() if not pair.startswith("0x")}
    assert spoken.keys() <= between, spoken
    assert sum(spoken.values()) > 100
    assert packets.keys() - spoken.keys() <= {"0x806", "0x86dd"}, packets  # who has the address
    logger.info("%.1f s after the cable was pulled; %.0f MB idle", seconds, idle / 1e6)


@pytest.mark.scale
def test_hosts_that_share_no_folder_send_the_shards_and_others_are_refused(
    straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "hidden" / "store"
    out.parent.mkdir()
    hide = " && ".join(
        [f"mount -t tmpfs tmpfs {out.parent}", "mount -t tmpfs tmpfs /dev/shm", 'exec "$@"']
    )
    with (
        two_hosts() as (first, second),
        Cluster(prefix=first.prefix, host=first.address) as cluster,
    ):
        cluster.start(head=True, cpus=0)
        old = [*first.prefix, "env", f"PYTHONPATH={another_torch(tmp_path / 'old')}"]
        node = cluster.start(prefix=old)
        line = ("extract", *FLAGS, "--output-path", str(out))
        refused(cluster.command(*line), r"has other versions than this machine \(torch 0\.1 there")
        cluster.end(node)
        other = ["ip", "netns", "exec", second.name, "unshare", "-m", "sh", "-c", hide, "sh"]
        cluster.start(prefix=other, host=second.address)
        finished(cluster.command(*line))
        sae = ("train", "--images", "demo:32@0", "--model-name", "demo", *TRAINING)
        unshared = out.parent / "sae"
        refused(cluster.command(*sae, "--output-path", str(unshared)), "do not share .* on a disk")
        assert not list(out.parent.glob("*sae*"))
        token = tmp_path / "token"
        token.write_text("0" * 64)
        cluster.env["RAY_AUTH_TOKEN_PATH"] = str(token)
        none = ("--output-path", str(tmp_path / "none"))
        refused(cluster.command("extract", *FLAGS, *none), "with this token")
    assert content(out) == content(straight)
    assert not (tmp_path / "none").exists()


def another_torch(folder: Path) -> Path:
    """A folder for Python's path, by which torch's version is another."""
    (folder / "torch-0.1.dist-info").mkdir(parents=True)
    metadata = "Metadata-Version: 2.1\nName: torch\nVersion: 0.1\n"
    (folder / "torch-0.1.dist-info" / "METADATA").write_text(metadata)
    return folder


def refused(command: subprocess.Popen[str], sentence: str) -> None:
    told = said(command, 150)
    assert command.returncode in (1, 2), told
    lines = [line for line in told.splitlines() if line.startswith("vision-plugin ")]
    assert len(lines) == 1, told
    assert re.search(sentence, lines[0]), told
    assert "Traceback" not in told, told
