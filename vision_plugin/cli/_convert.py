"""``vision-plugin convert``: another project's SAE in SAELens's format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vision_plugin.cli._console import console
from vision_plugin.cli._flags import parse


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Checkpoint to convert, and where to write it."""

    sae: str
    """File, folder, or hub id of the checkpoint."""
    output_path: str
    """Folder to write; it must not exist."""
    sae_id: str = ""
    """Folder or file inside a repository."""
    format: str = "auto"
    """Format of the checkpoint; ``auto`` detects it."""


def run(arguments: Sequence[str]) -> None:
    """Convert an SAE from flags."""
    from vision_plugin.formats import convert

    cfg = parse(
        ConvertConfig,
        arguments,
        command="convert",
        description="Write a published SAE in SAELens's format, so that SAE.load_from_disk reads "
        "it without this package.",
    )
    folder = convert(cfg.sae, cfg.output_path, cfg.sae_id, format=cfg.format)
    console().print(f"Saved to {folder} in SAELens's format.")
