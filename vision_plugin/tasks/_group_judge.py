"""What a probe answers about four groups of images under an edit, and figures with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin._intervals import RESAMPLES
from vision_plugin.steering import Edit, EditPass
from vision_plugin.tasks._group_data import GroupSplit
from vision_plugin.tasks._measure import Figure, Share, interval, unit, worst
from vision_plugin.tasks._probe import Probe

Refit = Callable[[Edit], Probe]
"""Fits a probe on the training images under an edit."""


class GroupJudge:
    """One split, run once as it is, and then under any edit; the probe stays the same.

    Args:
        model: A VisionBridge.
        split: Images in groups.
        probe: The probe whose answers count.
        others: Probes of other attributes, whose answers should stay.
        usual: Numbers of the groups that most training images belong to.
        refit: Fits a probe again after an edit; None leaves that out.
        batch_size: Images that run at once.
    """

    raised, kept = "worst_group", "accuracy"

    def __init__(
        self,
        model: Any,
        split: GroupSplit,
        probe: Probe,
        *,
        others: Mapping[str, Probe],
        usual: tuple[int, ...],
        refit: Refit | None,
        batch_size: int,
    ) -> None:
        self.split, self.probe, self.others, self.refit = split, probe, others, refit
        self._pass = EditPass(model, split.pixels, batch_size=batch_size)
        self._usual = torch.isin(split.groups, torch.tensor(usual))
        self._last: tuple[Edit, Tensor] | None = None
        self.before = unit(self._pass.embed())

    def embeddings(self, edit: Edit) -> Float[Tensor, "n d"]:
        """Return unit embeddings under an edit; those of the last edit are kept."""
        if not len(edit):
            return self.before
        if self._last is None or self._last[0] is not edit:
            self._last = edit, unit(self._pass.embed(edit))
        return self._last[1]

    def score(self, edit: Edit, *, above: float = -1.0) -> Share:
        """Return the accuracy of the worst group; see :class:`Judged`."""
        right, n = self._right_until(edit, above)
        seen = torch.zeros(1, len(right), dtype=torch.float64)
        seen[:, :n] = 1
        return Share(float(worst(seen, right, self.split.groups)), n, n == len(right))

    def upkeep(self, edit: Edit, *, least: float = 0.0) -> Share:
        """Return the share of images that are answered right; see :class:`Judged`."""
        right = self._right(edit)
        return Share(float(right.mean()), len(right), True)

    def under(self, edit: Edit) -> dict[str, Tensor]:
        """Return each figure under an edit as a value per image, ``[n]`` float64."""
        embeddings = self.embeddings(edit)
        values = self.values(embeddings, self.probe)
        if self.refit is not None:
            again = self.refit(edit).answers(embeddings) == self.split.labels
            values["refit_accuracy"] = again.double()
        return values

    def values(self, embeddings: Tensor, probe: Probe) -> dict[str, Tensor]:
        """Return each figure of a probe's answers as a value per image; NaN where it has none."""
        was, now = (
            torch.log_softmax(of.logits(x.double()), 1)
            for of, x in ((self.probe, self.before), (probe, embeddings))
        )
        kl = torch.where(was > -torch.inf, was.exp() * (was - now), 0).sum(1)
        return {
            "accuracy": (now.argmax(1) == self.split.labels).double(),
            "collateral": self._changed(embeddings),
            "kl": torch.where(self._usual, kl, torch.nan),
            "moved": (embeddings - self.before).norm(dim=1).double(),
            "group": self.split.groups.double(),
        }

    def _right_until(self, edit: Edit, above: float) -> tuple[Float[Tensor, " n"], int]:
        """Return which answers are right, and the number of images that were looked at.

        The others, which count as right, could not lift the worst group above the bound.
        """
        right = torch.ones(len(self.split), dtype=torch.float64)
        if not len(edit) or (self._last is not None and self._last[0] is edit):
            return self._right(edit), len(right)
        ones, parts, seen = torch.ones(1, len(right), dtype=torch.float64), [], 0
        with closing(self._pass.embeddings(edit)) as batches:
            for batch in batches:
                parts.append(unit(batch))
                some = slice(seen, seen + len(batch))
                right[some] = (self.probe.answers(parts[-1]) == self.split.labels[some]).double()
                seen += len(batch)
                if float(worst(ones, right, self.split.groups)) <= above:
                    break
        if seen == len(right):
            self._last = edit, torch.cat(parts)
        return right, seen

    def _right(self, edit: Edit) -> Float[Tensor, " n"]:
        return (self.probe.answers(self.embeddings(edit)) == self.split.labels).double()

    def _changed(self, embeddings: Tensor) -> Tensor:
        """Return the share of answers about other attributes that change.

        Where none is known, those of the probe about images of the usual groups stand for them.
        """
        every = list(self.others.values()) or [self.probe]
        changed = torch.stack(
            [of.answers(self.before) != of.answers(embeddings) for of in every]
        ).double()
        mean = changed.mean(0)
        return mean if self.others else torch.where(self._usual, mean, torch.nan)


def group_figures(
    values: Mapping[str, Tensor],
    names: tuple[str, ...],
    beside: Mapping[str, Mapping[str, Tensor]],
    *,
    seed: int = 0,
) -> dict[str, Figure]:
    """Return figures with 95% bootstrap intervals, every group resampled within itself.

    Args:
        values: Values per image.
        names: Names of the groups.
        beside: Values of other methods on the same images; a figure says how much higher the worst
            group is than theirs, both resampled alike.
        seed: Seed of the bootstrap.
    """
    groups = values["group"].long()
    counts = resampled(groups, seed=seed)
    once = torch.ones(1, len(groups), dtype=torch.float64)
    found = {name: _mean(value, once, counts) for name, value in values.items() if name != "group"}

    def of_worst(right: Tensor) -> tuple[float, Tensor]:
        return float(worst(once, right, groups)), worst(counts, right, groups)

    value, drawn = of_worst(values["accuracy"])
    found["worst_group"] = interval(value, drawn)
    if "refit_accuracy" in values:
        found["refit_worst_group"] = interval(*of_worst(values["refit_accuracy"]))
    for number, name in enumerate(names):
        of_group = torch.where(groups == number, values["accuracy"], torch.nan)
        found[f"accuracy ({name})"] = _mean(of_group, once, counts)
    for method, other in beside.items():
        base, base_drawn = of_worst(other["accuracy"])
        found[f"worst_group_over_{method}"] = interval(value - base, drawn - base_drawn)
        gain = values["accuracy"] - other["accuracy"]
        found[f"accuracy_over_{method}"] = _mean(gain, once, counts)
    return found


def resampled(groups: Int[Tensor, " n"], *, seed: int) -> Float[Tensor, "r n"]:
    """Return how often each image is drawn in each resample, as many of each group as there are."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(RESAMPLES, len(groups), dtype=torch.float64)
    for group in groups.unique():
        rows = (groups == group).nonzero().flatten()
        drawn = rows[torch.randint(len(rows), (RESAMPLES, len(rows)), generator=generator)]
        counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return counts


def _mean(value: Tensor, once: Tensor, counts: Tensor) -> Figure:
    """Return the mean of a value over the images that have one."""
    has = (~value.isnan()).double()
    known = value.nan_to_num()
    mean, drawn = ((c @ known) / (c @ has).clamp(min=1) for c in (once, counts))
    return interval(float(mean), drawn)
