"""Checksums of a report's files, so that damaged pages and data are found."""

from __future__ import annotations

from pathlib import Path

from vision_plugin._checksums import Verification, check, is_record, record
from vision_plugin._disk import write_json
from vision_plugin._paths import local_path
from vision_plugin._untrusted import read_json
from vision_plugin.report._folder import CHECKSUMS

_SCHEMA = 1


def write_checksums(folder: Path) -> None:
    """Record the SHA-256 of every file of a report that is finished."""
    digests = record(folder, without=[CHECKSUMS])
    write_json({"schema": _SCHEMA, "sha256": digests}, folder / CHECKSUMS)


def verify(path: str | Path) -> Verification:
    """Check every byte of a report against the checksums from when it was written.

    Args:
        path: Folder of a report.

    Raises:
        FileNotFoundError: It has no checksums: an earlier version of this package wrote it.
        ValueError: The file that holds them is damaged.

    Examples:
        >>> index = vp.report(sae, model, world.images, "checked", features=[12], layout="none")
        >>> vp.report.verify("checked").problems
        ()
    """
    folder = local_path(path)
    try:
        content = read_json(folder / CHECKSUMS)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} has no {CHECKSUMS}, so its bytes cannot be checked: write the report again"
        ) from error
    recorded = content.get("sha256") if isinstance(content, dict) else None
    if not is_record(recorded):
        raise ValueError(f"{folder / CHECKSUMS} is damaged: write the report again")
    return check(folder, recorded)
