"""Where commands print: names out of files are shown as they are, never read as markup."""

from __future__ import annotations

from vision_plugin._rich import Console


def console(*, stderr: bool = False) -> Console:
    """Return a console on the standard output, or on the error stream."""
    return Console(markup=False, emoji=False, highlight=False, stderr=stderr)
