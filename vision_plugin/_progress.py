"""A bar with rate and time left on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from vision_plugin._rich import (
    Bar,
    BarColumn,
    Console,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
)

logger = logging.getLogger(__name__)

LOG_EVERY_S = 30.0


class Progress:
    """Counts images: a bar on a terminal, and a line every half minute in the log elsewhere.

    Args:
        total: Number of images.
        title: Name of the work.
        shown: Whether to show and log anything.
        of: What is counted, where it is not images.
    """

    def __init__(self, total: int, title: str, *, shown: bool = True, of: str = "images") -> None:
        self._shown, self._of = shown, of
        self._total, self._title = total, title
        self._done = 0
        self._start = self._logged = time.monotonic()
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not (shown and sys.stderr.isatty()),
            transient=True,
        )
        self._task = self._bar.add_task(title, total=total, rate="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, n: int) -> None:
        """Count n more images."""
        self._done += n
        now = time.monotonic()
        rate = self._done / max(now - self._start, 1e-9)
        self._bar.update(self._task, advance=n, rate=f"{rate:,.0f} {self._of}/s")
        if self._shown and now - self._logged >= LOG_EVERY_S:
            self._logged = now
            logger.info(
                "%s: %d of %d %s, %s a second, %.0f s left",
                *(self._title, self._done, self._total, self._of),
                *(f"{rate:.2g}" if rate < 10 else f"{rate:.0f}", (self._total - self._done) / rate),
            )
