"""Numbers as the pages write them."""

from __future__ import annotations

import math

NONE = "\N{EN DASH}"


def compact(value: float | None) -> str:
    """Return three significant digits, without an exponent where possible; NaN as a dash."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e6:
        digits = max(0, 2 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def percent(share: float | None) -> str:
    """Return a share as a percentage."""
    if share is None or not math.isfinite(share):
        return NONE
    return f"{compact(share * 100)}%"


def plain(value: float, digits: int = 5) -> float | None:
    """Return a number for JSON with ``digits`` significant digits; None if it is not finite."""
    if not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")
