"""Metrics for sparse autoencoders of vision transformers.

Every metric is a ``torchmetrics.Metric`` that streams, merges and syncs between processes, and
returns a frozen record with ``summary()`` and ``to_dict()``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vision_plugin.metrics._controls import (
    ControlDictionary,
    neuron_dictionary,
    pca_dictionary,
    random_dictionary,
    with_controls,
)
from vision_plugin.metrics._monosemanticity import (
    Monosemanticity,
    MonosemanticityResult,
    monosemanticity,
)
from vision_plugin.metrics._result import MetricResult

if TYPE_CHECKING:
    from vision_plugin.metrics._steerability import Steerability, steerability, steerability_curve
    from vision_plugin.metrics._steerability_dictionaries import HookedDictionary, NeuronDictionary
    from vision_plugin.metrics._steerability_result import SteerabilityCurve, SteerabilityResult
    from vision_plugin.metrics._steerability_screening import Screening

_HOMES = {
    "HookedDictionary": "_steerability_dictionaries",
    "NeuronDictionary": "_steerability_dictionaries",
    "Screening": "_steerability_screening",
    "Steerability": "_steerability",
    "SteerabilityCurve": "_steerability_result",
    "SteerabilityResult": "_steerability_result",
    "steerability": "_steerability",
    "steerability_curve": "_steerability",
}

__all__ = [
    "ControlDictionary",
    "HookedDictionary",
    "MetricResult",
    "Monosemanticity",
    "MonosemanticityResult",
    "NeuronDictionary",
    "Screening",
    "Steerability",
    "SteerabilityCurve",
    "SteerabilityResult",
    "monosemanticity",
    "neuron_dictionary",
    "pca_dictionary",
    "random_dictionary",
    "steerability",
    "steerability_curve",
    "with_controls",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
