"""``vision-plugin verify``: check every byte of an activation store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro
from rich.console import Console

from vision_plugin.cli._flags import parse


@dataclass(frozen=True)
class VerifyConfig:
    """Store to check."""

    path: tyro.conf.Positional[str]
    """Folder of an activation store."""


def run(arguments: Sequence[str]) -> None:
    """Check a store.

    Raises:
        ValueError: the store is damaged; the message names every damaged shard.
    """
    cfg = parse(
        VerifyConfig,
        arguments,
        command="verify",
        description="Check an activation store: its manifest, and every byte of every shard.",
    )
    from vision_plugin.activations import verify

    report = verify(cfg.path)
    if not report.ok:
        raise ValueError(f"{cfg.path} is damaged. {report}")
    Console().print(str(report), highlight=False)
