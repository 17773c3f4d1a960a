"""Enter the sparse training classes in SAELens's registry."""

from __future__ import annotations

from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY, register_sae_training_class

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


def register() -> None:
    """Register the sparse classes with SAELens; calling it again changes nothing.

    Raises:
        ValueError: another package has taken one of the names.
    """
    for sae_class, config_class in CLASSES:
        name = config_class.architecture()
        entry = (sae_class, config_class)
        if SAE_TRAINING_CLASS_REGISTRY.get(name) != entry:
            register_sae_training_class(name, *entry)
