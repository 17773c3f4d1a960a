"""``names.json``: names of features on disk, tied to the SAE whose latents they name."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vision_plugin._untrusted import read_json
from vision_plugin.lens._name_checks import Check
from vision_plugin.lens._names import (
    CHECK_COLUMNS,
    NAMES_KIND,
    SCHEMA,
    FeatureNames,
    NameCandidates,
    place_of,
)
from vision_plugin.lens._vocabulary import MAX_LENGTH, clean_name
from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.site import has_signature
from vision_plugin.steering import fingerprint, same_dictionary

MAX_BYTES, MAX_VALUES = 256 * 2**20, 16_000_000


def read_names(
    path: str | Path, *, sae: Dictionary | None = None, model: Any = None
) -> FeatureNames:
    """Read the names of an SAE's features, as :meth:`FeatureNames.save` wrote them.

    ``.texts()`` of the result gives names by latent, ``.entries()`` every candidate with its check,
    and ``.find(word)`` latents by name.

    Args:
        path: ``names.json``, or the folder that holds it, such as the SAE's.
        sae: The SAE that they should be of; None reads the names of any.
        model: The VisionBridge that they should be of; None reads the names of any.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no names, is damaged, or names the features of another SAE or model.

    Examples:
        >>> settings = {"vocabulary": ["red", "blue"], "methods": ("dissect",), "progress": False}
        >>> names = vp.name_features(model, sae, "demo:60", **settings)
        >>> vp.lens.read_names(names.save("feature-names.json"), sae=sae).names == names.names
        True
    """
    place = place_of(path)
    if not place.exists():
        raise FileNotFoundError(f"{place}: there is no such file; `vision-plugin name` writes it")
    content = read_json(place, limit=MAX_BYTES, max_values=MAX_VALUES, strict=True)
    schema = content.get("schema") if isinstance(content, dict) else None
    if not str(schema).startswith(NAMES_KIND):
        raise ValueError(f"{place} holds no names of features: `vision-plugin name` writes them")
    if schema != SCHEMA:
        raise ValueError(
            f"{place} has the schema {schema!r}, and this version reads {SCHEMA!r}: update "
            "vision_plugin"
        )
    try:
        names = _from_dict(content)
    except (KeyError, TypeError, AttributeError, OverflowError, ValueError) as error:
        raise ValueError(
            f"{place} does not hold what names.json holds ({type(error).__name__}: {error}): "
            "write it again with vision-plugin name"
        ) from error
    if sae is not None and not same_dictionary(dict(names.sae["fingerprint"]), fingerprint(sae)):
        raise ValueError(
            f"{place} names the features of an SAE of {len(names):,} latents at "
            f"{names.sae['hook_name']}, and this SAE is another one: run vision-plugin name on it"
        )
    if model is not None and not has_signature(model, names.model["signature"]):
        raise ValueError(
            f"{place} holds names that were made in {names.model['name']}, whose weights differ "
            f"from those of {model.cfg.model_name}: run vision-plugin name in this model"
        )
    return names


def _from_dict(content: dict[str, Any]) -> FeatureNames:
    sae, model = _mapping(content["sae"]), _mapping(content["model"])
    d_sae = _whole(_mapping(sae["fingerprint"])["d_sae"])
    _check_fingerprint(sae["fingerprint"])
    _text(sae["hook_name"])
    _text(model["name"])
    _numbers(model["signature"], len(model["signature"]))
    candidates = {
        _text(method): _candidates_from_dict(_mapping(one), d_sae)
        for method, one in _mapping(content["candidates"]).items()
    }
    made_by = tuple(_list(content["made_by"], d_sae, _text_or_none))
    if not {method for method in made_by if method is not None} <= candidates.keys():
        raise ValueError("made_by names a method that has no candidates")
    agreement = {
        _text(pair): {_text(key): _number_or_none(v) for key, v in _mapping(found).items()}
        for pair, found in _mapping(content["agreement"]).items()
    }
    names = FeatureNames(
        candidates=candidates,
        made_by=made_by,
        agreement=agreement,
        sae=sae,
        model=model,
        settings=_mapping(content["settings"]),
        left_out={_text(k): _text(v) for k, v in _mapping(content["left_out"]).items()},
        n_made_on=_whole(content["n_made_on"]),
    )
    if content["names"] != list(names.names):
        raise ValueError("names and candidates differ")
    return names


def _candidates_from_dict(one: dict[str, Any], d_sae: int) -> NameCandidates:
    check = None if one["check"] is None else _check_from_dict(_mapping(one["check"]), d_sae)
    return NameCandidates(
        names=tuple(_list(one["names"], d_sae, _name_or_none)),
        scores=_numbers(one["scores"], d_sae),
        score_name=_text(one["score_name"]),
        note=_text(one["note"]),
        making_auroc=_numbers(one["making_auroc"], d_sae),
        check=check,
    )


def _check_from_dict(found: dict[str, Any], d_sae: int) -> Check:
    return Check(
        **{name: _numbers(found[name], d_sae) for name in CHECK_COLUMNS},
        n_fired=torch.tensor(_list(found["n_fired"], d_sae, _whole), dtype=torch.int64),
        n_images=_whole(found["n_images"]),
        by=_text(found["by"]),
        confidence=float(_number_or_none(found["confidence"]) or 0),
    )


def _check_fingerprint(found: dict[str, Any]) -> None:
    _whole(found["d_in"])
    for name in found.keys() & {"W_enc", "W_dec"}:
        _numbers(found[name], 2)
        _list(found[name], 2, float)


def _list(values: Any, length: int, of: Callable[[Any], Any]) -> list[Any]:
    if not isinstance(values, list) or len(values) != length:
        raise ValueError(f"a list of {length:,} entries is needed")
    return [of(value) for value in values]


def _numbers(values: Any, length: int) -> Tensor:
    found = [math.nan if v is None else v for v in _list(values, length, _number_or_none)]
    return torch.tensor(found, dtype=torch.float64)


def _number_or_none(value: Any) -> float | None:
    if value is not None and type(value) not in (int, float):
        raise ValueError(f"{str(value)[:40]!r} is no number")
    return None if value is None else float(value)


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"{str(value)[:40]!r} is no count")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{str(value)[:40]!r} is no text")
    return value


def _text_or_none(value: Any) -> str | None:
    return None if value is None else _text(value)


def _name_or_none(value: Any) -> str | None:
    if value is None:
        return None
    name = clean_name(_text(value))
    if not name or len(name) > MAX_LENGTH or name != value:
        raise ValueError(f"{value[:40]!r} is no name")
    return name


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{str(value)[:40]!r} is no object")
    return value
