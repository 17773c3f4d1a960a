"""``vision-plugin verify``: check every byte of an activation store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from vision_plugin.cli._console import console
from vision_plugin.cli._flags import parse


@dataclass(frozen=True)
class VerifyConfig:
    """Store to check."""

    path: tyro.conf.Positional[str]
    """Folder of an activation store."""


def run(arguments: Sequence[str]) -> int:
    """Check a store; return 1, after a line on stderr for each fault, where it is damaged."""
    cfg = parse(
        VerifyConfig,
        arguments,
        command="verify",
        description="Check an activation store: its manifest, and every byte of every shard.",
    )
    from vision_plugin.activations import verify

    report = verify(cfg.path)
    if not report.ok:
        console(stderr=True).print(f"{cfg.path} is damaged. {report}", soft_wrap=True)
        return 1
    console().print(str(report))
    return 0
