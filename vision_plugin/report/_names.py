"""Names of features with their checks, and what a language model says under steering."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vision_plugin.lens import FeatureNames
from vision_plugin.report._inputs import check_latent, clean
from vision_plugin.report._numbers import compact


@dataclass(frozen=True)
class Name:
    """A name of a feature, how it was found, and how well it tells the feature's images apart."""

    text: str
    method: str = ""
    auroc: float = math.nan
    """Share of pairs of an image that fires and one that does not, which the name puts in order."""
    low: float = math.nan
    high: float = math.nan
    chance: float = math.nan
    """The same figure for a name drawn at random."""

    @property
    def is_checked(self) -> bool:
        """Whether there is a check."""
        return math.isfinite(self.auroc)

    def row(self) -> dict[str, Any]:
        """Return the name as a page shows it."""
        interval = ""
        if math.isfinite(self.low) and math.isfinite(self.high):
            interval = f"{compact(self.low)} to {compact(self.high)}"
        above = self.low if math.isfinite(self.low) else self.auroc
        return {
            "text": self.text,
            "method": self.method,
            "auroc": compact(self.auroc) if self.is_checked else "",
            "interval": interval,
            "chance": compact(self.chance) if math.isfinite(self.chance) else "",
            "holds": self.is_checked and above > (self.chance if self.chance > 0 else 0.5),
        }


def read_names(names: Any, d_sae: int) -> list[tuple[Name, ...]] | None:
    """Return the names of every latent, the best first; None if no latent has one.

    Args:
        names: A sequence of ``d_sae`` entries, or a mapping from latents to entries. An entry is a
            text, a mapping with ``name`` and any of ``method``, ``auroc``, ``low`` and ``high`` (or
            ``interval``) and ``chance``, several of these, or None. ``vp.name_features`` and
            ``vp.lens.read_names`` return names with their checks.
        d_sae: Number of latents.

    Raises:
        ValueError: the sequence has another length, a latent is out of range, or an entry has no
            name.
    """
    if names is None:
        return None
    if isinstance(names, FeatureNames):
        names = _checked(names)
    found: list[tuple[Name, ...]] = [()] * d_sae
    if isinstance(names, Mapping):
        for latent, entry in names.items():
            check_latent(latent, d_sae, "names")
            found[latent] = _entry(entry, f"names[{latent}]")
    else:
        if isinstance(names, str) or len(names) != d_sae:
            raise ValueError(
                f"names= has {len(names)} entries, but the SAE has {d_sae} latents: give one text "
                "per latent, or a mapping from latents to texts"
            )
        found = [_entry(entry, f"names[{place}]") for place, entry in enumerate(names)]
    return found if any(found) else None


def _entry(entry: Any, where: str) -> tuple[Name, ...]:
    if entry is None or entry == "":
        return ()
    if isinstance(entry, Mapping):
        return (_name(entry, where),)
    if isinstance(entry, Sequence) and not isinstance(entry, str):
        return tuple(name for part in entry for name in _entry(part, where))
    return (Name(clean(entry)),)


def _name(entry: Mapping[str, Any], where: str) -> Name:
    if not entry.get("name"):
        raise ValueError(f'{where} has no "name": give a text, or a mapping with a name in it')
    low, high = entry.get("interval") or (entry.get("low"), entry.get("high"))
    numbers = {"auroc": entry.get("auroc"), "low": low, "high": high, "chance": entry.get("chance")}
    try:
        read = {key: math.nan if value is None else float(value) for key, value in numbers.items()}
    except (TypeError, ValueError):
        raise ValueError(f"{where} has a check that is no number: {numbers}") from None
    return Name(clean(entry["name"]), clean(entry.get("method") or ""), **read)


def _checked(names: FeatureNames) -> list[list[dict[str, Any]]]:
    """Return every latent's names with their checks: the chosen one, then each other method's."""
    return [
        [
            _candidate(names, method, latent)
            for method in dict.fromkeys([chosen, *names.candidates])
            if method is not None and names.candidates[method].names[latent]
        ]
        for latent, chosen in enumerate(names.made_by)
    ]


def _candidate(names: FeatureNames, method: str, latent: int) -> dict[str, Any]:
    one = names.candidates[method]
    check = one.check
    found = {"name": one.names[latent], "method": method}
    if check is None:
        return found
    columns = {
        "auroc": check.auroc,
        "low": check.low,
        "high": check.high,
        "chance": check.shuffled,
    }
    return found | {key: float(values[latent]) for key, values in columns.items()}


def read_answers(answers: Any, d_sae: int, n_images: int = 0) -> dict[int, list[dict[str, Any]]]:
    """Return what a language model says before and while a latent is held, ready for a page.

    Args:
        answers: A mapping from latents to mappings with ``prompt``, ``before``, ``after``,
            ``strength`` and ``image`` (a number); or the ``to_dict()`` of what
            ``vp.tasks.feature_answers`` returns, to which ``"images"`` may add their numbers.
        d_sae: Number of latents.
        n_images: Number of images of the report's source.

    Raises:
        ValueError: a latent or an image is out of range, or an answer lacks one of its texts.
    """
    if isinstance(answers, Mapping) and "answers" in answers:
        answers = _by_latent(answers)
    found: dict[int, list[dict[str, Any]]] = {}
    for latent, rows in (answers or {}).items():
        check_latent(latent, d_sae, "answers")
        for row in rows:
            lacking = [key for key in ("prompt", "before", "after") if key not in row]
            if lacking:
                raise ValueError(
                    f"answers[{latent}] lacks {lacking[0]!r}: give prompt, before, after"
                )
            strength, image = row.get("strength"), row.get("image")
            if image is not None and not (type(image) is int and 0 <= image < n_images):
                raise ValueError(
                    f"answers[{latent}] names image {image!r}: there are {n_images}, from 0"
                )
            texts = {key: clean(row[key]) for key in ("prompt", "before", "after")}
            held = "" if strength is None else compact(float(strength))
            found.setdefault(int(latent), []).append({**texts, "strength": held, "image": image})
    return found


def _by_latent(answers: Mapping[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """Return the answers of ``FeatureAnswers.to_dict()``, one for each image, by latent."""
    numbers = answers.get("images") or ()
    found: dict[int, list[dict[str, Any]]] = {}
    for spoken in answers["answers"]:
        try:
            pairs = list(zip(spoken["before"], spoken["after"], strict=True))
            asked = {"prompt": spoken["prompt"], "strength": spoken["strength"]}
            rows = found.setdefault(spoken["latent"], [])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                "answers= does not hold what vp.tasks.feature_answers returns "
                f"({error!r}): ask again"
            ) from None
        for place, (before, after) in enumerate(pairs):
            image = numbers[place] if place < len(numbers) else None
            rows.append({**asked, "before": before, "after": after, "image": image})
    return found
