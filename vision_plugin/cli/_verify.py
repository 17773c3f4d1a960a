"""``vision-plugin verify``: check every byte of an activation store, an SAE or a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tyro

from vision_plugin._ours import REPORT, SAE_FOLDER
from vision_plugin._paths import local_path
from vision_plugin.cli._console import console
from vision_plugin.cli._flags import parse


@dataclass(frozen=True)
class VerifyConfig:
    """What to check."""

    path: tyro.conf.Positional[str]
    """Folder of an activation store, of an SAE, or of a report."""


def run(arguments: Sequence[str]) -> int:
    """Check a store, an SAE or a report; return 1, after a line for each fault, where damaged."""
    cfg = parse(
        VerifyConfig,
        arguments,
        command="verify",
        description="Check an activation store, an SAE or a report: every byte of every file, "
        "against the checksums from when it was written.",
    )
    verify = checker(cfg.path)
    report = verify(cfg.path)
    if not report.ok:
        console(stderr=True).print(f"{cfg.path} is damaged. {report}", soft_wrap=True)
        return 1
    console().print(str(report), soft_wrap=True)
    return 0


def checker(path: str) -> Callable[[str], Any]:
    """Return the function that checks what is in a folder; a store's where nothing tells."""
    folder = local_path(path)
    if (folder / REPORT.marker).exists():
        from vision_plugin.report import verify

        return verify
    from vision_plugin import activations, formats

    return formats.verify if (folder / SAE_FOLDER.marker).exists() else activations.verify
