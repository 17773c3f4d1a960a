"""Paths as people write them: a folder below somebody's home, a link that leads nowhere."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def local_path(path: str | Path) -> Path:
    """Return a path with ``~`` expanded; every path that a person names goes through here.

    As in a shell, a file whose name begins with ``~`` is itself where there is no such user.

    Raises:
        ValueError: it is empty, there is no such user, or links lead round in a circle.
    """
    if path == "":
        raise ValueError("a path is empty (''): name a file or folder, . for the folder you are in")
    written = Path(path)
    try:
        found = written.expanduser()
    except RuntimeError:
        if os.path.lexists(written):
            return written
        raise ValueError(
            f"{path}: there is no user {written.parts[0][1:]!r} on this machine: write the whole "
            f"path, or ./{path} for a name that begins with ~"
        ) from None
    try:
        found.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(
                f"{path} cannot be followed, its symbolic links lead round in a circle: remove "
                "them, or name another path"
            ) from None
    return found
