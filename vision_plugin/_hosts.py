"""Add our entries to the registries of TransformerLens and SAELens once those are imported.

Only programs that import ``vision_plugin`` are affected. Every addition is idempotent and none
replaces an entry of the host's own.
"""

from __future__ import annotations

import logging
from importlib.metadata import entry_points
from types import ModuleType

logger = logging.getLogger(__name__)


def register() -> None:
    """Add our entries to each host as soon as it is imported, without importing it."""
    try:
        import wrapt
    except ModuleNotFoundError:
        # The kernels run with torch alone; without wrapt there are no hosts to register with.
        logger.debug("wrapt is not installed: nothing is registered with SAELens")
        return
    wrapt.when_imported("transformer_lens.model_bridge.sources.transformers")(add_architectures)
    wrapt.when_imported("sae_lens")(add_to_sae_lens)


def add_architectures(module: ModuleType) -> None:
    """Let ``TransformerBridge.boot_transformers`` find our adapters by architecture name.

    TransformerLens's loader looks in its table of supported architectures, not among the adapters
    that entry points add.
    """
    from transformer_lens.utilities.architectures import VISION_ARCHITECTURES

    for entry in entry_points(group="transformer_lens.architectures"):
        is_ours = entry.value.startswith("vision_plugin.hooks.")
        if is_ours and entry.name not in module.SUPPORTED_ARCHITECTURES:
            module.SUPPORTED_ARCHITECTURES[entry.name] = entry.load()
            VISION_ARCHITECTURES.add(entry.name)


def add_to_sae_lens(module: ModuleType) -> None:
    """Register the sparse training classes, the foreign formats and the named releases."""
    del module
    from vision_plugin import formats, sae

    sae.register()
    formats.register()
