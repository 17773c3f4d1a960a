"""Pictures in, activations to disk and back.

``extract`` runs pictures through a model into a store, ``ActivationStore`` reads it, ``verify``
and ``info`` tell whether it is sound and what is in it. SPEC.md beside this file is the format.

Importing this package is quick; torch and the hosts come with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vision_plugin.activations._batches import Batch, ShuffledBatches
    from vision_plugin.activations._config import ExtractionConfig
    from vision_plugin.activations._errors import (
        ManifestError,
        ShardError,
        StoreError,
        StoreFullError,
        StoreLockedError,
        StoreMismatchError,
        TooManyBadImagesError,
    )
    from vision_plugin.activations._extract import extract
    from vision_plugin.activations._images import ImageSource, open_images
    from vision_plugin.activations._picture import BadImageError
    from vision_plugin.activations._store import ActivationStore
    from vision_plugin.activations._stream import ActivationStream
    from vision_plugin.activations._verify import VerificationReport, info, verify

_HOMES = {
    "ActivationStore": "_store",
    "ActivationStream": "_stream",
    "BadImageError": "_picture",
    "Batch": "_batches",
    "ExtractionConfig": "_config",
    "ImageSource": "_images",
    "ManifestError": "_errors",
    "ShardError": "_errors",
    "ShuffledBatches": "_batches",
    "StoreError": "_errors",
    "StoreFullError": "_errors",
    "StoreLockedError": "_errors",
    "StoreMismatchError": "_errors",
    "TooManyBadImagesError": "_errors",
    "VerificationReport": "_verify",
    "extract": "_extract",
    "info": "_verify",
    "open_images": "_images",
    "verify": "_verify",
}

__all__ = [
    "ActivationStore",
    "ActivationStream",
    "BadImageError",
    "Batch",
    "ExtractionConfig",
    "ImageSource",
    "ManifestError",
    "ShardError",
    "ShuffledBatches",
    "StoreError",
    "StoreFullError",
    "StoreLockedError",
    "StoreMismatchError",
    "TooManyBadImagesError",
    "VerificationReport",
    "extract",
    "info",
    "open_images",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
