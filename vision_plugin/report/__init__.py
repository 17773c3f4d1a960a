"""Static HTML pages in which an SAE's features can be browsed.

``vision_plugin.report(...)`` writes them. Importing this package puts it under the function's name,
so the package can be called as well.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from vision_plugin.report._report import report
from vision_plugin.report._verify import verify

__all__ = ["report", "verify"]


class _CallablePackage(ModuleType):
    """This package; calling it writes a report."""

    def __call__(self, *args: Any, **kwargs: Any) -> Path:
        return report(*args, **kwargs)


sys.modules[__name__].__class__ = _CallablePackage
