"""Sparse autoencoders: trained by SAELens's trainer, saved and loaded in SAELens's format.

Importing this package is quick; torch and the hosts come with the first name that needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vision_plugin.sae._config import VisionSAERunnerConfig
    from vision_plugin.sae._multi import VisionMultiSAETrainingRunner, train_many
    from vision_plugin.sae._runner import VisionSAETrainingRunner, train
    from vision_plugin.sae._transcoder import (
        SkipTranscoderTrainingConfig,
        TranscoderTrainingConfig,
    )
    from vision_plugin.sae._validation import Validator
    from vision_plugin.sae.foreign import convert, load_sae

_HOMES = {
    "SkipTranscoderTrainingConfig": "_transcoder",
    "TranscoderTrainingConfig": "_transcoder",
    "Validator": "_validation",
    "VisionMultiSAETrainingRunner": "_multi",
    "VisionSAERunnerConfig": "_config",
    "VisionSAETrainingRunner": "_runner",
    "convert": "foreign",
    "load_sae": "foreign",
    "train": "_runner",
    "train_many": "_multi",
}

__all__ = [
    "SkipTranscoderTrainingConfig",
    "TranscoderTrainingConfig",
    "Validator",
    "VisionMultiSAETrainingRunner",
    "VisionSAERunnerConfig",
    "VisionSAETrainingRunner",
    "convert",
    "load_sae",
    "train",
    "train_many",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
