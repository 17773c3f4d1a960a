"""The files that a report shows beside an SAE's features: scores, names, curves, answers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from vision_plugin._paths import local_path
from vision_plugin._untrusted import parse_json, read_json, read_regular

logger = logging.getLogger(__name__)

MAX_BYTES, MAX_VALUES = 256 * 2**20, 8_000_000
"""Size of an evaluation: some twenty numbers for each latent of an SAE and its controls."""


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


def read_study(study: str | None, sae: str) -> dict[str, Any] | None:
    """Return the JSON of a sparsity study; None where none is named and none lies beside the SAE.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a sparsity study.
    """
    path = local_path(study) if study else local_path(sae) / "sparsity.json"
    if not study and not path.is_file():
        return None
    try:
        content = read_json(path, limit=MAX_BYTES, max_values=MAX_VALUES)
        schema = content.get("schema") if isinstance(content, dict) else None
        if not str(schema).startswith("vision_plugin.sparsity/"):
            raise ValueError(f"{path} is not the sparsity.json of a sparsity study: name that file")
    except ValueError as error:
        if study:
            raise
        logger.warning("the report shows no layers: %s", error)
        return None
    found: dict[str, Any] = content
    return found


def read_feature_names(names: str | None, where: str, sae: Any) -> Any:
    """Return the names of an SAE's features with their checks; None where there are none.

    Args:
        names: File of ``vision-plugin name``; None looks beside the SAE.
        where: Folder of the SAE.
        sae: The SAE, whose names they must be.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file named holds no names, or those of another SAE.
    """
    from vision_plugin.lens import NAMES_FILE, read_names

    if names:
        return read_names(names, sae=sae)
    if not (local_path(where) / NAMES_FILE).is_file():
        return None
    try:
        return read_names(local_path(where), sae=sae)
    except ValueError as error:
        logger.warning("the report shows no names of names.json: %s", error)
        return None


def read_spoken(answers: str | None) -> dict[str, Any] | None:
    """Return the answers of a language model that a file holds; None where none is named.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no answers.
    """
    if answers is None:
        return None
    path = local_path(answers)
    content = read_json(path, limit=MAX_BYTES, max_values=MAX_VALUES)
    rows = content.get("answers") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(
            f"{path} holds no answers: write what FeatureAnswers.to_dict() returns to it"
        )
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
