"""What a hostile input is: who made it by which rule from which seed, and who reads it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Make = Callable[[Path, random.Random], Path]
"""Writes an input into an empty folder, the same from the same seed; returns what to open."""
Read = Callable[[Path], object]
"""Reads an input the way a user does."""


@dataclass(frozen=True)
class Case:
    """One hostile input."""

    kind: str
    rule: str
    number: int
    make: Make
    read: Read
    says: tuple[str, ...] = ()
    """Texts of which a refusal must hold one; by default the names of the input's files."""
    patience: float = 2.0
    """Seconds that reading may take where nothing is refused."""
    writes: bool = False
    """Whether reading may write beside the input, where nothing is refused."""

    @property
    def name(self) -> str:
        """Kind, rule and number; the number is the seed."""
        return f"{self.kind}/{self.rule}/{self.number}"

    def write(self, folder: Path) -> Path:
        """Write the input into an empty folder; return what to open."""
        return self.make(folder, random.Random(self.name))


@dataclass(frozen=True)
class Rule:
    """A way to make any number of inputs of one kind."""

    kind: str
    name: str
    count: int
    make: Make
    read: Read
    says: tuple[str, ...] = ()
    patience: float = 2.0
    writes: bool = False

    def cases(self, most: int | None = None) -> Iterator[Case]:
        """Yield the inputs of this rule, the first ``most`` of them."""
        for number in range(self.count if most is None else min(most, self.count)):
            yield Case(
                *(self.kind, self.name, number, self.make, self.read),
                *(self.says, self.patience, self.writes),
            )
