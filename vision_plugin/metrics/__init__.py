"""Metrics for sparse autoencoders of vision transformers.

Every metric is a ``torchmetrics.Metric`` that streams, merges and syncs between processes, and
returns a frozen record with ``summary()`` and ``to_dict()``. The names of steerability, which runs
a model, are imported at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vision_plugin.metrics._absorption import (
    Absorption,
    AbsorptionPair,
    AbsorptionResult,
    sibling_groups,
)
from vision_plugin.metrics._controls import (
    ControlDictionary,
    neuron_dictionary,
    pca_dictionary,
    random_dictionary,
    with_controls,
)
from vision_plugin.metrics._crossdomain import CrossDomain, CrossDomainResult, DomainScores
from vision_plugin.metrics._dissection import (
    Dissection,
    DissectionResult,
    dissection,
    quantile_thresholds,
)
from vision_plugin.metrics._fidelity import FVU, FVUResult
from vision_plugin.metrics._hierarchy import (
    Hierarchy,
    HierarchyResult,
    frequency_groups,
    hierarchy,
    matryoshka_groups,
)
from vision_plugin.metrics._imagecodes import pool_latents
from vision_plugin.metrics._localization import Localization, LocalizationResult, morans_i
from vision_plugin.metrics._lossrecovered import LossRecovered, LossRecoveredResult
from vision_plugin.metrics._metricset import MetricSet
from vision_plugin.metrics._monosemanticity import (
    Monosemanticity,
    MonosemanticityResult,
    monosemanticity,
)
from vision_plugin.metrics._probing import (
    DownstreamPreservation,
    DownstreamPreservationResult,
    SparseProbing,
    SparseProbingResult,
)
from vision_plugin.metrics._registry import MetricInfo, available, build, feed, get, needs, takes
from vision_plugin.metrics._result import MetricResult, headline_of, summary_of
from vision_plugin.metrics._sparsity import Sparsity, SparsityResult, l0_map
from vision_plugin.metrics._stability import Stability, StabilityResult, stability
from vision_plugin.metrics._streaming import StreamingMetric
from vision_plugin.metrics._taxonomy import read_taxonomy, taxonomy_from_columns
from vision_plugin.metrics._topimages import TopImages, TopImagesResult, top_images
from vision_plugin.metrics._uniqueness import Uniqueness, UniquenessResult, uniqueness

if TYPE_CHECKING:
    from vision_plugin.metrics._steerability import Steerability, steerability, steerability_curve
    from vision_plugin.metrics._steerability_result import SteerabilityCurve, SteerabilityResult
    from vision_plugin.metrics._steerability_screening import Screening

_HOMES = {
    "Screening": "_steerability_screening",
    "Steerability": "_steerability",
    "SteerabilityCurve": "_steerability_result",
    "SteerabilityResult": "_steerability_result",
    "steerability": "_steerability",
    "steerability_curve": "_steerability",
}

__all__ = [
    "FVU",
    "Absorption",
    "AbsorptionPair",
    "AbsorptionResult",
    "ControlDictionary",
    "CrossDomain",
    "CrossDomainResult",
    "Dissection",
    "DissectionResult",
    "DomainScores",
    "DownstreamPreservation",
    "DownstreamPreservationResult",
    "FVUResult",
    "Hierarchy",
    "HierarchyResult",
    "Localization",
    "LocalizationResult",
    "LossRecovered",
    "LossRecoveredResult",
    "MetricInfo",
    "MetricResult",
    "MetricSet",
    "Monosemanticity",
    "MonosemanticityResult",
    "Screening",
    "SparseProbing",
    "SparseProbingResult",
    "Sparsity",
    "SparsityResult",
    "Stability",
    "StabilityResult",
    "Steerability",
    "SteerabilityCurve",
    "SteerabilityResult",
    "StreamingMetric",
    "TopImages",
    "TopImagesResult",
    "Uniqueness",
    "UniquenessResult",
    "available",
    "build",
    "dissection",
    "feed",
    "frequency_groups",
    "get",
    "headline_of",
    "hierarchy",
    "l0_map",
    "matryoshka_groups",
    "monosemanticity",
    "morans_i",
    "needs",
    "neuron_dictionary",
    "pca_dictionary",
    "pool_latents",
    "quantile_thresholds",
    "random_dictionary",
    "read_taxonomy",
    "sibling_groups",
    "stability",
    "steerability",
    "steerability_curve",
    "summary_of",
    "takes",
    "taxonomy_from_columns",
    "top_images",
    "uniqueness",
    "with_controls",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
