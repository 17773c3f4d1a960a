"""``vision-plugin bottleneck``: classes from an SAE's latents through a sparse linear head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vision_plugin._inputs import Inputs
from vision_plugin._ours import LENS, check_replaceable
from vision_plugin._paths import local_path
from vision_plugin.cli._console import console
from vision_plugin.cli._flags import parse, pick
from vision_plugin.cli._name import names_beside
from vision_plugin.lens import BottleneckSettings, concept_bottleneck


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(Inputs, BottleneckSettings):
    """An SAE, labelled images, and how the head on its latents is fitted."""

    sae: str
    """Folder of the SAE, or any checkpoint that ``vp.load_sae`` reads."""
    output_path: str
    """Folder of the results; earlier results of a lens in it are replaced."""
    names: str | None = None
    """JSON file that maps latents to names; by default ``names.json`` beside the SAE, if any."""
    remove: tuple[str, ...] = ()
    """Names or numbers of concepts to remove from the decision."""

    def __post_init__(self) -> None:
        Inputs.__post_init__(self)
        BottleneckSettings.__post_init__(self)


def run(arguments: Sequence[str]) -> None:
    """Fit and judge a bottleneck from flags, print its tables, and write its folder."""
    cfg = parse(
        BottleneckConfig,
        arguments,
        command="bottleneck",
        description="Classify images by an SAE's latents through a sparse linear head "
        "(Discover-then-Name), beside linear probes and zero-shot, with explanations and with what "
        "removing concepts does.",
    )
    check_replaceable(local_path(cfg.output_path), LENS)
    sae = cfg.open_sae(cfg.sae)
    model = cfg.open_model(sae, where=cfg.sae)
    names = names_beside(cfg.sae, sae) if cfg.names is None else cfg.names
    result = concept_bottleneck(
        model, sae, cfg.open_images(), names=names, settings=pick(BottleneckSettings, cfg)
    )
    removals = result.without(cfg.remove)[1:] if cfg.remove else []
    result.save(cfg.output_path, removals=removals)
    out = console()
    out.print(result.table(removals))
    out.print(result.concepts_table())
    for reason in result.left_out.values():
        out.print(f"Left out: {reason}", soft_wrap=True)
    out.print(f"In {cfg.output_path}: results.json, table.txt, figures", soft_wrap=True)
