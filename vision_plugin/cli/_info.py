"""``vision-plugin info``: what is installed, or what is inside a store or an SAE."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from vision_plugin._paths import local_path
from vision_plugin.cli._console import console
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
    out = console()
    if cfg.path == "presets" and not Path("presets").exists():
        for part in preset_table():
            out.print(part)
        return
    facts = installation() if cfg.path is None else inside(cfg.path)
    for name, value in facts:
        out.print(f"{name}: {value}", soft_wrap=True)


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


def preset_table() -> Iterator[Any]:
    """Yield a table with a row for each backbone, and sentences on where its numbers come from."""
    from vision_plugin._rich import Table
    from vision_plugin.sae import VisionSAERunnerConfig, presets

    by_backbone: dict[str, list[Any]] = {}
    for one in presets():
        by_backbone.setdefault(one.name, []).append(one)
    table = Table("preset", "reads", "latents", "k", "not by rule")
    sources: dict[tuple[str, str], list[str]] = {}
    for name, of_backbone in by_backbone.items():
        cfg = VisionSAERunnerConfig.preset(name, architecture="batchtopk")
        kinds = Counter(one.kind for one in of_backbone if one.kind != "by rule")
        for one in of_backbone:
            if one.kind in kinds:
                key = (one.kind, one.source)
                sources.setdefault(key, []).append(f"{name} {one.architecture}")
        table.add_row(
            name,
            f"{cfg.hook_name.removesuffix('.hook_resid_post')}, {cfg.tokens}",
            f"{cfg.sae.d_sae:,}",
            f"{cfg.sae.k:g}",
            ", ".join(f"{n} {kind}" for kind, n in kinds.items()),
        )
    yield table
    for (kind, source), names in sources.items():
        yield f"{kind}, {', '.join(names)}: {source}."
    yield (
        "The table shows latents and k for --architecture batchtopk. Every other architecture, and "
        "every setting that is not in a source, is by rule: it follows from the data and the run, "
        "and the training says what it became."
    )


def inside(path: str) -> Iterator[tuple[str, Any]]:
    """Yield the facts of an SAE, or of a store.

    Raises:
        FileNotFoundError: there is neither of the two.
        ValueError: what is there is damaged.
    """
    from vision_plugin import activations, formats

    if activations.holds_store(path):
        yield from activations.info(path).items()
        return
    folder = local_path(path)
    if not folder.exists():
        raise FileNotFoundError(f"{path} does not exist: name the folder of an SAE or of a store")
    try:
        facts = formats.info(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path} is no activation store, for want of a manifest.json or plan.json, and no "
            f"SAE: {error}"
        ) from None
    yield from facts.items()
