"""Processes of torch's gloo group, forked from this one, for a training run to share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed as dist

from tests._processes import ended, in_child


def together(size: int, work: Callable[[], object]) -> list[int]:
    """Do the same in so many processes that form a group; their exit codes.

    Args:
        size: Number of processes.
        work: What each does; ``dist.get_rank()`` tells which it is.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()

        def member(rank: int) -> None:
            torch.set_num_threads(1)
            dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
            work()
            dist.barrier()
            dist.destroy_process_group()

        children = [in_child(lambda rank=rank: member(rank)) for rank in range(size)]
        return [ended(child) for child in children]
