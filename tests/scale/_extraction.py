"""One small extraction, by one process and by a cluster, and what is there of it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.scale._cluster import Cluster, said

N_SHARDS = 40
FLAGS = (
    *("--model-name", "demo", "--images", f"demo:{N_SHARDS * 16}@0"),
    *("--hook-names", "blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"),
    *("--images-per-shard", "16", "--batch-size", "16", "--n-workers", "0", "--device", "cpu"),
)


def extraction(cluster: Cluster, out: Path) -> subprocess.Popen[str]:
    """Begin the extraction on a cluster."""
    return cluster.command("extract", *FLAGS, "--output-path", str(out))


def shards(folder: Path) -> int:
    """Number of shards that are complete."""
    return len(list(folder.glob("shard-*.json")))


def times(folder: Path) -> dict[str, int]:
    """When each marker was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.json")}


def finished(command: subprocess.Popen[str], seconds: float = 240) -> None:
    """Wait until a command ends well."""
    told = said(command, seconds)
    assert command.returncode == 0, told
