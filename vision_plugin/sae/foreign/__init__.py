"""Published vision SAEs as stock SAELens SAEs, whoever's code wrote them."""

from __future__ import annotations

from vision_plugin.sae.foreign._checkpoint import ReadOptions
from vision_plugin.sae.foreign._convert import convert
from vision_plugin.sae.foreign._errors import (
    CheckpointError,
    CorruptCheckpointError,
    RefusedCheckpointError,
    UnknownFormatError,
    UnsafeCheckpointError,
)
from vision_plugin.sae.foreign._load import load_sae
from vision_plugin.sae.foreign._loaders import disk_converter, hub_converter

__all__ = [
    "CheckpointError",
    "CorruptCheckpointError",
    "ReadOptions",
    "RefusedCheckpointError",
    "UnknownFormatError",
    "UnsafeCheckpointError",
    "convert",
    "disk_converter",
    "hub_converter",
    "load_sae",
]
