"""What this package uses of rich, imported without moving the caller's random numbers.

rich draws one of Python's random numbers when it is first imported. A program that seeds ``random``
gets the numbers that it would get without this package: its modules import rich from here.
"""

from __future__ import annotations

import random

_before = random.getstate()

from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn  # noqa: E402
from rich.progress import Progress as Bar  # noqa: E402
from rich.table import Table  # noqa: E402

random.setstate(_before)

__all__ = [
    "Bar",
    "BarColumn",
    "Console",
    "MofNCompleteColumn",
    "Table",
    "TextColumn",
    "TimeRemainingColumn",
]
