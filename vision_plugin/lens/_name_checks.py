"""Does a name explain where a latent fires? AUROC on images that it was not made from.

An AUROC above one half is not yet an explanation: similarities of images to different texts go
together, so that a third of the names of other latents have an interval above one half, too. So a
name is compared with names of other latents on the same latent, and counts as better than chance
where it beats nearly all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import norm
from torch import Tensor, nn

from vision_plugin.lens._firing import Firing

MIN_FIRED = 5
"""Images on which a latent must fire, and on which it must not, so that a name is checked."""
PANEL = 256
"""Names of other latents that a latent's name is compared with, at most."""
_BLOCK_ELEMENTS = 2**24


@dataclass(frozen=True, eq=False)
class Check:
    """How well each latent's name predicts where the latent fires.

    Attributes:
        auroc: Chance that an image on which the latent fires is more about the name than one on
            which it does not; NaN where there is no name, or too few images of either kind.
        low: Lower end of its interval.
        high: Upper end of its interval.
        others: Mean of the same over names of other latents, a random ``PANEL`` of them at most.
        beats: Share of these names that predict the latent worse; of equals, half.
        shuffled: AUROC of the name of another latent, drawn at random.
        shuffled_low: Lower end of the interval of that.
        shuffled_beats: Share of the names of others that it beats.
        n_fired: Images on which each latent fires.
        n_images: Images that were looked at.
        by: ``"text"`` where images are about a name as far as a judge's text similarity says,
            ``"labels"`` where they are because the name is their label.
        confidence: Coverage of the intervals.

    Examples:
        >>> settings = {"vocabulary": ["red", "blue"], "methods": ("dissect",), "progress": False}
        >>> names = vp.name_features(model, sae, "demo:60", **settings)
        >>> names.check.by, names.check.n_images
        ('text', 30)
    """

    auroc: Float[Tensor, " d_sae"]
    low: Float[Tensor, " d_sae"]
    high: Float[Tensor, " d_sae"]
    others: Float[Tensor, " d_sae"]
    beats: Float[Tensor, " d_sae"]
    shuffled: Float[Tensor, " d_sae"]
    shuffled_low: Float[Tensor, " d_sae"]
    shuffled_beats: Float[Tensor, " d_sae"]
    n_fired: Int[Tensor, " d_sae"]
    n_images: int
    by: str
    confidence: float

    @property
    def better(self) -> Bool[Tensor, " d_sae"]:
        """Whether each latent's name is better than chance.

        The interval of its AUROC lies above one half, and of the names of other latents it beats
        the share that ``confidence`` says. A name drawn at random does so for 5% of latents at
        most, or for one in as many as there are different names.
        """
        return (self.low > 0.5) & (self.beats >= self.confidence)

    @property
    def shuffled_better(self) -> Bool[Tensor, " d_sae"]:
        """Whether the name of another latent, drawn at random, is better than chance."""
        return (self.shuffled_low > 0.5) & (self.shuffled_beats >= self.confidence)

    @property
    def margin(self) -> Float[Tensor, " d_sae"]:
        """AUROC of each latent's name less the mean of names of other latents."""
        return self.auroc - self.others

    def summary(self) -> dict[str, float | int]:
        """Return how many names were checked, and how many are better than chance.

        ``mean_margin`` is the mean of :attr:`margin` with an interval over latents, from
        ``margin_low`` to ``margin_high``; ``share_above_half`` counts what lies above one half
        alone, and the names that end in ``_shuffled`` are those of other latents.
        """
        checked = ~self.auroc.isnan()
        found: dict[str, float | int] = {"n_checked": int(checked.sum())}
        if found["n_checked"] == 0:
            return found
        also = checked & ~self.shuffled.isnan()
        margin = self.margin[~self.margin.isnan()]
        error = float(margin.std() / len(margin) ** 0.5) if len(margin) > 1 else math.nan
        half = float(norm.ppf(0.5 + self.confidence / 2)) * error
        mean = _mean(margin)
        return found | {
            "mean_auroc": _mean(self.auroc[checked]),
            "mean_others": _mean(self.others[~self.others.isnan()]),
            "mean_margin": mean,
            "margin_low": mean - half,
            "margin_high": mean + half,
            "mean_shuffled": _mean(self.shuffled[also]),
            "share_better": _mean(self.better[checked]),
            "share_better_shuffled": _mean(self.shuffled_better[also]),
            "share_above_half": _mean(self.low[checked] > 0.5),
            "share_above_half_shuffled": _mean(self.shuffled_low[also] > 0.5),
        }


