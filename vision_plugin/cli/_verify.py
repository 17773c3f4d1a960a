"""``vision-plugin verify``: check every byte of an activation store, an SAE or a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from vision_plugin.cli._flags import parse


@dataclass(frozen=True)
class VerifyConfig:
    """What to check."""

    path: tyro.conf.Positional[str]
    """Folder of an activation store, of an SAE, or of a report."""


def run(arguments: Sequence[str]) -> None:
    """Check a store.

    Raises:
        ValueError: the store is damaged; the message names every damaged shard.
    """
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
        raise ValueError(f"{cfg.path} is damaged. {report}")
    Console().print(str(report), highlight=False)


def checker(path: str) -> Callable[[str], Any]:
    """Return the function that checks what is in a folder; a store's where nothing tells."""
    from vision_plugin import activations, formats, report

    folder = Path(path)
    if (folder / "report.json").exists():
        return report.verify
    return formats.verify if (folder / "cfg.json").exists() else activations.verify
