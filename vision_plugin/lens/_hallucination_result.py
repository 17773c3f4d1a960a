"""The result of a study of hallucination: answers, detection, localisation, edits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vision_plugin._intervals import RESAMPLES, cell
from vision_plugin._rich import Table
from vision_plugin.lens._result_folder import save_result
from vision_plugin.lens._shares import Share, around, mean_of, share_of
from vision_plugin.steering import Edit

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class HallucinationRow:
    """One method on questions that nothing was chosen on.

    Attributes:
        method: Name of the method.
        how: What was chosen.
        hallucinated: Share of the questions about absent objects that are answered yes.
        recognised: Share of the questions about present objects that are answered yes.
        balanced: Mean of the two shares of right answers.
        preserved: Share of the answers to other questions that stay as they were; None where
            nothing was edited.
    """

    method: str
    how: str
    hallucinated: Share
    recognised: Share
    balanced: Share
    preserved: Share | None

    @classmethod
    def of(
        cls,
        method: str,
        how: str,
        yes: Bool[Tensor, " q"],
        there: Bool[Tensor, " q"],
        preserved: Float[Tensor, " q"] | None = None,
    ) -> HallucinationRow:
        """Return the figures of answers."""
        return cls(
            method=method,
            how=how,
            hallucinated=share_of(yes[~there]),
            recognised=share_of(yes[there]),
            balanced=_balanced_share(yes, there),
            preserved=None if preserved is None else mean_of(preserved),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the row ready for JSON."""
        names = ("hallucinated", "recognised", "balanced", "preserved")
        shares = {name: getattr(self, name) for name in names}
        told = {name: share.to_dict() for name, share in shares.items() if share is not None}
        return {"method": self.method, "how": self.how, **told}


def balanced(yes: Bool[Tensor, " q"], there: Bool[Tensor, " q"]) -> float:
    """Return the mean of the shares of right answers about present and about absent objects."""
    return float((yes[there].double().mean() + (~yes[~there]).double().mean()) / 2)


def _balanced_share(yes: Tensor, there: Tensor) -> Share:
    """Return :func:`balanced` with the 95% interval of a bootstrap within both kinds."""
    generator = torch.Generator().manual_seed(0)
    sums = torch.zeros(RESAMPLES, dtype=torch.float64)
    for right in (yes[there].double(), (~yes[~there]).double()):
        drawn = torch.randint(len(right), (RESAMPLES, len(right)), generator=generator)
        sums += right[drawn].mean(1) / 2
    return around(balanced(yes, there), sums, len(yes))


@dataclass(frozen=True)
class Localised:
    """How well maps over image tokens find an object.

    Attributes:
        method: What the maps are.
        auroc: Mean over images of the area under the ROC curve of tokens on the object.
        pointing: Share of images whose largest token lies on the object.
        share: Mean share of the tokens that lie on the object: pointing by chance.
    """

    method: str
    auroc: Share
    pointing: Share
    share: Share

    def to_dict(self) -> dict[str, Any]:
        """Return the figures ready for JSON."""
        shares = {name: getattr(self, name).to_dict() for name in ("auroc", "pointing", "share")}
        return {"method": self.method, **shares}


def localised(
    method: str, maps: Float[Tensor, "n positions"], masks: Bool[Tensor, "n positions"]
) -> Localised:
    """Compare maps with masks; images whose object covers no token, or every one, are left out.

    Raises:
        ValueError: no image is left.
    """
    some = masks.any(1) & ~masks.all(1)
    maps, masks = maps[some], masks[some]
    areas = []
    for scores, mask in zip(maps.double(), masks, strict=True):
        right, wrong = scores[mask], scores[~mask]
        above = (right[:, None] > wrong).double() + (right[:, None] == wrong).double() / 2
        areas.append(above.mean())
    at = masks.gather(1, maps.argmax(1, keepdim=True))[:, 0]
    if not areas:
        raise ValueError("no mask covers half of an image token: give masks of larger objects")
    return Localised(
        method, mean_of(torch.stack(areas)), share_of(at), mean_of(masks.double().mean(1))
    )


