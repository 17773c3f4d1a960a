"""Latents that carry a nuisance: scores by rule from biased images in four groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.site import Site
from vision_plugin.steering import EditPass
from vision_plugin.tasks._evidence import Evidence, Reader
from vision_plugin.tasks._find import auroc, class_difference
from vision_plugin.tasks._found import FoundLatents, ranking
from vision_plugin.tasks._group_data import GROUPS, GroupSplit
from vision_plugin.tasks._probe import Probe


@dataclass(frozen=True, eq=False)
class GroupEvidence:
    """What rules look at.

    Attributes:
        each: Evidence within each class: images with the nuisance's second value and its first.
        pushes: Mean share of each latent in the lead of the probe's second class, by group; None
            where no rule looks at it.
        along: 1 where the nuisance's second value goes along with the second class in training, -1
            where it goes along with the first.
        neutral: Mean of each latent, all groups counted the same.
        active: Whether each latent is active at any token.
        tokens: Kind of token that was read.
    """

    each: tuple[Evidence, Evidence]
    pushes: Float[Tensor, "groups d_sae"] | None
    along: int
    neutral: Float[Tensor, " d_sae"]
    active: Bool[Tensor, " d_sae"]
    tokens: str

    def both(self) -> Evidence:
        """Return the evidence of both classes together."""
        first, second = self.each
        present, absent = (
            torch.arange(2).repeat_interleave(torch.tensor([len(x), len(y)]))
            for x, y in ((first.present, second.present), (first.absent, second.absent))
        )
        return Evidence(
            torch.cat([first.present, second.present]), torch.cat([first.absent, second.absent]),
            self.active, self.tokens, (present, absent),
        )  # fmt: skip

    def found(self, rule: str) -> FoundLatents:
        """Return every latent with a score above 0 by a rule, best first."""
        scores = GROUP_RULES[rule](self)
        return FoundLatents(
            rule, tuple(ranking(scores)), scores, self.tokens, self.active, self.neutral
        )


def difference(evidence: GroupEvidence) -> Tensor:
    """Return the size of the difference of means by the nuisance, averaged over the classes."""
    return class_difference(evidence.both()).abs()


def separation(evidence: GroupEvidence) -> Tensor:
    """Return how well a latent tells the nuisance's values apart within the classes, either way
    round: the size of 2 AUROC - 1, averaged over the classes."""
    return torch.stack([auroc(one) for one in evidence.each]).mean(0).abs()


def attribution(evidence: GroupEvidence) -> Tensor:
    """Return the share of a latent in how the nuisance moves the probe along the training bias.

    That is the gradient of the probe's lead through the latent, times the latent, in images with
    the nuisance's second value less those with its first, averaged over the classes.
    """
    assert evidence.pushes is not None
    y0a0, y0a1, y1a0, y1a1 = evidence.pushes
    push: Tensor = evidence.along * ((y0a1 - y0a0) + (y1a1 - y1a0)) / 2
    return push


def net_attribution(evidence: GroupEvidence) -> Tensor:
    """Return the attribution less the latent's share in how the probe tells the classes apart."""
    assert evidence.pushes is not None
    y0a0, y0a1, y1a0, y1a1 = evidence.pushes
    merit: Tensor = ((y1a0 - y0a0) + (y1a1 - y0a1)) / 2
    return attribution(evidence) - merit


GROUP_RULES: Mapping[str, Callable[[GroupEvidence], Tensor]] = MappingProxyType(
    {
        "difference": difference,
        "auroc": separation,
        "attribution": attribution,
        "net_attribution": net_attribution,
    }
)
"""Rules that find latents of a nuisance in biased images."""


def gather_groups(
    site: Site,
    sae: Dictionary,
    split: GroupSplit,
    run: EditPass,
    probe: Probe,
    *,
    with_gradients: bool,
    batch_size: int,
) -> GroupEvidence:
    """Read latents of biased images, and gradients of a probe's lead through them.

    Args:
        site: The site.
        sae: The SAE.
        split: The biased images.
        run: The same images, run once.
        probe: The probe.
        with_gradients: Whether a rule follows gradients.
        batch_size: Images that run at once.
    """
    reader = Reader(site, sae, batch_size)

    def lead(embedding: Tensor, some: slice) -> Tensor:
        del some
        logits = probe.logits(embedding)
        return logits[:, 1] - logits[:, 0]

    means, moved = reader.means(run).cpu(), None
    if with_gradients:
        moved = reader.pushes(run, run.slopes(site, lead, "probe's lead")).cpu()
    of = split.groups
    rows = [of == group for group in range(len(GROUPS))]
    active = reader.active.cpu()
    agree = int((split.labels == split.nuisance).sum())
    return GroupEvidence(
        each=(
            Evidence(means[rows[1]], means[rows[0]], active, site.tokens),
            Evidence(means[rows[3]], means[rows[2]], active, site.tokens),
        ),
        pushes=None if moved is None else torch.stack([moved[row].mean(0) for row in rows]),
        along=1 if 2 * agree >= len(split) else -1,
        neutral=torch.stack([means[row].mean(0) for row in rows]).mean(0),
        active=active,
        tokens=site.tokens,
    )
