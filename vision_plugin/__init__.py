"""Sparse autoencoders for vision transformers, inside TransformerLens and SAELens.

Importing this package is quick: torch and the hosts are imported by the first attribute that
needs them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vision_plugin import _hosts

if TYPE_CHECKING:
    from vision_plugin import activations, demo, kernels, metrics, models, sae, steering
    from vision_plugin.activations import extract
    from vision_plugin.models import VisionBridge, load_model, wrap
    from vision_plugin.report import report
    from vision_plugin.sae import (
        VisionMultiSAETrainingRunner,
        VisionSAERunnerConfig,
        VisionSAETrainingRunner,
        load_sae,
        train,
        train_many,
    )

__version__ = "0.1.0"

_HOMES = {
    "VisionBridge": "models",
    "VisionMultiSAETrainingRunner": "sae",
    "VisionSAERunnerConfig": "sae",
    "VisionSAETrainingRunner": "sae",
    "extract": "activations",
    "load_model": "models",
    "load_sae": "sae",
    "report": "report",
    "train": "sae",
    "train_many": "sae",
    "wrap": "models",
}
"""Public names to the packages that define them."""

_PACKAGES = (
    "activations",
    "demo",
    "kernels",
    "metrics",
    "models",
    "sae",
    "steering",
)

__all__ = [
    "VisionBridge",
    "VisionMultiSAETrainingRunner",
    "VisionSAERunnerConfig",
    "VisionSAETrainingRunner",
    "activations",
    "demo",
    "extract",
    "kernels",
    "load_model",
    "load_sae",
    "metrics",
    "models",
    "report",
    "sae",
    "steering",
    "train",
    "train_many",
    "wrap",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in _PACKAGES:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


_hosts.register()
