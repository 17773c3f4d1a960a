"""``vision-plugin report``: the HTML feature browser."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vision_plugin._inputs import Inputs
from vision_plugin._ours import REPORT, check_replaceable
from vision_plugin._paths import local_path
from vision_plugin._untrusted import read_json
from vision_plugin.cli._console import console
from vision_plugin.cli._flags import parse

logger = logging.getLogger(__name__)

MAX_BYTES, MAX_VALUES = 256 * 2**20, 8_000_000
"""Size of an evaluation: some twenty numbers for each latent of an SAE and its controls."""


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
    check_replaceable(local_path(cfg.output_path), REPORT)
    known = read_scores(cfg.evaluation, cfg.sae)
    from vision_plugin.report import report

    sae = cfg.open_sae(cfg.sae)
    report(
        sae,
        cfg.open_model(sae, where=cfg.sae),
        cfg.open_images(),
        cfg.output_path,
        features=list(cfg.features) or None,
        title=cfg.title,
        **known,
    )
    console().print(f"Open {cfg.output_path}/index.html in a browser.", soft_wrap=True)


def read_scores(evaluation: str | None, sae: str) -> dict[str, Any]:
    """Return score columns and names from an evaluation's JSON; nothing if there is none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an evaluation.
    """
    path = local_path(evaluation) if evaluation else local_path(sae) / "evaluation.json"
    if not evaluation and not path.is_file():
        return {}
    try:
        content = read_json(path, limit=MAX_BYTES, max_values=MAX_VALUES)
    except ValueError as error:
        if evaluation:
            raise
        logger.warning("the report shows no scores: %s", error)
        return {}
    schema = content.get("schema") if isinstance(content, dict) else None
    if not str(schema).startswith("vision_plugin.evaluation/"):
        raise ValueError(f"{path} was not written by vision-plugin eval: name its JSON file")
    latents = _item(content, "per_latent", dict, path)
    of_sae = {
        name: _item(_item(latents, name, dict, path), "sae", dict, path, optional=True)
        for name in latents
    }
    scores = {
        name: [math.nan if value is None else value for value in _numbers(found, "score", path)]
        for name, found in of_sae.items()
        if found
    }
    if not of_sae.get("steerability"):
        return {"scores": scores}
    concepts = _item(content, "concepts", list, path)
    top = _numbers(of_sae["steerability"], "top_concept", path)
    if not all(isinstance(place, int) and place < len(concepts) for place in top):
        raise _damaged(path, "top_concept")
    return {"scores": scores, "names": [concepts[i] if i >= 0 else "" for i in top]}


def _item(
    found: dict[str, Any], name: str, kind: type, path: Path, *, optional: bool = False
) -> Any:
    """Return an entry of a JSON object, once it is of its kind."""
    value = found.get(name, kind() if optional else None)
    if not isinstance(value, kind):
        raise _damaged(path, name)
    return value


def _numbers(found: dict[str, Any], name: str, path: Path) -> list[Any]:
    """Return a list of numbers, None where one is undefined."""
    values: list[Any] = _item(found, name, list, path)
    if not all(value is None or type(value) in (int, float) for value in values):
        raise _damaged(path, name)
    return values


def _damaged(path: Path, name: str) -> ValueError:
    return ValueError(
        f"{path} has no sound {name!r}, which vision-plugin eval writes: run it again, or name "
        "another file"
    )
