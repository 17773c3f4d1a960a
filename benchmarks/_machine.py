"""What a figure was measured on. Needs torch alone."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def machine(*packages: str, device: str = "cpu") -> dict[str, Any]:
    """The machine and the software, as JSON.

    Args:
        packages: distributions whose versions matter beside torch; None for one that is not there.
        device: ``"cpu"`` or ``"cuda"``.
    """
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "device_type": device,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "load_average_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__, **{name: _version(name) for name in packages}},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
