"""Progress tells how far it is, how quick, and how long it will take."""

from __future__ import annotations

import logging

import pytest

from vision_plugin import _progress
from vision_plugin._progress import Progress


def test_a_log_tells_the_count_the_rate_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    now = 100.0
    monkeypatch.setattr(_progress.time, "monotonic", lambda: now)
    with caplog.at_level(logging.INFO), Progress(1000, "extracting") as progress:
        now = 110.0
        progress.advance(50)
        assert not caplog.messages, "one line now and then, not one a batch"
        now = 150.0
        progress.advance(200)
    assert caplog.messages == ["extracting: 250 of 1000 images, 5 a second, 150 s left"]


def test_the_bar_stays_away_from_what_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with Progress(10, "extracting") as progress:
        progress.advance(10)
    assert capfd.readouterr().err == ""
