"""Vision transformers as TransformerLens bridges.

Importing this package is quick; torch and the hosts come with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vision_plugin.models._bridge import VisionBridge
    from vision_plugin.models._errors import UnsupportedModelError
    from vision_plugin.models._harvest import Harvester
    from vision_plugin.models._hook_names import UnknownHookError
    from vision_plugin.models._loading import load_model, wrap
    from vision_plugin.models._tokens import TokenLayout, TokenSelection

_HOMES = {
    "Harvester": "_harvest",
    "TokenLayout": "_tokens",
    "TokenSelection": "_tokens",
    "UnknownHookError": "_hook_names",
    "UnsupportedModelError": "_errors",
    "VisionBridge": "_bridge",
    "load_model": "_loading",
    "wrap": "_loading",
}

__all__ = [
    "Harvester",
    "TokenLayout",
    "TokenSelection",
    "UnknownHookError",
    "UnsupportedModelError",
    "VisionBridge",
    "load_model",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
