"""Absorption: is a class represented by its own latents, or by those of its siblings' group?"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from vision_plugin._extras import require_sklearn
from vision_plugin.metrics._imagecodes import (
    Array,
    ImageCodes,
    active_columns,
    class_f_scores,
    column_blocks,
    probe_columns,
)
from vision_plugin.metrics._probing import fit_quietly
from vision_plugin.metrics._result import MetricResult

__all__ = ["Absorption", "AbsorptionPair", "AbsorptionResult", "sibling_groups"]

FEWEST_GROUP_IMAGES = 10
FEWEST_OF_EACH_SIDE = 3
LARGE_OVERLAP = 0.5


@dataclass(frozen=True)
class AbsorptionPair(MetricResult):
    """One class among its siblings.

    Attributes:
        group: name of the sibling group.
        class_index: the class.
        overlap: Jaccard index of the class's and the group's top latents by mean activation.
        f1_primary: F1 of a probe for the class on the fewest latents.
        f1_expanded: F1 of a probe for the class on more latents.
        absorbed: whether the overlap or the gain in F1 is large.
        n_positive: number of images of the class.

    Examples:
        >>> labels = torch.arange(60) % 3
        >>> codes = torch.tensor([3.0, 2.0, 1.0]).diag()[labels]
        >>> metric = vp.metrics.Absorption(
        ...     n_features=3, sibling_groups={"birds": [0, 1, 2]}, top_k=1
        ... )
        >>> metric.update(codes, labels)
        >>> pair = metric.compute().pairs[0]
        >>> pair.group, pair.class_index, pair.overlap, pair.absorbed
        ('birds', 0, 1.0, True)
    """

    group: str
    class_index: int
    overlap: float
    f1_primary: float
    f1_expanded: float
    absorbed: bool
    n_positive: int


@dataclass(frozen=True)
class AbsorptionResult(MetricResult):
    """Share of the classes that are absorbed into their group.

    Attributes:
        rate: share of the tested pairs that are absorbed; NaN without a pair (VISAEBench says 0).
        mean_overlap: mean overlap of the pairs.
        mean_f1_gap: mean gain in F1 from more latents.
        pairs: every tested pair.
        n_groups: number of groups given.
        n_pairs: number of pairs tested.

    Examples:
        >>> labels = torch.arange(60) % 3
        >>> codes = torch.tensor([3.0, 2.0, 1.0]).diag()[labels]
        >>> metric = vp.metrics.Absorption(
        ...     n_features=3, sibling_groups={"birds": [0, 1, 2]}, top_k=1
        ... )
        >>> metric.update(codes, labels)
        >>> found = metric.compute()
        >>> found.n_pairs, [pair.overlap for pair in found.pairs]
        (3, [1.0, 0.0, 0.0])
    """

    headline = ("rate", "mean_overlap", "mean_f1_gap", "n_pairs")

    rate: float
    mean_overlap: float
    mean_f1_gap: float
    pairs: tuple[AbsorptionPair, ...]
    n_groups: int
    n_pairs: int


class Absorption(ImageCodes):
    """Absorption rate over groups of sibling classes, VISAEBench's definition.

    A class counts as absorbed when its top latents are mostly those of the whole group (Jaccard
    index above 0.5), or when a probe for it gains more than ``threshold`` in F1 from ``k_expanded``
    latents over ``k_primary``. Groups with fewer than ten images and classes with fewer than three
    on either side are skipped. Probes are scored on the images that they were fitted on.

    Silent latents are debatable: where fewer than ``top_k`` latents fire for a class, latents of
    mean 0 fill its list in an arbitrary order. ``only_active=True`` leaves them out.

    Args:
        n_features: number of latents.
        sibling_groups: classes by group, such as ``{"dogs": [3, 4, 5]}``, or the benchmark's own
            ``{"dogs": {"class_indices": [3, 4, 5]}}``; see :func:`sibling_groups`.
        min_group_size: fewest classes of a group; smaller groups are skipped.
        top_k: number of top latents compared for the overlap.
        threshold: gain in F1 above which a class is absorbed.
        k_primary: number of latents of the narrow probe.
        k_expanded: number of latents of the wide probe.
        seed: seed of the probes' solver.
        only_active: whether to leave silent latents out of the overlap.

    Examples:
        >>> labels = torch.arange(60) % 3
        >>> codes = torch.tensor([3.0, 2.0, 1.0]).diag()[labels]  # a latent for each class
        >>> metric = vp.metrics.Absorption(
        ...     n_features=3, sibling_groups={"birds": [0, 1, 2]}, top_k=1
        ... )
        >>> metric.update(codes, labels)
        >>> round(metric.compute().rate, 3)
        0.333
    """

    higher_is_better = False

    def __init__(
        self,
        *,
        n_features: int,
        sibling_groups: Mapping[str, Any],
        min_group_size: int = 3,
        top_k: int = 10,
        threshold: float = 0.1,
        k_primary: int = 1,
        k_expanded: int = 4,
        seed: int = 42,
        only_active: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(n_features=n_features, **kwargs)
        self.sibling_groups = {
            name: list(group["class_indices"] if isinstance(group, Mapping) else group)
            for name, group in sibling_groups.items()
        }
        if not any(len(group) >= min_group_size for group in self.sibling_groups.values()):
            raise ValueError(
                f"none of the {len(self.sibling_groups)} sibling groups has min_group_size="
                f"{min_group_size} classes; lower min_group_size= or pass larger sibling_groups="
            )
        self.min_group_size, self.top_k, self.threshold = min_group_size, top_k, threshold
        self.k_primary, self.k_expanded = k_primary, k_expanded
        self.seed, self.only_active = seed, only_active

    def update(self, latents: Tensor, labels: Tensor | Sequence[int]) -> None:
        """Add images: latents ``[n, n_features]`` max-pooled over patches, and class labels."""
        self.add_images(latents, labels)

    def compute(self) -> AbsorptionResult:
        """Test every class of every group on all images seen, by all processes."""
        require_sklearn("the probing metrics")
        codes, labels = self.codes(), self.label_array()
        pairs: list[AbsorptionPair] = []
        for name, classes in self.sibling_groups.items():
            rows = np.flatnonzero(np.isin(labels, classes))
            if len(classes) >= self.min_group_size and len(rows) >= FEWEST_GROUP_IMAGES:
                pairs += self._test_group(name, classes, codes[rows], labels[rows])
        overlaps = [pair.overlap for pair in pairs]
        gaps = [pair.f1_expanded - pair.f1_primary for pair in pairs]
        return AbsorptionResult(
            rate=sum(pair.absorbed for pair in pairs) / len(pairs) if pairs else math.nan,
            mean_overlap=float(np.mean(overlaps)) if pairs else math.nan,
            mean_f1_gap=float(np.mean(gaps)) if pairs else math.nan,
            pairs=tuple(pairs),
            n_groups=len(self.sibling_groups),
            n_pairs=len(pairs),
        )

    def _test_group(
        self, name: str, classes: Sequence[int], codes: Any, labels: Array
    ) -> list[AbsorptionPair]:
        group_top = self._top_latents(codes)
        found = []
        for target in classes:
            positive = labels == target
            n_positive = int(positive.sum())
            if min(n_positive, len(labels) - n_positive) < FEWEST_OF_EACH_SIDE:
                continue
            class_top = self._top_latents(codes[np.flatnonzero(positive)])
            either = len(class_top | group_top)
            overlap = len(class_top & group_top) / either if either else 0.0
            ranked = np.argsort(class_f_scores(codes, positive.astype(np.int64)))[::-1]
            narrow, wide = (
                _fitted_f1(probe_columns(codes, ranked[:k]), positive, self.seed)
                for k in (self.k_primary, self.k_expanded)
            )
            found.append(
                AbsorptionPair(
                    group=name,
                    class_index=int(target),
                    overlap=overlap,
                    f1_primary=narrow,
                    f1_expanded=wide,
                    absorbed=wide - narrow > self.threshold or overlap > LARGE_OVERLAP,
                    n_positive=n_positive,
                )
            )
        return found

    def _top_latents(self, codes: Any) -> set[int]:
        """Return the latents of largest mean; means are float32 sums down dense columns."""
        means = np.zeros(codes.shape[1], dtype=np.float32)
        by_column = codes.tocsc()
        for block in column_blocks(codes, active_columns(codes)):
            means[block] = np.ascontiguousarray(by_column[:, block].toarray()).mean(axis=0)
        top = np.argsort(means)[-self.top_k :]
        return set((top[means[top] > 0] if self.only_active else top).tolist())


def sibling_groups(class_paths: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """Group classes that share their parent in a taxonomy.

    Args:
        class_paths: one path per class, broadest step first and the class itself last.

    Returns:
        Class numbers by parent. Parents with a single class are left out.

    Examples:
        >>> vp.metrics.sibling_groups([["bird", "owl"], ["bird", "duck"], ["fish", "cod"]])
        {'bird': [0, 1]}
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, path in enumerate(class_paths):
        if len(path) > 1:
            groups["/".join(path[:-1])].append(index)
    return {name: members for name, members in groups.items() if len(members) > 1}


def _fitted_f1(columns: Array, positive: Array, seed: int) -> float:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import f1_score

    probe = LogisticRegression(solver="lbfgs", max_iter=500, C=1.0, random_state=seed)
    labels = positive.astype(np.int64)
    fit_quietly(probe, columns, labels)
    return float(f1_score(labels, probe.predict(columns), average="binary", zero_division=0.0))
