"""What each of two processes does that talk over gloo."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

from tests.metrics._cases import CASES, N


def scores(rank: int, world: int) -> dict[str, Any]:
    """Feed this process's share of the images and return what every process must agree on."""
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        metric = case.build()
        # Halves of unequal size, since processes seldom see equally many images.
        middle = N // 3
        share = slice(0, N) if world == 1 else (slice(0, middle), slice(middle, N))[rank]
        case.feed(metric, share)
        found[name] = case.result(metric)
        found[f"{name} again"] = case.result(metric)
        starved = case.build()
        if rank == world - 1:
            case.feed(starved, slice(0, N))
        found[f"{name}, one process without data"] = case.result(starved)
    return found


def main(rank: int, world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = distributed.FileStore(str(folder / "store"), world)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    (folder / f"{rank}.json").write_text(json.dumps(scores(rank, world)))
    distributed.destroy_process_group()
