"""Texts without the places of this machine: a report or an SAE is sent to others."""

from __future__ import annotations

import re
from pathlib import PureWindowsPath

_PATH = re.compile(
    r"(?<![\w.<>/\\~-])(?:~[\w.-]*|[A-Za-z]:)?(?:[/\\][^/\\\s'\"<>|:;,()]+)*[/\\]([^/\\\s'\"<>|:;,()]+)[/\\]?"
)


def without_paths(text: str) -> str:
    """Return text with the last name alone of every absolute path in it.

    ``openai/clip-vit-base-patch32`` is no path and stays.
    """
    return _PATH.sub(_last_name, text)


def name_of(text: str) -> str:
    """Return the last name of a path, which may hold spaces and begin where a program runs.

    In ``metric@path`` the path is what stands behind the sign. Every other text is read by
    :func:`without_paths`.
    """
    before, at, path = ("", "", text) if _is_local(text) else text.partition("@")
    if not _is_local(path):
        return without_paths(text)
    return before + at + (re.split(r"[/\\]", path.rstrip("/\\"))[-1] or "local")


def score_name(text: str) -> str:
    """Return ``metric@path/dictionary``, as an evaluation names its scores, by :func:`name_of`."""
    metric, slash, dictionary = text.rpartition("/")
    return name_of(metric) + slash + dictionary


def _is_local(text: str) -> bool:
    return text.startswith(("/", "~", "./", "../", "\\")) or bool(
        PureWindowsPath(text).drive
    )  # a hub's id has one slash and none in front


def _last_name(found: re.Match[str]) -> str:
    return found.group(1)
