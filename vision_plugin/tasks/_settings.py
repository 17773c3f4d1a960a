"""Checks of a task's settings, and their form in JSON."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any


def check_known(settings: Any, **known: Collection[str]) -> None:
    """Raise ValueError if a field names something that is not among what is known."""
    for name, every in known.items():
        unknown = [one for one in getattr(settings, name) if one not in every]
        if unknown:
            raise ValueError(f"{name}= has {unknown[0]!r}: use some of {', '.join(every)}")


def check_sizes(sizes: Sequence[int]) -> None:
    """Raise ValueError unless sizes are numbers of latents."""
    if not sizes or min(sizes) < 1:
        raise ValueError(f"sizes={sizes} must be numbers of latents from 1 up")


def listed(settings: Any) -> dict[str, Any]:
    """Return a dataclass's fields ready for JSON."""
    named = {name: getattr(settings, name) for name in settings.__dataclass_fields__}
    return {name: list(v) if isinstance(v, tuple) else v for name, v in named.items()}
