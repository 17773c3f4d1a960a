"""What every checkpoint of the demo world is saved with: half-size weights, and the cost."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a checkpoint goes, and how it is measured."""

    out: Path
    """The folder to write, made if missing."""
    evaluation_images: int = 2000
    """How many images each figure is measured on."""


def save_half(model: Any, folder: Path) -> None:
    """Write weights that take half the room, and a configuration.

    The tensors are float16. `config.json` says float32, so that whoever loads it without naming a
    type computes in float32, which is what a CPU is good at.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = [type(model).__name__]
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # it is written for its owner alone


class Stopwatch:
    """Measures from its making on."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def cost(self) -> dict[str, Any]:
        """Return minutes, minutes of processor time, and what they were spent with."""
        return {
            "minutes": round((time.monotonic() - self._wall) / 60, 1),
            "cpu_minutes": round((time.process_time() - self._cpu) / 60, 1),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