@dataclass(frozen=True)
class Checker:
    """Images that names were not made from, and how much each of them is about a name.

    Attributes:
        firing: Where latents fire on these images.
        images: Unit embeddings of the images, ``[n, d_embed]``; None where labels judge.
        labels: Labels of the images by column, where labels judge.
        confidence: Coverage of the intervals.
        seed: Seed of the shuffled assignment.
        min_fired: Images on which a latent must fire, and must not.
    """

    firing: Firing
    images: Tensor | None
    labels: Sequence[Sequence[str]] = ()
    confidence: float = 0.95
    seed: int = 0
    min_fired: int = MIN_FIRED

    def check(
        self,
        words: Int[Tensor, " d_sae"],
        texts: Tensor | None,
        names: Sequence[str] | None = None,
    ) -> Check:
        """Return how well names predict where latents fire.

        Args:
            words: Each latent's name as a row of ``texts``; -1 for none.
            texts: Unit embeddings of the names, ``[words, d_embed]``; None where labels judge.
            names: The names, where labels judge.
        """
        auroc = self._auroc(words, texts, names)
        low, high = auroc_interval(auroc, *self._sizes, confidence=self.confidence)
        drawn = shuffled(words, self.seed)
        other = self._auroc(drawn, texts, names)
        shuffled_low, _ = auroc_interval(other, *self._sizes, confidence=self.confidence)
        panel = self._panel(words, texts, names)
        others, beats = panel.compared(auroc, words)
        return Check(
            auroc=auroc, low=low, high=high, others=others, beats=beats, shuffled=other,
            shuffled_low=shuffled_low, shuffled_beats=panel.compared(other, words, drawn)[1],
            n_fired=self.firing.counts, n_images=self.firing.n_images,
            by="text" if texts is not None else "labels", confidence=self.confidence,
        )  # fmt: skip

    def _panel(self, words: Tensor, texts: Tensor | None, names: Sequence[str] | None) -> _Panel:
        """Return the AUROC of names in use for every latent, a random choice of them."""
        firing = self.firing
        fired, others = self._sizes
        used = words[words >= 0].unique()
        order = torch.randperm(len(used), generator=torch.Generator().manual_seed(self.seed))
        used = used[order[:PANEL]]
        known = torch.minimum(fired, others) >= self.min_fired
        columns = []
        for some in used.split(max(1, _BLOCK_ELEMENTS // max(1, firing.n_images))):
            ranks = _ranks(self._about(some, texts, names)).T.contiguous()
            sums = nn.functional.embedding_bag(firing.images, ranks, firing.starts[:-1], mode="sum")
            wins = sums - (fired * (fired + 1) / 2)[:, None]
            columns.append(wins / (fired * others)[:, None])
        found = torch.cat(columns, 1) if columns else torch.empty(firing.d_sae, 0).double()
        return _Panel(used, torch.where(known[:, None], found, torch.nan))

    @property
    def _sizes(self) -> tuple[Tensor, Tensor]:
        fired = self.firing.counts
        return fired, self.firing.n_images - fired

    def _auroc(
        self, words: Tensor, texts: Tensor | None, names: Sequence[str] | None
    ) -> Float[Tensor, " d_sae"]:
        """Return the AUROC of each latent's word, from the ranks of the images that fire."""
        firing = self.firing
        fired, others = self._sizes
        known = (words >= 0) & (torch.minimum(fired, others) >= self.min_fired)
        used = words[known].unique()
        ranks = torch.zeros(firing.d_sae, dtype=torch.float64)
        latents = firing.latents
        block = max(1, _BLOCK_ELEMENTS // max(1, firing.n_images))
        place = torch.full((int(words.max()) + 2 if len(words) else 1,), -1)
        for some in used.split(block):
            about = self._about(some, texts, names)
            place.fill_(-1)
            place[some] = torch.arange(len(some))
            of_entry = torch.where(known, place[words], -1)[latents]
            inside = of_entry >= 0
            found = _ranks(about)[of_entry[inside], firing.images[inside]]
            ranks.index_add_(0, latents[inside], found)
        wins = ranks - fired * (fired + 1) / 2
        return torch.where(known, wins / (fired * others), torch.nan)

    def _about(
        self, words: Tensor, texts: Tensor | None, names: Sequence[str] | None
    ) -> Float[Tensor, "words n"]:
        """Return how much each image is about each word."""
        if texts is not None:
            assert self.images is not None
            return texts[words].float() @ self.images.float().T
        assert names is not None
        about = np.zeros((len(words), self.firing.n_images), dtype=np.float32)
        for column in self.labels:
            labels = np.array(column, dtype=object)
            for place, word in enumerate(words.tolist()):
                about[place] += labels == names[word]
        return torch.from_numpy(about.clip(max=1))


@dataclass(frozen=True)
class _Panel:
    """AUROCs of some names for every latent.

    Attributes:
        words: Numbers of the names.
        aurocs: AUROC of each of them for each latent; NaN for a latent that is not checked.
    """

    words: Int[Tensor, " m"]
    aurocs: Float[Tensor, "d_sae m"]

    def compared(
        self, auroc: Float[Tensor, " d_sae"], *but: Int[Tensor, " d_sae"]
    ) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
        """Return the panel's mean for each latent, and the share of it below an AUROC.

        Args:
            auroc: An AUROC for each latent.
            *but: Names that are left out of the panel, one for each latent each.
        """
        counted = ~self.aurocs.isnan() & ~auroc.isnan()[:, None]
        for words in but:
            counted &= self.words != words[:, None]
        n = counted.sum(1)
        mean = torch.where(counted, self.aurocs, 0).sum(1) / n
        below = (self.aurocs < auroc[:, None]) + 0.5 * (self.aurocs == auroc[:, None])
        beats = torch.where(counted, below, 0).sum(1) / n
        return mean, beats.double()


def auroc_interval(
    auroc: Float[Tensor, " k"],
    n_positive: Int[Tensor, " k"],
    n_negative: Int[Tensor, " k"],
    *,
    confidence: float = 0.95,
) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """Return Newcombe's score interval of AUROCs (method 5; Stat. Med. 2006, 25:559-573).

    Its ends are the values from which the AUROC lies ``z`` standard errors off, the error being
    Hanley and McNeil's at that value with both sample sizes as their mean; unlike an interval from
    the error at the AUROC itself, it is no point at an AUROC of 1.

    Args:
        auroc: AUROCs; NaN stays NaN.
        n_positive: Numbers of positive cases.
        n_negative: Numbers of negative cases.
        confidence: Coverage.

    Raises:
        ValueError: ``confidence`` does not lie between 0 and 1.

    Examples:
        >>> low, high = vp.lens.auroc_interval(
        ...     torch.tensor([0.8]), torch.tensor([20]), torch.tensor([80])
        ... )
        >>> round(low.item(), 3), round(high.item(), 3)
        (0.668, 0.884)
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1, as 0.95 does")
    z = float(norm.ppf(0.5 + confidence / 2))
    value = auroc.double()
    m, n = n_positive.double(), n_negative.double()
    more = (m + n) / 2 - 1

    def end(outer: Tensor) -> Tensor:
        inner = value.clone()
        for _ in range(60):
            middle = (inner + outer) / 2
            spread = middle * (1 - middle) / (m * n)
            factor = 1 + more * (1 - middle) / (2 - middle) + more * middle / (1 + middle)
            inside = (value - middle).abs() <= z * (spread * factor).sqrt()
            inner, outer = torch.where(inside, middle, inner), torch.where(inside, outer, middle)
        return torch.where(value.isnan(), torch.nan, inner)

    return end(torch.zeros_like(value)), end(torch.ones_like(value))


def shuffled(words: Int[Tensor, " d_sae"], seed: int) -> Int[Tensor, " d_sae"]:
    """Return the words with each latent's given to another latent; -1 where there is none.

    A latent gets another word than its own where the words allow it: a few draws are made for
    those that drew their own.
    """
    generator = torch.Generator().manual_seed(seed)
    named = torch.nonzero(words >= 0).flatten()
    own = words[named]
    drawn = own[torch.randperm(len(own), generator=generator)]
    for _ in range(20):
        same = torch.nonzero(drawn == own).flatten()
        if len(same) == 0 or len(own) < 2:
            break
        partner = torch.randint(len(own), (len(same),), generator=generator)
        for a, b in zip(same.tolist(), partner.tolist(), strict=True):
            drawn[[a, b]] = drawn[[b, a]]
    found = torch.full_like(words, -1)
    found[named] = torch.where(drawn == own, -1, drawn)
    return found


def _ranks(values: Float[Tensor, "words n"]) -> Float[Tensor, "words n"]:
    """Return ranks from 1, with the mean rank of equal values."""
    ordered = values.sort(1).values
    below = torch.searchsorted(ordered, values.contiguous())
    up_to = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + up_to + 1).double() / 2


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if len(values) else math.nan
