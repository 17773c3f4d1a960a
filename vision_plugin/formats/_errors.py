"""Errors of reading a checkpoint, one class per cause."""

from __future__ import annotations


class CheckpointError(ValueError):
    """The checkpoint cannot be turned into a stock SAELens SAE; the message says why."""


class UnknownFormatError(CheckpointError):
    """Nothing in the file says which project wrote it."""


class CorruptCheckpointError(CheckpointError):
    """The file is truncated or damaged, or its numbers or shapes cannot be those of an SAE."""


class UnsafeCheckpointError(CheckpointError):
    """The file asks for code to be run. None of it was run."""


class RefusedCheckpointError(CheckpointError):
    """The file is valid, but no stock architecture computes the same function."""
