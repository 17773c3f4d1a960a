"""What goes wrong when a model does not fit."""

from __future__ import annotations


class UnsupportedModelError(ValueError):
    """A module that no adapter fits; the message says which part did not match."""


def not_found(name: str, error: Exception) -> str:
    """The message for a checkpoint that is not there."""
    text = str(error).strip()
    reason = text.splitlines()[0][:200] if text else repr(error)
    return (
        f"could not load a model from {name!r}: it is neither a local folder with a checkpoint "
        f"nor to be had from the hub ({reason}). Offline, give the folder that the checkpoint was "
        "saved to."
    )
