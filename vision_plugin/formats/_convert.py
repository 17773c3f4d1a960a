"""`convert`: write a foreign checkpoint as a folder that SAELens loads without this package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from vision_plugin._disk import whole_folder
from vision_plugin._ours import SAE_FOLDER, check_replaceable
from vision_plugin._paths import local_path
from vision_plugin.formats._load import load_sae
from vision_plugin.formats._seal import seal


def convert(
    path: str | Path, out: str | Path, sae_id: str = "", *, overwrite: bool = False, **options: Any
) -> Path:
    """Write a checkpoint of any supported format in SAELens's own format.

    The folder appears whole or not at all: it is written beside `out`, flushed to disk, and
    renamed.

    Args:
        path: A file, a folder, a release that SAELens knows, or a hub id `owner/name`.
        out: Folder to write `cfg.json` and `sae_weights.safetensors` to.
        sae_id: The release's SAE id, or the folder or weights file inside the folder or repository.
        overwrite: Whether to replace `out` if this package wrote it.
        **options: The keyword arguments of `load_sae`.

    Returns:
        The folder `out`.

    Raises:
        FileExistsError: `out` exists, and `overwrite` is false or somebody else wrote it.
        CheckpointError: `load_sae` cannot read the checkpoint; nothing is written then.

    Examples:
        >>> vp.formats.convert("runs/sae", "runs/converted").name
        'converted'
        >>> SAE.load_from_disk("runs/converted").cfg.d_sae
        256
    """
    target = local_path(out)
    if os.path.lexists(target) and not overwrite:
        raise FileExistsError(f"{target} exists. Choose another folder, or pass overwrite=True.")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise FileExistsError(f"{target} is not a folder, so it is not overwritten: name a folder.")
    kind = SAE_FOLDER if overwrite else None
    check_replaceable(target, kind, name="out")
    sae = load_sae(path, sae_id, **options)
    with whole_folder(target, replaces=kind) as made:
        sae.save_model(made)
        seal(made)
    return target
