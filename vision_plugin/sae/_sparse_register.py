"""Register this package's training classes with SAELens."""

from __future__ import annotations

import copy
from dataclasses import Field, fields
from typing import Any

from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class
from sae_lens.saes.sae import TrainingSAEConfig

from . import _transcoder
from ._sparse_training import (
    SparseBatchTopKTrainingSAE,
    SparseBatchTopKTrainingSAEConfig,
    SparseMatryoshkaBatchTopKTrainingSAE,
    SparseMatryoshkaBatchTopKTrainingSAEConfig,
    SparseTopKTrainingSAE,
    SparseTopKTrainingSAEConfig,
)

CLASSES = (
    (SparseTopKTrainingSAE, SparseTopKTrainingSAEConfig),
    (SparseBatchTopKTrainingSAE, SparseBatchTopKTrainingSAEConfig),
    (SparseMatryoshkaBatchTopKTrainingSAE, SparseMatryoshkaBatchTopKTrainingSAEConfig),
)


def sparse_config(config: TrainingSAEConfig) -> TrainingSAEConfig:
    """Return the configuration of the sparse class that replaces a class of SAELens.

    Args:
        config: A training configuration of SAELens.

    Returns:
        A new configuration with the same settings if ``config`` is SAELens's TopK, BatchTopK or
        Matryoshka BatchTopK and no subclass; otherwise ``config`` itself.
    """
    for _, sparse in CLASSES:
        if type(config) is sparse.__bases__[-1]:
            settings = {field.name: _as_declared(field, config) for field in fields(config)}
            # A configuration writes the name of its architecture into its metadata.
            return sparse(**settings | {"metadata": copy.deepcopy(config.metadata)})
    return config


def _as_declared(field: Field[Any], config: TrainingSAEConfig) -> Any:
    """Return a setting; a whole number in a float field becomes a float (BatchTopK's ``k``)."""
    value = getattr(config, field.name)
    return float(value) if field.type in (float, "float") and isinstance(value, int) else value


def register() -> None:
    """Register the sparse classes and the transcoders; calling it again changes nothing.

    Raises:
        ValueError: another package has taken one of the names.

    Examples:
        >>> vp.sae.register()
        >>> "transcoder" in vp.sae.architectures()
        True
    """
    for sae_class, config_class in (*CLASSES, *_transcoder.CLASSES):
        name = config_class.architecture()
        entry = (sae_class, config_class)
        if SAE_TRAINING_CLASS_REGISTRY.get(name) != entry:
            register_sae_training_class(name, *entry)
