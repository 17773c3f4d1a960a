"""Text for messages about values of a file that nobody vouches for.

Printing, comparing or hashing such a value may take for ever: a few hundred bytes can describe a
structure whose text has 2^40 characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Sized

MAX_TEXT = 80
_MAX_BITS = 256


def shown(value: object) -> str:
    """Return a short text for a value; a container is named by its type and length."""
    if isinstance(value, str):
        return repr(value if len(value) <= MAX_TEXT else value[:MAX_TEXT] + "...")
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        bits = value.bit_length()
        return repr(value) if bits <= _MAX_BITS else f"a whole number of {bits} bits"
    if isinstance(value, (list, tuple, dict, bytes)):
        return _counted(value)
    return f"a {type(value).__name__}"


def listed(names: Iterable[object], most: int = 20) -> str:
    """Return the first names in order, each shortened, as a list."""
    texts = sorted(name if isinstance(name, str) else shown(name) for name in names)
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return "[" + ", ".join([*map(shown, texts[:most]), *more]) + "]"


def _counted(value: Sized) -> str:
    return f"a {type(value).__name__} of {len(value)}"
