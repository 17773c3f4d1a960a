"""``vision-plugin report``: the HTML feature browser."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vision_plugin._inputs import Inputs
from vision_plugin.cli._flags import parse

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Inputs):
    """SAE to report on, and where to write the pages."""

    sae: str
    """Folder of the SAE, or any checkpoint that ``vp.load_sae`` reads."""
    output_path: str = "report"
    """Folder of the pages; an earlier report in it is replaced."""
    evaluation: str | None = None
    """JSON of ``vision-plugin eval``; by default ``evaluation.json`` beside the SAE, if any."""
    features: tuple[int, ...] = ()
    """Numbers of the latents to report; all by default."""
    title: str | None = None
    """Heading of the pages; by default it names the hook."""


def run(arguments: Sequence[str]) -> None:
    """Write a report from flags and print where it is."""
    cfg = parse(
        ReportConfig,
        arguments,
        command="report",
        description="Write static HTML pages in which an SAE's features can be browsed.",
    )
    from vision_plugin.report import report

    sae = cfg.open_sae(cfg.sae)
    report(
        sae,
        cfg.open_model(sae, where=cfg.sae),
        cfg.open_images(),
        cfg.output_path,
        features=list(cfg.features) or None,
        title=cfg.title,
        **read_scores(cfg.evaluation, cfg.sae),
    )
    Console().print(
        f"Open {cfg.output_path}/index.html in a browser.", highlight=False, soft_wrap=True
    )


def read_scores(evaluation: str | None, sae: str) -> dict[str, Any]:
    """Return score columns and names from an evaluation's JSON; nothing if there is none.

    Raises:
        ValueError: the named file is not an evaluation.
    """
    path = Path(evaluation) if evaluation else Path(sae) / "evaluation.json"
    if not evaluation and not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if not str(content.get("schema", "")).startswith("vision_plugin.evaluation/"):
        raise ValueError(f"{path} was not written by vision-plugin eval: name its JSON file")
    latents = content["per_latent"]
    columns = {name: results["sae"]["score"] for name, results in latents.items()}
    scores = {
        name: [float("nan") if value is None else value for value in column]
        for name, column in columns.items()
    }
    names = {}
    if "steerability" in latents:
        concepts = content["concepts"]
        top = latents["steerability"]["sae"]["top_concept"]
        names = {"names": [concepts[i] if i >= 0 else "" for i in top]}
    return {"scores": scores, **names}