@dataclass(frozen=True, eq=False)
class Hallucination:
    """A study of hallucination.

    Attributes:
        model: Name of the model.
        settings: What was searched through.
        n_questions: Questions of the choosing and of the reported half.
        rows: A row per method, of the reported half.
        detection: Area under the ROC curve of present against absent objects, by score.
        localisation: How well maps find objects; none without masks.
        maps: Confidence of every object at every image token of the reported half.
        objects: Names of the objects.
        edits: The chosen edits by name.

    Examples:
        >>> from vision_plugin.demo.objects import object_questions
        >>> settings = vp.lens.HallucinationSettings(
        ...     layers=(1,),
        ...     weights=(1.0,),
        ...     strengths=(0.9,),
        ...     demonstrations=4,
        ...     n_masks=1,
        ...     n_random=1,
        ... )
        >>> found = vp.lens.hallucination(vlm, object_questions(60, absent=1), settings=settings)
        >>> [row.method for row in found.rows][:3]
        ['none', 'answer_threshold', 'confidence']
    """

    model: str
    settings: Any
    n_questions: tuple[int, int]
    rows: Sequence[HallucinationRow]
    detection: Mapping[str, Share]
    localisation: Sequence[Localised]
    maps: Float[Tensor, "images objects positions"]
    objects: Sequence[str]
    edits: Mapping[str, Edit]

    def row(self, method: str) -> HallucinationRow:
        """Return one row.

        Raises:
            KeyError: there is none.
        """
        return {row.method: row for row in self.rows}[method]

    def table(self) -> Table:
        """Return the methods for ``rich`` to print."""
        table = Table(title=f"hallucination: {self.model}, {self.n_questions[1]} questions")
        table.add_column("method", no_wrap=True)
        table.add_column("chosen")
        for heading in ("hallucinated", "recognised", "balanced", "preserved"):
            table.add_column(heading, justify="right")
        for row in self.rows:
            shares = row.hallucinated, row.recognised, row.balanced, row.preserved
            table.add_row(row.method, row.how, *map(cell, shares))
        return table

    def seen_table(self) -> Table:
        """Return detection and localisation for ``rich`` to print."""
        table = Table(title="what the internal vocabulary tells")
        for heading in ("score", "AUROC", "pointing", "by chance"):
            table.add_column(heading, justify="left" if heading == "score" else "right")
        for name, share in self.detection.items():
            table.add_row(f"there or not, by {name}", cell(share), "", "")
        for one in self.localisation:
            shares = one.auroc, one.pointing, one.share
            table.add_row(f"where, by {one.method}", *map(cell, shares))
        return table

    def plot(self) -> dict[str, Figure]:
        """Return hallucinated and recognised shares as a matplotlib figure, by name."""
        from matplotlib.figure import Figure

        canvas = Figure(figsize=(6.4, 0.32 * len(self.rows) + 1.2), layout="constrained")
        axes = canvas.add_subplot()
        for name, colour in (("hallucinated", "#c0392b"), ("recognised", "#2c7fb8")):
            shares = [getattr(row, name) for row in self.rows]
            spread = [[s.value - s.low for s in shares], [s.high - s.value for s in shares]]
            places = range(len(shares))
            axes.errorbar([s.value for s in shares], places, xerr=spread, fmt="o", markersize=4,
                          color=colour, label=name)  # fmt: skip
        axes.set_yticks(range(len(self.rows)), [row.method for row in self.rows], fontsize=8)
        axes.invert_yaxis()
        axes.set_xlim(-0.02, 1.02)
        axes.legend(fontsize=8)
        return {"methods": canvas}

    def to_dict(self) -> dict[str, Any]:
        """Return the result ready for JSON."""
        names = self.settings.__dataclass_fields__
        settings = {name: getattr(self.settings, name) for name in names}
        return {
            "schema": "vision_plugin.lens/hallucination/1",
            "model": self.model,
            "settings": {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()},
            "n_questions": list(self.n_questions),
            "rows": [row.to_dict() for row in self.rows],
            "detection": {name: share.to_dict() for name, share in self.detection.items()},
            "localisation": [one.to_dict() for one in self.localisation],
        }

    def save(self, folder: str | Path) -> Path:
        """Write results.json, table.txt, a figure and the chosen edits.

        Raises:
            FileExistsError: something else has the name.
        """
        return save_result(
            folder,
            self.to_dict(),
            tables=[self.table(), self.seen_table()],
            figures=self.plot(),
            edits=self.edits,
        )
