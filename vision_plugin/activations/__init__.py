"""Pictures in, activations to disk and back.

Importing this package is quick; torch and the hosts come with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vision_plugin.activations._images import ImageSource, open_images
    from vision_plugin.activations._picture import BadImageError
    from vision_plugin.activations._stream import ActivationStream

_HOMES = {
    "ActivationStream": "_stream",
    "BadImageError": "_picture",
    "ImageSource": "_images",
    "open_images": "_images",
}

__all__ = ["ActivationStream", "BadImageError", "ImageSource", "open_images"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
