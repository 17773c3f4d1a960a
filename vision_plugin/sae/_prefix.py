"""How this package's own training classes are called in SAELens's registry, and in saved SAEs."""

from __future__ import annotations

from typing import Any

PREFIX = "vision_plugin_"
"""Begins their names; what follows is SAELens's name of the architecture."""


def architecture_of(config: Any) -> str:
    """Return the architecture of an SAE's configuration, by SAELens's name.

    Args:
        config: Configuration of an SAE, for training or for inference.

    Examples:
        >>> vp.sae.architecture_of(cfg.sae)
        'topk'
    """
    return str(config.architecture()).removeprefix(PREFIX)


class NamedAsStock:
    """Metadata that name SAELens's architecture: what was trained is one of its SAEs."""

    def add_training_info_to_metadata(self) -> None:
        super().add_training_info_to_metadata()  # type: ignore[misc]
        self.metadata.training_architecture = architecture_of(self)  # type: ignore[attr-defined]

    def _metadata_with_training_info(self) -> dict[str, Any]:
        found: dict[str, Any] = super()._metadata_with_training_info()  # type: ignore[misc]
        return {**found, "training_architecture": architecture_of(self)}
