"""`convert`: a foreign checkpoint as a folder that SAELens loads without this package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vision_plugin._disk import whole_folder
from vision_plugin.formats._load import load_sae


def convert(
    path: str | Path, out: str | Path, sae_id: str = "", *, overwrite: bool = False, **options: Any
) -> Path:
    """Write a checkpoint of any supported format in SAELens's own.

    The folder appears whole or not at all: it is written beside `out`, flushed to disk, and
    renamed.

    Args:
        path: As for `load_sae`.
        out: The folder to write: `cfg.json` and `sae_weights.safetensors`.
        sae_id: As for `load_sae`.
        overwrite: Replace `out` if it exists.
        **options: The keyword arguments of `load_sae`.

    Returns:
        `out`.

    Raises:
        FileExistsError: `out` exists and `overwrite` is false.
        CheckpointError: As for `load_sae`; nothing is written then.
    """
    target = Path(out)
    if os.path.lexists(target) and not overwrite:
        raise FileExistsError(f"{target} exists. Choose another folder, or pass overwrite=True.")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise FileExistsError(f"{target} is not a folder; it is not overwritten.")
    sae = load_sae(path, sae_id, **options)
    with whole_folder(target) as made:
        sae.save_model(made)
    return target
