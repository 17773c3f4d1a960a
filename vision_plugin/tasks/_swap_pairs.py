"""Pairs of a base and a source image, what is read under a swap, and figures with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vision_plugin._intervals import RESAMPLES
from vision_plugin.steering import Edit, EditPass
from vision_plugin.tasks._factors import FactorSplit, Readers
from vision_plugin.tasks._measure import LEAST, Figure, interval, unit


def draw_pairs(
    split: FactorSplit, factors: list[str], known: Bool[Tensor, " n"], sources: int, seed: int
) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
    """Return numbers of bases and of their sources.

    A source differs from its base in as many factors as any image does; which one is drawn.

    Args:
        split: The images.
        factors: Names of the factors.
        known: Images to draw from.
        sources: Sources of each base.
        seed: Seed of the draw.
    """
    rows = known.nonzero().flatten()
    values = torch.stack([split.values[factor][rows] for factor in factors], 1)
    generator = torch.Generator().manual_seed(seed)
    bases, others = [], []
    for place, base in enumerate(rows.tolist()):
        differs = (values != values[place]).sum(1)
        best = (differs == differs.max()).nonzero().flatten()
        order = torch.randperm(len(best), generator=generator)[:sources]
        drawn = rows[best[order]].tolist()
        bases += [base] * len(drawn)
        others += drawn
    return torch.tensor(bases).long(), torch.tensor(others).long()


class SwapJudge:
    """Pairs of images of one split, run once, and then under any swap.

    Args:
        model: A VisionBridge.
        split: The images.
        factors: Names of the factors.
        readers: What reads them; pairs are of images whose every factor is read right.
        sources: Sources of each base.
        seed: Seed of the pairs.
        batch_size: Images that run at once.
        name: Name of the split in errors.

    Raises:
        ValueError: there are too few pairs of a factor for an interval.
    """

    def __init__(
        self,
        model: Any,
        split: FactorSplit,
        factors: list[str],
        readers: Readers,
        *,
        sources: int,
        seed: int,
        batch_size: int,
        name: str,
    ) -> None:
        self.factors, self.readers = factors, readers
        embedded = unit(EditPass(model, split.pixels, batch_size=batch_size).embed())
        known = readers.right(embedded, split)
        self.share_known = float(known.double().mean())
        self.bases, rows = draw_pairs(split, factors, known, sources, seed)
        self.base = {factor: split.values[factor][self.bases] for factor in factors}
        self.source = {factor: split.values[factor][rows] for factor in factors}
        for factor in factors:
            n = len(self.bases[self.differs(factor)].unique())
            if n < LEAST:
                raise ValueError(
                    f"the {name} split has {n} images whose every factor is read right and that "
                    f"have a source with another {factor}, too few for an interval, which needs "
                    f"{LEAST}: give more images, factors that are read better, or fewer factors"
                )
        self.run = EditPass(model, split.pixels[self.bases], batch_size=batch_size)
        self.sources = EditPass(model, split.pixels[rows], batch_size=batch_size)
        self.before = embedded[self.bases]
        self._last: tuple[Edit, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.bases)

    def differs(self, factor: str) -> Bool[Tensor, " pairs"]:
        """Return whether base and source have different values of a factor."""
        return self.base[factor] != self.source[factor]

    def embeddings(self, edit: Edit) -> Float[Tensor, "pairs d"]:
        """Return unit embeddings of the bases under an edit; those of the last edit are kept."""
        if not len(edit):
            return self.before
        if self._last is None or self._last[0] is not edit:
            self._last = edit, unit(self.run.embed(edit, source=self.sources))
        return self._last[1]

    def under(self, edit: Edit, factor: str) -> dict[str, Float[Tensor, " pairs"]]:
        """Return the figures of a swap of one factor as a value per pair; NaN where it has none.

        Huang et al. 2024 (arXiv 2402.17700): ``cause`` is 1 where the factor reads as the source's,
        ``isolate`` the share of the other factors that read as the base's. Only factors in which
        base and source differ count.
        """
        embedded = self.embeddings(edit)
        swapped = self.differs(factor)
        cause = (self.readers.answers(embedded, factor) == self.source[factor]).double()
        stay, count = torch.zeros(len(self)).double(), torch.zeros(len(self)).double()
        for other in self.factors:
            if other != factor:
                differs = self.differs(other)
                stays = self.readers.answers(embedded, other) == self.base[other]
                stay += (stays & differs).double()
                count += differs.double()
        has = swapped & (count > 0)
        return {
            "cause": torch.where(swapped, cause, torch.nan),
            "isolate": torch.where(has, stay / count.clamp(min=1), torch.nan),
            "moved": (embedded - self.before).norm(dim=1).double(),
        }

    def means(self, edit: Edit, factor: str) -> dict[str, float]:
        """Return cause, isolate and their mean, the disentangle score."""
        found = self.under(edit, factor)
        cause, isolate = (float(found[name].nanmean()) for name in ("cause", "isolate"))
        return {"disentangle": (cause + isolate) / 2, "cause": cause, "isolate": isolate}

    def resampled(self, seed: int) -> Float[Tensor, "r pairs"]:
        """Return how often each pair is drawn, at first once each, then with whole bases drawn."""
        _, cluster = self.bases.unique(return_inverse=True)
        n = int(cluster.max()) + 1
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(n, (RESAMPLES, n), generator=generator)
        counts = torch.zeros(RESAMPLES, n, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        return torch.cat([torch.ones(1, len(self)).double(), counts[:, cluster]])


def scores(
    values: Mapping[str, Float[Tensor, " pairs"]], counts: Float[Tensor, "r pairs"]
) -> dict[str, Float[Tensor, " r"]]:
    """Return each figure in each resample, with the disentangle score."""
    found = {}
    for name, value in values.items():
        has = (~value.isnan()).double()
        found[name] = (counts @ value.nan_to_num()) / (counts @ has).clamp(min=1)
    found["disentangle"] = (found["cause"] + found["isolate"]) / 2
    return found


def figures_of(drawn: Mapping[str, Float[Tensor, " r"]]) -> dict[str, Figure]:
    """Return figures with intervals; the first resample is the figure itself."""
    return {name: interval(float(value[0]), value[1:]) for name, value in drawn.items()}
