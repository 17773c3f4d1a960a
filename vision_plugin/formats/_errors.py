"""Errors of reading a checkpoint, one class per cause."""

from __future__ import annotations


class CheckpointError(ValueError):
    """The checkpoint cannot be turned into a stock SAELens SAE; the message says why.

    Examples:
        >>> issubclass(vp.formats.CorruptCheckpointError, vp.formats.CheckpointError)
        True
    """


class UnknownFormatError(CheckpointError):
    """Nothing in the file says which project wrote it.

    Examples:
        >>> from safetensors.torch import save_file
        >>> save_file({"no": torch.zeros(2)}, "no-sae.safetensors")
        >>> try:
        ...     vp.load_sae("no-sae.safetensors")
        ... except vp.formats.UnknownFormatError:
        ...     print("nobody's format")
        nobody's format
    """


class CorruptCheckpointError(CheckpointError):
    """The file is truncated or damaged, or its numbers or shapes cannot be those of an SAE.

    Examples:
        >>> from pathlib import Path
        >>> _ = Path("broken.pt").write_bytes(b"PK not a checkpoint")
        >>> try:
        ...     vp.load_sae("broken.pt")
        ... except vp.formats.CorruptCheckpointError:
        ...     print("damaged")
        damaged
    """


class UnsafeCheckpointError(CheckpointError):
    """The file asks for code to be run. None of it was run.

    Examples:
        >>> class Code:
        ...     def __reduce__(self):
        ...         return print, ("run",)
        >>> torch.save({"sae": Code()}, "unsafe.pt")
        >>> try:
        ...     vp.load_sae("unsafe.pt")
        ... except vp.formats.UnsafeCheckpointError:
        ...     print("it asks for code to be run")
        it asks for code to be run
    """


class RefusedCheckpointError(CheckpointError):
    """The file is valid, but no stock architecture computes the same function.

    Examples:
        >>> issubclass(vp.formats.RefusedCheckpointError, ValueError)
        True
    """
