"""The flags ``--engine`` and ``--address``: where a command's tasks run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class EngineFlags:
    """Where the work is done."""

    engine: str = "local"
    """Where the work is done: ``local``, in this process, or ``ray``, on a Ray cluster. The result
    is the same."""
    address: str | None = None
    """For ``ray``: ``HOST:PORT`` of the head of a running cluster, or ``auto`` for the one on this
    machine; by default a cluster of this machine alone, which ends with the command."""
    cores: int = 1
    """For ``ray``: cores of a task on machines without GPUs. A task on a GPU takes a whole one."""

    def __post_init__(self) -> None:
        if self.engine == "local" and self.address is not None:
            raise ValueError(f"address={self.address} needs engine=ray")


@contextlib.contextmanager
def opened(flags: EngineFlags) -> Iterator[Any]:
    """Yield the engine that flags name, connected; None for this process.

    Raises:
        ValueError: no engine has that name.
        ImportError: what it needs is not installed.
        OSError: no cluster answers.
    """
    from vision_plugin._engines import make

    if flags.engine == "local":
        yield None
        return
    with make(flags.engine, address=flags.address, cores=flags.cores) as engine:
        yield engine
