"""``vision-plugin report``: the HTML feature browser."""

from __future__ import annotations

import logging
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vision_plugin._inputs import Inputs
from vision_plugin._ours import REPORT, check_replaceable
from vision_plugin._paths import local_path
from vision_plugin._untrusted import parse_json, read_json, read_regular
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
    compare: tuple[str, ...] = ()
    """SAEs at hooks of the same model to compare with, or ``neurons``."""
    concepts: tuple[str, ...] = ()
    """Texts whose probabilities are compared before and while each feature is held."""
    strengths: tuple[float, ...] = ()
    """Values to hold features at, for a curve over strengths; it needs ``concepts``."""
    edit: str | None = None
    """JSON file of an edit of the SAE's latents to look at; ``Edit.save`` and ``tasks`` write it.
    With ``concepts`` its latents are changed as it says, one by one and all at once."""
    study: str | None = None
    """``sparsity.json`` of a sparsity study, for L0 and explained variance by layer."""
    layout: Literal["auto", "umap", "pca", "none"] = "auto"
    """How the map is laid out; ``umap`` needs the extra ``map``."""
    title: str | None = None
    """Heading of the pages; by default it names the hook."""
    open: bool = False
    """Open the index in a browser when it is written."""


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
    known |= {"training": read_training(cfg.sae), "study": read_study(cfg.study)}
    from vision_plugin.report import report
    from vision_plugin.steering import Edit

    sae = cfg.open_sae(cfg.sae)
    written = report(
        sae,
        cfg.open_model(sae, where=cfg.sae),
        cfg.open_images(),
        cfg.output_path,
        features=list(cfg.features) or None,
        compare={
            Path(name).name: name if name == "neurons" else cfg.open_sae(name)
            for name in cfg.compare
        },
        concepts=list(cfg.concepts) or None,
        strengths=list(cfg.strengths),
        edit=None if cfg.edit is None else Edit.load(cfg.edit, sae=sae, device=cfg.device),
        layout=cfg.layout,
        title=cfg.title,
        **known,
    )
    console().print(f"Open {cfg.output_path}/index.html in a browser.", soft_wrap=True)
    if cfg.open:
        webbrowser.open(written.as_uri())


def read_scores(evaluation: str | None, sae: str) -> dict[str, Any]:
    """Return an evaluation's JSON and the names in it; nothing if there is none.

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
    for found in of_sae.values():
        for column in ("score", "z", "low") if found else ():
            if column == "score" or found.get(column) is not None:
                _numbers(found, column, path)
    for part in ("summary", "equal_firing", "left_out", "embedders"):
        for value in _item(content, part, dict, path, optional=True).values():
            if not isinstance(value, str if part in ("left_out", "embedders") else dict):
                raise _damaged(path, part)
    if not of_sae.get("steerability"):
        return {"evaluation": content}
    concepts = _item(content, "concepts", list, path)
    top = _numbers(of_sae["steerability"], "top_concept", path)
    if not all(isinstance(place, int) and place < len(concepts) for place in top):
        raise _damaged(path, "top_concept")
    return {"evaluation": content, "names": [concepts[i] if i >= 0 else "" for i in top]}


def read_training(sae: str) -> list[dict[str, Any]]:
    """Return the lines of ``validation.jsonl`` beside an SAE; none where it cannot be read."""
    path = local_path(sae) / "validation.jsonl"
    if not path.is_file():
        return []
    try:
        lines = read_regular(path, limit=MAX_BYTES).decode().splitlines()
        found = [parse_json(line.encode(), str(path)) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        logger.warning("the report shows no training curves: %s", error)
        return []
    return [record for record in found if isinstance(record, dict)]


def read_study(path: str | None) -> dict[str, Any] | None:
    """Return the JSON of a sparsity study; None where none is named.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a sparsity study.
    """
    if path is None:
        return None
    content = read_json(local_path(path), limit=MAX_BYTES, max_values=MAX_VALUES)
    schema = content.get("schema") if isinstance(content, dict) else None
    if not str(schema).startswith("vision_plugin.sparsity/"):
        raise ValueError(f"{path} is not the sparsity.json of a sparsity study: name that file")
    found: dict[str, Any] = content
    return found


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
