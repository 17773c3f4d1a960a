"""Errors of stores and extractions."""

from __future__ import annotations


class StoreError(ValueError):
    """A store cannot be used; the message says which file, what was expected and what found."""


class ManifestError(StoreError):
    """A JSON file of a store is damaged, of another version, or of the wrong content."""


class ShardError(StoreError):
    """A shard is missing or damaged."""

    def __init__(self, shard: str, message: str) -> None:
        super().__init__(f"{shard}: {message}")
        self.shard = shard
        self.problem = message

    def __reduce__(self) -> tuple[type[ShardError], tuple[str, str]]:
        return ShardError, (self.shard, self.problem)


class StoreMismatchError(StoreError):
    """Two things that should work together were not made for each other."""


class StoreLockedError(StoreError):
    """Another extraction is writing into the folder."""


class TooManyBadImagesError(ValueError):
    """More images are unreadable than the configuration allows."""

    exit_status = 1
    """Exit status of the command: 1, since the run began and then failed."""


class StoreFullError(OSError):
    """The disk has no room for the next file; finished files are kept."""
