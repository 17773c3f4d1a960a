"""Texts without the places of this machine: a report or an SAE is sent to others."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import PureWindowsPath

_PATH = re.compile(
    r"(?<![\w.<>/\\~-])(?:file://|~[\w.-]*|[A-Za-z]:)?(?:[/\\][^/\\\s'\"<>|:;,()]+)*[/\\]([^/\\\s'\"<>|:;,()]+)[/\\]?"
)


def without_paths(text: str) -> str:
    """Return text with the last name alone of every absolute path in it, which ends at a space.

    ``openai/clip-vit-base-patch32`` is no path and stays.
    """
    return _PATH.sub(_last_name, text)


class Places:
    """Names for the paths in one document; two paths that end alike are told apart."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._taken: set[str] = set()
        self._used: Counter[str] = Counter()

    def name_of(self, text: str) -> str:
        """Return the last name of a path, which may hold spaces and begin where a program runs.

        In ``metric@path`` the path is what stands behind the sign. Every other text is read by
        :func:`without_paths`.
        """
        before, at, path = ("", "", text) if _is_local(text) else text.partition("@")
        if not _is_local(path):
            return without_paths(text)
        path = path.rstrip("/\\")
        if path not in self._names:
            last = re.split(r"[/\\]", path)[-1] or "local"
            name = last
            while name in self._taken:
                self._used[last] += 1
                name = f"{last}-{self._used[last] + 1}"
            self._names[path] = name
            self._taken.add(name)
        return before + at + self._names[path]

    def score_name(self, text: str) -> str:
        """Return ``metric@path/dictionary``, as an evaluation names its scores."""
        metric, slash, dictionary = text.rpartition("/")
        return self.name_of(metric) + slash + dictionary


def name_of(text: str) -> str:
    """Return the last name of a path by itself, by :meth:`Places.name_of`."""
    return Places().name_of(text)


def _is_local(text: str) -> bool:
    return text.startswith(("/", "~", "./", "../", "\\")) or bool(
        PureWindowsPath(text).drive
    )  # a hub's id has one slash and none in front


def _last_name(found: re.Match[str]) -> str:
    return found.group(1)
