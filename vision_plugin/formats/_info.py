"""What an SAE of any format is, by its settings and metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vision_plugin._paths import local_path
from vision_plugin._shown import shown
from vision_plugin.formats._errors import CorruptCheckpointError
from vision_plugin.formats._files import read_config
from vision_plugin.formats._loaders import disk_converter
from vision_plugin.formats._locate import NATIVE_CONFIG, native_folder
from vision_plugin.formats._seal import KEY, recorded_in


def info(path: str | Path) -> dict[str, Any]:
    """Return the settings and metadata of an SAE of any format, as JSON values.

    `checksums` says whether its bytes can be checked: files of other projects record nothing to
    check them by.

    Args:
        path: A file or a folder, as `load_sae` takes it.

    Raises:
        FileNotFoundError: There is no SAE.
        CheckpointError: It cannot be read; see `load_sae`.

    Examples:
        >>> found = vp.formats.info("runs/sae")
        >>> found["architecture"], found["hook_name"], found["tokens"]
        ('topk', 'blocks.2.hook_resid_post', 'all')
    """
    named = local_path(path)
    native = native_folder(named)
    folder = native or named
    checksums = "none: another program wrote it, and its bytes cannot be checked"
    if native is not None:
        config = read_config(folder / NATIVE_CONFIG)
        recorded = recorded_in(folder, config)
        if recorded is not None:
            checksums = f"SHA-256 of {len(recorded)} files; vision-plugin verify compares them"
    else:
        config, _ = disk_converter()(folder)
    config = {name: value for name, value in config.items() if name != KEY}
    metadata = config.pop("metadata", {})
    if not isinstance(metadata, dict):
        raise CorruptCheckpointError(
            f"Cannot load {folder}: the metadata in its {NATIVE_CONFIG} is {shown(metadata)}, not "
            "an object. It is not of an SAE, or damaged."
        )
    return {**config, **metadata, "checksums": checksums}
