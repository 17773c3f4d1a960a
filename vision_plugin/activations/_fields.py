"""Typed access to the fields of a JSON document, with errors that name the field."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vision_plugin._shown import shown
from vision_plugin.activations._errors import ManifestError

MAX_NUMBER = 2**53
_HEX = re.compile(r"[0-9a-f]+")


@dataclass(frozen=True)
class Fields:
    """A JSON object in a file, and its path within the file."""

    document: dict[str, Any]
    where: Path
    path: str = ""

    def _get(self, name: str, kind: type, nullable: bool) -> Any:
        if name not in self.document:
            raise self.error(name, "the field", "none")
        value = self.document[name]
        if value is None and nullable:
            return None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(name, _names[kind], shown(value))
        return value

    def error(self, name: str, expected: str, found: str) -> ManifestError:
        """Return the error for one field."""
        return ManifestError(f"{self.where}: {self.path}{name}: expected {expected}, found {found}")

    def text(self, name: str) -> str:
        """Return a string."""
        return str(self._get(name, str, False))

    def optional_text(self, name: str) -> str | None:
        """Return a string or None."""
        value = self._get(name, str, True)
        return None if value is None else str(value)

    def flag(self, name: str) -> bool:
        """Return true or false."""
        return bool(self._get(name, bool, False))

    def number(self, name: str, *, least: int = 0, most: int = MAX_NUMBER) -> int:
        """Return a whole number within bounds."""
        value = int(self._get(name, int, False))
        if not least <= value <= most:
            raise self.error(name, f"a number from {least} to {most}", shown(value))
        return value

    def hash(self, name: str, digits: int) -> str:
        """Return a string of ``digits`` hexadecimal digits."""
        value = self.text(name)
        if len(value) != digits or not _HEX.fullmatch(value):
            raise self.error(name, f"{digits} hexadecimal digits", shown(value))
        return value

    def object(self, name: str) -> Fields:
        """Return an object within this one."""
        return Fields(self._get(name, dict, False), self.where, f"{self.path}{name}.")

    def objects(self, name: str, *, most: int = MAX_NUMBER) -> list[Fields]:
        """Return a list of at most so many objects."""
        values = self._get(name, list, False)
        if len(values) > most:
            raise self.error(name, f"at most {most:,} of them", f"{len(values):,}")
        for place, value in enumerate(values):
            if not isinstance(value, dict):
                raise self.error(f"{name}[{place}]", "an object", shown(value))
        return [
            Fields(value, self.where, f"{self.path}{name}[{place}].")
            for place, value in enumerate(values)
        ]

    def texts(self, name: str) -> list[str]:
        """Return a list of strings."""
        return self._list(name, str)

    def optional_texts(self, name: str) -> list[str] | None:
        """Return a list of strings, or None."""
        if self.document.get(name, ...) is None:
            return None
        return self._list(name, str)

    def numbers(self, name: str) -> list[int]:
        """Return a list of whole numbers that are not negative."""
        values = self._list(name, int)
        if not all(0 <= value <= MAX_NUMBER for value in values):
            raise self.error(name, "numbers from 0 up", shown(values))
        return values

    def floats(self, name: str) -> list[float]:
        """Return a list of numbers."""
        values = self._get(name, list, False)
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values):
            raise self.error(name, "numbers", shown(values))
        try:
            return [float(value) for value in values]
        except OverflowError:
            raise self.error(name, "numbers below 1e308", "a larger one") from None

    def _list(self, name: str, kind: type) -> list[Any]:
        values: list[Any] = self._get(name, list, False)
        for place, value in enumerate(values):
            if type(value) is not kind:
                raise self.error(f"{name}[{place}]", _names[kind], shown(value))
        return values


_names = {
    str: "a string",
    int: "a whole number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
}
