"""What it costs to refuse a hostile input: the error, the time and the memory."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests._processes import ended, in_child

MAX_SECONDS = 2.0
MAX_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Cost:
    """What some work cost a process of its own."""

    error: str
    """Type and text of the error that it raised; empty without one."""
    seconds: float
    """Time on the processor, waiting not counted."""
    bytes: int
    """Memory at the peak beyond what the process had before."""

    @property
    def is_small(self) -> bool:
        """Whether it stayed below the limits of time and memory."""
        return self.seconds < MAX_SECONDS and self.bytes < MAX_BYTES


def cost_of(work: Callable[[], object]) -> Cost:
    """Do something in a forked process that is killed after a minute."""
    reading, writing = os.pipe()

    def measured() -> None:
        import signal

        signal.alarm(60)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before, began, error = _peak(), time.process_time(), ""
        try:
            work()
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        found = {"error": error, "seconds": time.process_time() - began, "bytes": _peak() - before}
        os.write(writing, json.dumps(found).encode()[:60_000])

    child = in_child(measured)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        found = stream.read()
    status = ended(child)
    assert status == 0, f"the process ended with {status}: it hung or crashed"
    return Cost(**json.loads(found))


def _peak() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
