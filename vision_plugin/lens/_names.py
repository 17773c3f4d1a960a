"""Names of features: candidates of every method, each with its check, and what was chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin._disk import write_json
from vision_plugin._ours import check_replaceable_file
from vision_plugin._paths import local_path
from vision_plugin._rich import Table
from vision_plugin.lens._name_checks import Check

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES_FILE = "names.json"
"""The name of the file that names are kept in, beside their SAE.

Examples:
    >>> vp.lens.NAMES_FILE
    'names.json'
"""
NAMES_KIND = "vision_plugin.names/"
"""What the schema in a file of names begins with; the version follows.

Examples:
    >>> vp.lens.NAMES_KIND
    'vision_plugin.names/'
"""
SCHEMA = f"{NAMES_KIND}1"
CHECK_COLUMNS = (
    "auroc", "low", "high", "others", "beats", "shuffled", "shuffled_low", "shuffled_beats",
)  # fmt: skip
"""Numbers of a check that there is one of for each latent."""


@dataclass(frozen=True, eq=False)
class NameCandidates:
    """One method's name for each latent.

    Attributes:
        names: A name per latent; None where the method gives none.
        scores: The method's own score of each name, such as a cosine; NaN where there is none.
        score_name: What the score is.
        note: How the names were made, where that matters.
        making_auroc: AUROC on the images that names were made from; names are chosen by it.
        check: The check on other images; None where nothing could judge the names.

    Examples:
        >>> settings = {"vocabulary": ["red", "blue"], "methods": ("dissect",), "progress": False}
        >>> names = vp.name_features(model, sae, "demo:60", **settings)
        >>> names.candidates["dissect"].score_name
        'soft-WPMI'
    """

    names: tuple[str | None, ...]
    scores: Float[Tensor, " d_sae"]
    score_name: str
    note: str
    making_auroc: Float[Tensor, " d_sae"]
    check: Check | None


@dataclass(frozen=True, eq=False)
class FeatureNames:
    """Names of the latents of an SAE.

    Of several candidates, a latent has the name that predicts best where it fires on the images
    that names are made from; its check is on other images.

    Attributes:
        candidates: Each method's names, by method.
        made_by: Method of each latent's name; None for a latent without one.
        agreement: How far two methods agree, by ``"one|other"``: share of latents with the same
            name, mean similarity of the two names as texts, and that of names of different latents.
        sae: Fingerprint of the SAE and its hook.
        model: Name and signature of the model.
        settings: Everything else that was asked for.
        left_out: Why a method gave no names.
        n_made_on: Images that names were made from.

    Examples:
        >>> settings = {"vocabulary": ["red", "blue"], "methods": ("dissect",), "progress": False}
        >>> names = vp.name_features(model, sae, "demo:60", **settings)
        >>> list(names.candidates), sorted(names.summary())
        (['dissect'], ['chosen', 'dissect'])
    """

    candidates: Mapping[str, NameCandidates]
    made_by: tuple[str | None, ...]
    agreement: Mapping[str, Mapping[str, float | None]]
    sae: Mapping[str, Any]
    model: Mapping[str, Any]
    settings: Mapping[str, Any]
    left_out: Mapping[str, str] = field(default_factory=dict)
    n_made_on: int = 0

    def __len__(self) -> int:
        return len(self.made_by)

    @cached_property
    def names(self) -> tuple[str | None, ...]:
        """The name of each latent; None for a latent without one."""
        return tuple(
            None if method is None else self.candidates[method].names[latent]
            for latent, method in enumerate(self.made_by)
        )

    @cached_property
    def check(self) -> Check | None:
        """The check of the chosen names; None where nothing could judge them."""
        checks = {m: found.check for m, found in self.candidates.items() if found.check is not None}
        if not checks:
            return None
        first = next(iter(checks.values()))
        chosen = {
            name: torch.full((len(self),), math.nan, dtype=torch.float64) for name in CHECK_COLUMNS
        }
        for latent, method in enumerate(self.made_by):
            if method in checks:
                for name, values in chosen.items():
                    values[latent] = getattr(checks[method], name)[latent]
        return Check(
            **chosen, n_fired=first.n_fired, n_images=first.n_images, by=first.by,
            confidence=first.confidence,
        )  # fmt: skip

    def find(self, word: str) -> list[int]:
        """Return the latents whose name has a word, or words, in it; the best checked first.

        Args:
            word: Whole words, in any case: ``"red"`` finds ``"a red star"`` and not ``"bored"``.

        Raises:
            ValueError: no name has it.
        """
        wanted = word.lower().split()
        found = [k for k, name in enumerate(self.names) if name and _has(name, wanted)]
        if not found or not wanted:
            known = {name.lower() for name in self.names if name}
            near = sorted(name for name in known if wanted and wanted[0] in name)[:5]
            hint = f"; there are {', '.join(map(repr, near))}" if near else ""
            raise ValueError(f"no feature is named {word!r}{hint}: see names.json for all names")
        low = None if self.check is None else self.check.low.nan_to_num(nan=-1.0)
        return found if low is None else sorted(found, key=lambda k: -float(low[k]))

    def texts(self, *, better_than_chance: bool = False) -> dict[int, str]:
        """Return names by latent, as ``vp.report(names=...)`` takes them.

        Args:
            better_than_chance: Whether to leave out names whose check does not lie above chance.
        """
        check = self.check
        better = [False] * len(self) if check is None else check.better.tolist()
        return {
            latent: name
            for latent, name in enumerate(self.names)
            if name and (better[latent] or not better_than_chance)
        }

    def entries(self) -> dict[int, list[dict[str, str | float | bool | None]]]:
        """Return every candidate of each latent with its check, the latent's own name first.

        An entry has ``name``, ``method``, and of the check, None where there is none: ``auroc``,
        ``low`` and ``high`` (its interval), ``chance`` (the mean AUROC of other latents' names),
        ``beats`` (the share of those that do worse) and ``better`` (whether the name is better than
        chance). ``vp.report(names=...)`` takes them.
        """
        columns = {
            method: _columns(one.check, len(self)) for method, one in self.candidates.items()
        }
        found: dict[int, list[dict[str, str | float | bool | None]]] = {}
        for latent, chosen in enumerate(self.made_by):
            for method in sorted(self.candidates, key=lambda method: method != chosen):
                name = self.candidates[method].names[latent]
                if name is not None:
                    checked = {key: values[latent] for key, values in columns[method].items()}
                    found.setdefault(latent, []).append({"name": name, "method": method, **checked})
        return found

    def summary(self) -> dict[str, dict[str, float | int]]:
        """Return numbers of names and of checks, by method; ``chosen`` is last."""
        found: dict[str, dict[str, float | int]] = {}
        for method, one in self.candidates.items():
            numbers: dict[str, float | int] = {
                "n_names": sum(name is not None for name in one.names)
            }
            found[method] = numbers | ({} if one.check is None else one.check.summary())
        chosen: dict[str, float | int] = {"n_names": sum(name is not None for name in self.names)}
        return found | {"chosen": chosen | ({} if self.check is None else self.check.summary())}

    def table(self, n: int | None = 20) -> Table:
        """Return latents with their names and checks, the best checked first, for ``rich``.

        Args:
            n: Latents to show; None shows all that have a name.
        """
        table = Table(title=f"{len(self):,} features, names checked on other images")
        for heading in ("latent", "name", "by"):
            table.add_column(heading, justify="right" if heading == "latent" else "left")
        for heading in ("AUROC", "interval", "other names", "beats", "fires on"):
            table.add_column(heading, justify="right")
        for latent in self.ranked()[:n]:
            table.add_row(
                str(latent), self.names[latent], self.made_by[latent], *self._cells(latent)
            )
        return table

    def ranked(self) -> list[int]:
        """Return the latents that have a name: by the lower end of their check's interval."""
        named = [latent for latent, name in enumerate(self.names) if name is not None]
        if self.check is None:
            return named
        low = self.check.low.nan_to_num(nan=-1.0).tolist()
        return sorted(named, key=lambda latent: -low[latent])

    def _cells(self, latent: int) -> list[str]:
        check = self.check
        if check is None or bool(check.auroc[latent].isnan()):
            fired = "" if check is None else f"{int(check.n_fired[latent])}"
            return ["-", "", "-", "-", fired]
        return [
            f"{float(check.auroc[latent]):.2f}",
            f"{float(check.low[latent]):.2f} to {float(check.high[latent]):.2f}",
            _number(float(check.others[latent])),
            _share(float(check.beats[latent])),
            f"{int(check.n_fired[latent])} of {check.n_images}",
        ]

    def summary_table(self) -> Table:
        """Return a table with a row per method, for ``rich`` to print.

        The margin is what a name's AUROC is above that of other latents' names, with its interval.
        """
        table = Table(title="names by method")
        table.add_column("method")
        for heading in (
            "names", "checked", "mean\nAUROC", "other\nnames", "margin", "better than\nchance",
            "another's\nname is",
        ):  # fmt: skip
            table.add_column(heading, justify="right")
        for method, found in self.summary().items():
            table.add_row(
                method,
                f"{found['n_names']:,}",
                f"{found.get('n_checked', 0):,}",
                *(_number(found.get(key)) for key in ("mean_auroc", "mean_others")),
                _margin(found),
                *(_share(found.get(key)) for key in ("share_better", "share_better_shuffled")),
            )
        return table

    def plot(self) -> Figure:
        """Return a figure: AUROCs of each method's names, beside those of another latent's name.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        from matplotlib.figure import Figure

        checked = {m: found.check for m, found in self.candidates.items() if found.check}
        figure = Figure(figsize=(4 * max(1, len(checked)), 3), layout="constrained")
        for place, (method, check) in enumerate(checked.items()):
            axes = figure.add_subplot(1, len(checked), place + 1)
            for values, label, colour in (
                (check.auroc, "its name", "#0072B2"),
                (check.shuffled, "another's name", "#999999"),
            ):
                known = values[~values.isnan()].tolist()
                axes.hist(known, bins=20, range=(0, 1), alpha=0.7, label=label, color=colour)
            axes.axvline(0.5, color="black", linewidth=0.8)
            axes.set(title=method, xlabel="AUROC on other images", ylabel="features")
            axes.legend()
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types, as ``names.json`` holds it."""
        return {
            "schema": SCHEMA,
            "sae": dict(self.sae),
            "model": dict(self.model),
            "settings": dict(self.settings),
            "n_made_on": self.n_made_on,
            "left_out": dict(self.left_out),
            "summary": {
                method: {key: _plain(value) for key, value in found.items()}
                for method, found in self.summary().items()
            },
            "agreement": {pair: dict(found) for pair, found in self.agreement.items()},
            "names": list(self.names),
            "made_by": list(self.made_by),
            "candidates": {name: _candidates_to_dict(one) for name, one in self.candidates.items()},
        }

    def save(self, path: str | Path) -> Path:
        """Write ``names.json``; :func:`read_names` reads it.

        Args:
            path: The file, or a folder to put it into, such as the SAE's.

        Returns:
            The file.

        Raises:
            FileExistsError: something else is there.
        """
        place = place_of(path)
        check_replaceable_file(place, NAMES_KIND)
        write_json(self.to_dict(), place)
        return place


def place_of(path: str | Path) -> Path:
    """Return the file that a path names: itself, or ``names.json`` in a folder."""
    place = local_path(path)
    return place / NAMES_FILE if place.is_dir() else place


def _columns(check: Check | None, n: int) -> dict[str, list[float | bool | None]]:
    """Return the numbers of a check that stand beside a name, one for each latent."""
    columns = {"auroc": "auroc", "low": "low", "high": "high", "chance": "others", "beats": "beats"}
    if check is None:
        return dict.fromkeys([*columns, "better"], [None] * n)
    found: dict[str, list[float | bool | None]] = {
        key: [*_column(getattr(check, column))] for key, column in columns.items()
    }
    known = zip(check.better.tolist(), found["auroc"], strict=True)
    return found | {"better": [None if auroc is None else better for better, auroc in known]}


def _candidates_to_dict(one: NameCandidates) -> dict[str, Any]:
    found = {
        "names": list(one.names),
        "scores": _column(one.scores),
        "score_name": one.score_name,
        "note": one.note,
        "making_auroc": _column(one.making_auroc),
        "check": None,
    }
    if one.check is not None:
        found["check"] = {
            **{name: _column(getattr(one.check, name)) for name in CHECK_COLUMNS},
            "n_fired": one.check.n_fired.tolist(),
            "n_images": one.check.n_images,
            "by": one.check.by,
            "confidence": one.check.confidence,
        }
    return found


def _column(values: Tensor) -> list[float | int | None]:
    return [_plain(value) for value in values.tolist()]


def _plain(value: float | int) -> float | int | None:
    if not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _has(name: str, wanted: list[str]) -> bool:
    words = "".join(c if c.isalnum() or c in "-'" else " " for c in name.lower()).split()
    n = len(wanted)
    return name.lower().split() == wanted or any(
        words[start : start + n] == wanted for start in range(len(words) - n + 1)
    )


def _number(value: float | int | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def _margin(found: Mapping[str, float | int]) -> str:
    low, high = found.get("margin_low", math.nan), found.get("margin_high", math.nan)
    ends = "" if math.isnan(low) else f" ({low:.2f} to {high:.2f})"
    return f"{_number(found.get('mean_margin'))}{ends}"


def _share(value: float | int | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.0%}"
