"""Texts without the places of this machine: a report is sent to others."""

from __future__ import annotations

import re

from vision_plugin.report._inputs import clean

_PATH = re.compile(
    r"(?<![\w.<>/\\~-])(?:~[\w.-]*|[A-Za-z]:)?(?:[/\\][^/\\\s'\"<>|:;,()]+)*[/\\]([^/\\\s'\"<>|:;,()]+)[/\\]?"
)


def without_paths(text: object) -> str:
    """Return text with the last name alone of every absolute path, cleaned for a page.

    ``openai/clip-vit-base-patch32`` is no path and stays.
    """
    return clean(_PATH.sub(_last_name, str(text)))


def _last_name(found: re.Match[str]) -> str:
    return found.group(1)
