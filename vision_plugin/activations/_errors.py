"""Errors of stores and extractions."""

from __future__ import annotations


class StoreError(ValueError):
    """A store cannot be used; the message says which file, what was expected and what found.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("notes").write_text("no store")
        >>> try:
        ...     vp.activations.check_folder(Path("notes"))
        ... except vp.activations.StoreError:
        ...     print("a file, not a store")
        a file, not a store
    """


class ManifestError(StoreError):
    """A JSON file of a store is damaged, of another version, or of the wrong content.

    Examples:
        >>> import shutil
        >>> from pathlib import Path
        >>> _ = shutil.copytree("acts", "torn-acts")
        >>> _ = Path("torn-acts/manifest.json").write_text("{")
        >>> try:
        ...     vp.activations.ActivationStore("torn-acts")
        ... except vp.activations.ManifestError:
        ...     print("damaged")
        damaged
    """


class ShardError(StoreError):
    """A shard is missing or damaged.

    Args:
        shard: Name of the shard.
        message: What is wrong with it.

    Examples:
        >>> vp.activations.ShardError("activations-0.safetensors", "missing").args
        ('activations-0.safetensors: missing',)
        >>> issubclass(vp.activations.ShardError, vp.activations.StoreError)
        True
    """

    def __init__(self, shard: str, message: str) -> None:
        super().__init__(f"{shard}: {message}")
        self.shard = shard
        self.problem = message

    def __reduce__(self) -> tuple[type[ShardError], tuple[str, str]]:
        return ShardError, (self.shard, self.problem)


class StoreMismatchError(StoreError):
    """Two things that should work together were not made for each other.

    Examples:
        >>> other = vp.activations.ExtractionConfig(
        ...     model_name="demo", images="demo:20", hook_names=[hook], output_path="acts"
        ... )
        >>> try:
        ...     vp.extract(other, model=model)
        ... except vp.activations.StoreMismatchError:
        ...     print("acts/ holds the activations of other images")
        acts/ holds the activations of other images
    """


class StoreLockedError(StoreError):
    """Another extraction is writing into the folder.

    Examples:
        >>> issubclass(vp.activations.StoreLockedError, vp.activations.StoreError)
        True
    """


class TooManyBadImagesError(ValueError):
    """More images are unreadable than the configuration allows.

    Examples:
        >>> from pathlib import Path
        >>> Path("broken").mkdir()
        >>> _ = Path("broken/one.png").write_bytes(b"no picture")
        >>> cfg = vp.activations.ExtractionConfig(
        ...     model_name="demo",
        ...     images="broken",
        ...     hook_names=[hook],
        ...     output_path="none",
        ...     max_bad_images=0,
        ... )
        >>> try:
        ...     vp.extract(cfg, model=model)
        ... except vp.activations.TooManyBadImagesError:
        ...     print("more images are broken than are allowed")
        more images are broken than are allowed
    """

    exit_status = 1
    """Exit status of the command: 1, since the run began and then failed."""


class StoreFullError(OSError):
    """The disk has no room for the next file; finished files are kept.

    Examples:
        >>> issubclass(vp.activations.StoreFullError, OSError)
        True
    """
