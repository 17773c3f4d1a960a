"""The ways in which a checkpoint can fail to become an SAE, each with its own name."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint could not be turned into a stock SAELens SAE; the message says why."""


class UnknownFormatError(CheckpointError):
    """Nothing in the file says which project wrote it."""


class CorruptCheckpointError(CheckpointError):
    """The file is truncated or damaged, or its numbers or shapes cannot be those of an SAE."""


class UnsafeCheckpointError(CheckpointError):
    """The file asks for code to be run. Nothing of it was run."""


class RefusedCheckpointError(CheckpointError):
    """The file was understood, but no stock architecture computes what it computes."""
