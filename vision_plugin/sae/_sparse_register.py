"""Enter the plugin's training classes in SAELens's registry."""

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
    """The sparse counterpart of a stock training configuration, with the same settings.

    Args:
        config: any SAELens training configuration.

    Returns:
        A new configuration for the sparse class, if ``config`` is exactly SAELens's TopK,
        BatchTopK or Matryoshka BatchTopK; otherwise ``config`` itself.
    """
    for _, sparse in CLASSES:
        if type(config) is sparse.__bases__[-1]:
            settings = {field.name: _as_declared(field, config) for field in fields(config)}
            # A configuration writes its own architecture's name into its metadata.
            return sparse(**settings | {"metadata": copy.deepcopy(config.metadata)})
    return config


def _as_declared(field: Field[Any], config: TrainingSAEConfig) -> Any:
    """A setting; a whole number where the field holds a float becomes one (BatchTopK's ``k``)."""
    value = getattr(config, field.name)
    return float(value) if field.type in (float, "float") and isinstance(value, int) else value


def register() -> None:
    """Register the sparse classes and the transcoders; calling it again changes nothing.

    Raises:
        ValueError: another package has taken one of the names.
    """
    for sae_class, config_class in CLASSES:
        name = config_class.architecture()
        entry = (sae_class, config_class)
        if SAE_TRAINING_CLASS_REGISTRY.get(name) != entry:
            register_sae_training_class(name, *entry)
    _transcoder.register()
