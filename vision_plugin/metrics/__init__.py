"""Metrics for sparse autoencoders of vision transformers.

Every metric is a ``torchmetrics.Metric`` that streams, merges and syncs between processes, and
returns a frozen record with ``summary()`` and ``to_dict()``.
"""

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

__all__ = [
    "ControlDictionary",
    "MetricResult",
    "Monosemanticity",
    "MonosemanticityResult",
    "monosemanticity",
    "neuron_dictionary",
    "pca_dictionary",
    "random_dictionary",
    "with_controls",
]
