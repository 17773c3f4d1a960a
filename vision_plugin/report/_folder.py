"""The report's folder: it is built beside its place, then moved there whole."""

from __future__ import annotations

import fcntl
import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from vision_plugin._disk import put_in_place, umask

logger = logging.getLogger(__name__)

MARKER = "report.json"
CHECKSUMS = "checksums.json"
KIND = "vision_plugin.report"
SCHEMA = 1
_LOCK = ".building"
CONTENTS = frozenset(
    {MARKER, CHECKSUMS, _LOCK, "index.html", "data.js", "assets", "features", "images", "pictures"}
)
"""Names that a report's folder may hold at its top; anything else there is someone's own.

Reports of version 0.1.0 keep their images in ``pictures``.
"""
_MAX_MARKER_BYTES = 1 << 16


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to build in, which replaces ``out`` when the block ends without error.

    Until then ``out`` stays as it is, whatever happens to the process. The next build removes what
    a killed one left behind.

    Args:
        out: Folder of the report. It may not exist, be empty, or hold an earlier report.

    Raises:
        FileExistsError: ``out`` holds anything else.
    """
    out = out.expanduser().resolve()
    check_replaceable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    _restore_interrupted(out)
    _sweep(out)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.part-", dir=out.parent))
    try:
        with (folder / _LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
            check_replaceable(out)
            folder.chmod(0o777 & ~umask())
            put_in_place(folder, out, aside=_earlier(out))
            (out / _LOCK).unlink()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def check_replaceable(out: Path) -> None:
    """Raise FileExistsError if ``out`` holds anything but an earlier report."""
    if not out.exists():
        return
    if not out.is_dir():
        raise FileExistsError(
            f"{out} is a file; a report needs a folder: name another output_path="
        )
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    if not _is_report(out):
        raise FileExistsError(
            f"{out} holds files and is not a report of vision_plugin, so it is left alone: name "
            "another output_path=, or empty that folder yourself"
        )
    foreign = sorted(names - CONTENTS)
    if foreign:
        raise FileExistsError(
            f"{out} is a report, but {foreign[0]!r} in it was not written by vision_plugin and "
            "would be lost: move it elsewhere, or name another output_path="
        )


def write_marker(folder: Path, about: dict[str, Any]) -> None:
    """Write the file that marks the folder as a report, with the facts of the run."""
    text = json.dumps({"kind": KIND, "schema": SCHEMA, **about}, indent=1, ensure_ascii=True)
    (folder / MARKER).write_text(text + "\n", encoding="utf-8")


def _is_report(folder: Path) -> bool:
    marker = folder / MARKER
    try:
        if marker.stat().st_size > _MAX_MARKER_BYTES:
            return False
        about = json.loads(marker.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(about, dict) and about.get("kind") == KIND


def _earlier(out: Path) -> Path:
    return out.with_name(f".{out.name}.earlier")


def _restore_interrupted(out: Path) -> None:
    """Finish or undo a swap of folders that was killed between its two renames."""
    earlier = _earlier(out)
    if not earlier.is_dir() or not _is_report(earlier):
        return
    if out.exists():
        shutil.rmtree(earlier)
    else:
        earlier.rename(out)


def _sweep(out: Path) -> None:
    """Remove the folders of killed builds; running builds hold a lock on theirs."""
    prefix = f".{out.name}.part-"
    for path in sorted(out.parent.iterdir()):
        lock_file = path / _LOCK
        if not path.name.startswith(prefix) or path.is_symlink() or not lock_file.is_file():
            continue
        with suppress(BlockingIOError), lock_file.open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            logger.info("removing %s, left behind by an interrupted build", path)
            shutil.rmtree(path)
