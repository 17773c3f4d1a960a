"""Checksums of an SAE's folder, which its `cfg.json` holds beside SAELens's own settings.

They stand at the top of the file and not in `metadata`: SAELens ignores them there, and drops them
when it saves an SAE again, so that an SAE that was changed and saved has none that are wrong.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from vision_plugin._checksums import Verification, check, is_record, record
from vision_plugin._paths import local_path
from vision_plugin.formats._errors import CorruptCheckpointError
from vision_plugin.formats._files import read_config
from vision_plugin.formats._locate import NATIVE_CONFIG, NATIVE_WEIGHTS

KEY = "sha256"


def seal(folder: str | Path) -> None:
    """Record the SHA-256 of every file in an SAE's folder, and of its settings, in `cfg.json`.

    `load_sae` compares the settings and the weights with it, and `verify` every file.

    Args:
        folder: Folder that SAELens wrote, with whatever else belongs to the SAE.

    Examples:
        >>> folder = vp.formats.convert("runs/sae", "runs/sealed-anew")
        >>> vp.formats.seal(folder)
        >>> vp.formats.verify(folder).problems
        ()
    """
    path = local_path(folder) / NATIVE_CONFIG
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop(KEY, None)
    digests = record(path.parent, without=[NATIVE_CONFIG])
    sealed = {**config, KEY: {NATIVE_CONFIG: _of_settings(config), **digests}}
    path.write_text(json.dumps(sealed), encoding="utf-8")


def verify(path: str | Path) -> Verification:
    """Check every byte of an SAE's folder against the checksums from when it was written.

    Args:
        path: Folder of an SAE.

    Raises:
        ValueError: There are none: another program wrote it, or saved it again.
        CheckpointError: Its `cfg.json` cannot be read.

    Examples:
        >>> vp.formats.verify("runs/sae").problems
        ()
    """
    folder = local_path(path)
    config = read_config(folder / NATIVE_CONFIG)
    recorded = recorded_in(folder, config)
    if recorded is None:
        raise ValueError(
            f"{folder} records no checksums, so its bytes cannot be checked: another program wrote "
            "it, or saved it again. Compare it with its source"
        )
    return _compared(folder, config, recorded)


def check_loaded(folder: Path, config: dict[str, Any]) -> None:
    """Raise if the settings or the weights of a folder that is being loaded were damaged.

    Raises:
        CorruptCheckpointError: It names the file, the checksum expected and the one found.
    """
    recorded = recorded_in(folder, config)
    if recorded is None:
        return
    needed = {name: recorded[name] for name in (NATIVE_CONFIG, NATIVE_WEIGHTS) if name in recorded}
    found = _compared(folder, config, needed)
    if not found.ok:
        raise CorruptCheckpointError(
            f"Cannot load {folder}: it was damaged after it was written ({found.problems[0]}). "
            "Take it from a copy, or write it again."
        )


def recorded_in(folder: Path, config: dict[str, Any]) -> dict[str, str] | None:
    """Return the checksums that a `cfg.json` holds, by file, or None if there are none.

    Raises:
        CorruptCheckpointError: They are not checksums.
    """
    recorded = config.get(KEY)
    if recorded is None:
        return None
    if not is_record(recorded):
        raise CorruptCheckpointError(
            f"Cannot load {folder}: the checksums in its {NATIVE_CONFIG} are damaged. Take it from "
            "a copy, or write it again."
        )
    return recorded


def _compared(folder: Path, config: dict[str, Any], recorded: dict[str, str]) -> Verification:
    """Compare a folder with its checksums; `cfg.json` is compared by what it says."""
    found = check(folder, {k: v for k, v in recorded.items() if k != NATIVE_CONFIG})
    settings = _of_settings({name: value for name, value in config.items() if name != KEY})
    expected = recorded.get(NATIVE_CONFIG, settings)
    own = []
    if settings != expected:
        own = [f"{NATIVE_CONFIG}: expected SHA-256 {expected} of its settings, found {settings}"]
    n_bytes = found.n_bytes + (folder / NATIVE_CONFIG).stat().st_size
    return Verification(str(folder), found.n_files + 1, n_bytes, (*own, *found.problems))


def _of_settings(config: dict[str, Any]) -> str:
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
