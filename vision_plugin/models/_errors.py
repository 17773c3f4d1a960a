"""Errors about models that cannot be loaded or wrapped."""

from __future__ import annotations

from vision_plugin._paths import local_path

HOW_TO_ADD = "CONTRIBUTING.md shows how to add a family"


class UnsupportedModelError(ValueError):
    """No adapter fits a module; the message says which part did not match.

    Examples:
        >>> try:
        ...     vp.wrap(torch.nn.Linear(2, 2))
        ... except vp.models.UnsupportedModelError:
        ...     print("no adapter fits")
        no adapter fits
    """


def not_found(name: str, error: Exception) -> str:
    """Return the message for a checkpoint that is not found."""
    is_path = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
    if is_path and not local_path(name).exists():
        return f"could not load a model from {name!r}: there is no such file or folder"
    text = str(error).strip()
    reason = text.splitlines()[0][:200] if text else repr(error)
    return (
        f"could not load a model from {name!r}: it is neither a local folder with a checkpoint "
        f"nor a checkpoint that the hub provides ({reason}). Offline, give the folder that the "
        "checkpoint was saved to."
    )
