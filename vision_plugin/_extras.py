"""Libraries that only some of the package needs, and what to install where one is missing."""

from __future__ import annotations


def require_sklearn(user: str) -> None:
    """Raise ImportError that says what to install where scikit-learn is missing.

    Args:
        user: What needs it, such as ``"the probing metrics"``.
    """
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise ImportError(
            f"{user} need scikit-learn; install it with 'pip install vision-plugin[probing]'"
        ) from None
