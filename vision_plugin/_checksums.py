"""SHA-256 of a folder's files, recorded in the folder, so that damage is found out later."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeGuard

from vision_plugin._untrusted import open_regular

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_SHOWN = 20
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Verification:
    """What was checked in a folder, and what was found."""

    path: str
    n_files: int
    """Files that were checked."""
    n_bytes: int
    problems: tuple[str, ...]
    """A sentence for each damaged file."""

    @property
    def ok(self) -> bool:
        """Whether every file is as it was written."""
        return not self.problems

    def __str__(self) -> str:
        """Return a summary, and a line per problem."""
        head = f"{self.path}: {self.n_files:,} files, {self.n_bytes / 1e9:.2f} GB checked"
        return told(head, self.problems)


def told(head: str, problems: Sequence[str]) -> str:
    """Return a summary of a check, and a line for each of the first problems."""
    found = [f"DAMAGED {problem}" for problem in problems[:_MOST_SHOWN]]
    n = len(problems)
    end = "no problem" if not n else "1 problem" if n == 1 else f"{n:,} problems"
    return "\n".join([head, *found, end])


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a regular file, in hexadecimal."""
    digest = hashlib.sha256()
    with open_regular(path) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def record(folder: Path, *, without: Collection[str] = ()) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder and below it, by its path from there.

    Hidden files are left out: a process that still writes the folder made them.

    Args:
        folder: Where to look.
        without: Names of files at the top to leave out.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    return {
        name: sha256_of(path)
        for name, path in files.items()
        if name not in without and not path.name.startswith(".") and path.is_file()
    }


def is_record(value: object) -> TypeGuard[dict[str, str]]:
    """Return whether a value has the form that :func:`record` gives."""
    return isinstance(value, dict) and all(
        isinstance(digest, str) and _SHA256.fullmatch(digest) and _stays_inside(name)
        for name, digest in value.items()
    )


def check(folder: Path, recorded: Mapping[str, str]) -> Verification:
    """Compare files with what :func:`record` said when they were written."""
    problems, n_bytes = [], 0
    for name, expected in recorded.items():
        path = folder / name
        try:
            found = sha256_of(path)
            n_bytes += path.stat().st_size
        except FileNotFoundError:
            problems.append(f"{name}: it is missing")
        except (OSError, ValueError) as error:
            problems.append(f"{name}: {error}")
        else:
            if found != expected:
                problems.append(f"{name}: expected SHA-256 {expected}, found {found}")
    return Verification(str(folder), len(recorded), n_bytes, tuple(problems))


def _stays_inside(name: str) -> bool:
    parts = PurePosixPath(name)
    return not parts.is_absolute() and ".." not in parts.parts and name.isprintable()
