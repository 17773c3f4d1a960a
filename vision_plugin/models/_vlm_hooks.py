"""Hooks of a vision-language model: which of two bridges has them, and what reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from vision_plugin.models._bridge import HookList

PREFIX = "vision."
"""Start of the names of the tower's hooks."""


def of_part(hooks: HookList, inside: bool) -> list[tuple[Any, Callable[..., Any]]]:
    """Return the hooks of the tower, without the prefix, or of the language model."""
    found: list[tuple[Any, Callable[..., Any]]] = []
    for name, function in hooks:
        if callable(name):
            found.append((_within(name, PREFIX if inside else ""), function))
        elif name.startswith(PREFIX) == inside:
            found.append((name.removeprefix(PREFIX), function))
    return found


def _within(selects: Callable[[str], bool], prefix: str) -> Callable[[str], bool]:
    return lambda name: selects(f"{prefix}{name}")


def kept_in(cache: dict[str, Tensor], name: str) -> Callable[..., None]:
    """Return a hook function that puts an activation into a cache."""

    def keep(activation: Any, hook: Any) -> None:
        del hook
        if isinstance(activation, Tensor):
            cache[name] = activation.detach()

    return keep
