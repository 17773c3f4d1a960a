"""Names of features with their checks, and what a language model says under steering."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
            ``interval``) and ``chance``, several of these, or None.
        d_sae: Number of latents.

    Raises:
        ValueError: the sequence has another length, a latent is out of range, or an entry has no
            name.
    """
    if names is None:
        return None
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


def read_answers(answers: Any, d_sae: int) -> dict[int, list[dict[str, str]]]:
    """Return what a language model says before and while a latent is held, ready for a page.

    Args:
        answers: A mapping from latents to mappings with ``prompt``, ``before``, ``after`` and
            ``strength``.
        d_sae: Number of latents.

    Raises:
        ValueError: a latent is out of range, or an answer lacks one of its texts.
    """
    found: dict[int, list[dict[str, str]]] = {}
    for latent, rows in (answers or {}).items():
        check_latent(latent, d_sae, "answers")
        for row in rows:
            lacking = [key for key in ("prompt", "before", "after") if key not in row]
            if lacking:
                raise ValueError(
                    f"answers[{latent}] lacks {lacking[0]!r}: give prompt, before, after"
                )
            strength = row.get("strength")
            texts = {key: clean(row[key]) for key in ("prompt", "before", "after")}
            texts["strength"] = "" if strength is None else compact(float(strength))
            found.setdefault(int(latent), []).append(texts)
    return found
