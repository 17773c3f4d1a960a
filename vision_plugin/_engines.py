"""Engines: what runs a command's tasks on other machines, found by name through entry points."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from typing import Any

GROUP = "vision_plugin.engines"
LOCAL = "local"


@contextmanager
def opened(engine: Any) -> Iterator[Any]:
    """Yield an engine to use during a ``with`` block; None stands for this process alone.

    Args:
        engine: Name of an engine, which is opened and closed here; or an engine in hand, which
            stays open.

    Raises:
        ValueError: no engine has that name.
        ImportError: the engine needs something that is not installed.
    """
    if engine is None or engine == LOCAL:
        yield None
    elif isinstance(engine, str):
        with _named(engine)() as found:
            yield found
    else:
        yield engine


def _named(name: str) -> Any:
    found = {point.name: point for point in entry_points(group=GROUP)}
    if name not in found:
        raise ValueError(f"engine={name!r}: use {' or '.join([LOCAL, *sorted(found)])}")
    return found[name].load()


def make(name: str, **settings: Any) -> Any:
    """Return the engine of a name, made with settings; None for ``local``.

    Raises:
        ValueError: no engine has that name.
    """
    return None if name == LOCAL else _named(name)(**settings)
