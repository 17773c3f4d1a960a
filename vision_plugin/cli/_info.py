"""``vision-plugin info``: what is installed, or what is inside a store or an SAE."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from vision_plugin.cli._flags import parse


@dataclass(frozen=True)
class InfoConfig:
    """Store or SAE to describe."""

    path: tyro.conf.Positional[str | None] = None
    """Folder of an activation store or of an SAE, or the word ``presets``; without it, the command
    describes this installation."""


def run(arguments: Sequence[str]) -> None:
    """Print the facts, one a line."""
    cfg = parse(
        InfoConfig,
        arguments,
        command="info",
        description="Say what is inside an activation store or an SAE; which presets there are "
        "for training (vision-plugin info presets); or, without a path, which models, metrics and "
        "kernels this installation has.",
    )
    if cfg.path == "presets" and not Path("presets").exists():
        facts = preset_facts()
    else:
        facts = installation() if cfg.path is None else inside(cfg.path)
    console = Console()
    for name, value in facts:
        console.print(f"{name}: {value}", highlight=False, soft_wrap=True)


def installation() -> Iterator[tuple[str, Any]]:
    """Yield versions, supported architectures, metrics and kernel backends."""
    from importlib.metadata import version

    from vision_plugin import __version__, kernels, metrics
    from vision_plugin.models import adapters

    yield "vision_plugin", __version__
    for name in ("torch", "transformer-lens", "sae-lens", "transformers"):
        yield name, version(name)
    yield "architectures", ", ".join(sorted(adapters()))
    yield from _metric_facts(metrics.available().values())
    for status in kernels.available().values():
        yield f"kernel backend {status.name}", status.reason or "usable"


def _metric_facts(listed: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Yield metrics by the package that brings them, and why any cannot be used."""
    by_package: dict[str, list[str]] = {}
    for metric in listed:
        if metric.usable:
            by_package.setdefault(metric.package, []).append(metric.name)
        else:
            yield f"metric {metric.name} of {metric.package}", f"cannot be used: {metric.error}"
    for package, names in by_package.items():
        yield f"metrics of {package}", ", ".join(names)


def preset_facts() -> Iterator[tuple[str, Any]]:
    """Yield the training settings of every backbone and architecture, with their source."""
    from vision_plugin.sae import presets

    for one in presets():
        run, sae = one.run, one.sae
        sparsity = [f"{name} {sae[name]:g}" for name in _SPARSITY if name in sae]
        facts = [
            f"{run['model_name']} at {' to '.join(filter(None, _hooks(run)))}",
            f"{run['tokens']} tokens",
            f"d_sae {sae['d_sae']}",
            *sparsity,
            f"lr {run['lr']:g}",
            f"{run['training_tokens']:,} training tokens",
            f"scaling {sae.get('normalize_activations', 'none')}",
        ]
        yield f"{one.name} {one.architecture}", f"{', '.join(facts)}; source: {one.source}"


_SPARSITY = ("k", "max_iterations", "l1_coefficient", "l0_coefficient")


def _hooks(run: dict[str, Any]) -> tuple[str | None, ...]:
    return run["hook_name"], run.get("hook_name_out")


def inside(path: str) -> Iterator[tuple[str, Any]]:
    """Yield the facts of an SAE's folder, or of a store."""
    from vision_plugin.activations import info

    config = Path(path) / "cfg.json"
    if not config.is_file():
        yield from info(path).items()
        return
    content = json.loads(config.read_text(encoding="utf-8"))
    metadata = content.pop("metadata", {})
    yield from content.items()
    yield from metadata.items()
