"""The report's folder: it is built beside its place, then moved there whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vision_plugin._disk import whole_folder
from vision_plugin._ours import REPORT

CHECKSUMS = "checksums.json"
SCHEMA = 1


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
    with whole_folder(out, replaces=REPORT, flush=False) as folder:
        yield folder


def write_marker(folder: Path, about: dict[str, Any]) -> None:
    """Write the file that marks the folder as a report, with the facts of the run."""
    text = json.dumps(
        {"kind": "vision_plugin.report", "schema": SCHEMA, **about}, indent=1, ensure_ascii=True
    )
    (folder / REPORT.marker).write_text(text + "\n", encoding="utf-8")
