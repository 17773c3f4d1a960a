"""Names of architectures, and the SAELens training configuration that each name stands for."""

from __future__ import annotations

from typing import Any

from vision_plugin.sae._prefix import PREFIX


def architectures() -> list[str]:
    """Return every architecture that can be trained: SAELens's, and those that plugins register.

    This package's sparse classes go by SAELens's names, and its transcoders by the names that
    SAELens saves them under.

    Examples:
        >>> {"topk", "batchtopk", "transcoder"} <= set(vp.sae.architectures())
        True
    """
    names = _registry()
    return sorted({name.removeprefix(PREFIX) for name in names})


def training_config_class(architecture: str) -> Any:
    """Return the class of an architecture's training configuration.

    Args:
        architecture: A name that :func:`architectures` lists.

    Raises:
        ValueError: the architecture is unknown.

    Examples:
        >>> vp.sae.training_config_class("gated").__name__
        'GatedTrainingSAEConfig'
    """
    registry = _registry()
    for name in (architecture, f"{PREFIX}{architecture}"):
        if name in registry:
            return registry[name][1]
    raise ValueError(
        f"unknown architecture {architecture!r}: choose from {', '.join(architectures())}"
    )


def _registry() -> dict[str, Any]:
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

    from vision_plugin.sae import _sparse_register

    _sparse_register.register()
    registry: dict[str, Any] = SAE_TRAINING_CLASS_REGISTRY
    return registry
