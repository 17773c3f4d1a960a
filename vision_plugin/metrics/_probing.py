"""Linear probes on few latents and on reconstructions: how much do they tell of the classes?

Both follow VISAEBench step by step, scikit-learn's estimators included, since a probe's accuracy
depends on its split and solver.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin._extras import require_sklearn
from vision_plugin.metrics._imagecodes import Array, ImageCodes, class_f_scores, probe_columns
from vision_plugin.metrics._latents import check_finite
from vision_plugin.metrics._result import MetricResult
from vision_plugin.metrics._streaming import StreamingMetric

__all__ = [
    "DownstreamPreservation",
    "DownstreamPreservationResult",
    "SparseProbing",
    "SparseProbingResult",
]

RankOn = Literal["all", "train"]
K_VALUES = (1, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class SparseProbingResult(MetricResult):
    """Accuracy of probes on the ``k`` latents that tell the classes apart best.

    Attributes:
        auc: area under accuracy over ``k`` (linear in ``k``), divided by the range of ``k``.
        accuracy: test accuracy by ``k``.
        majority: share of the largest class in the test images, the accuracy without any latent.
        n_images: number of images seen.
        n_classes: number of classes among them.

    Examples:
        >>> labels = torch.arange(40) % 2
        >>> metric = vp.metrics.SparseProbing(n_features=2, k_values=(1,))
        >>> metric.update(torch.eye(2)[labels], labels)
        >>> found = metric.compute()
        >>> found.accuracy, found.majority
        ({1: 1.0}, 0.5)
    """

    headline = ("auc", "majority")

    auc: float
    accuracy: dict[int, float]
    majority: float
    n_images: int
    n_classes: int

    def summary(self) -> dict[str, float | int]:
        """Return the area, the accuracies and the counts."""
        named = {f"accuracy_k{k}": value for k, value in self.accuracy.items()}
        return {**super().summary(), **named}


class SparseProbing(ImageCodes):
    """Accuracy of logistic regression on 1, 5, ..., 100 latents, chosen by their F statistic.

    Args:
        n_features: number of latents.
        k_values: numbers of latents to probe; those above ``n_features`` are skipped.
        test_size: share of the images held out for testing.
        seed: seed of the split.
        rank_on: images that choose the latents: ``"all"``, as in VISAEBench, where held-out images
            have a say, or ``"train"``, which keeps them out.

    Examples:
        >>> labels = torch.arange(40) % 2
        >>> metric = vp.metrics.SparseProbing(n_features=2, k_values=(1, 2))
        >>> metric.update(torch.eye(2)[labels], labels)
        >>> metric.compute().auc
        1.0
    """

    higher_is_better = True

    def __init__(
        self,
        *,
        n_features: int,
        k_values: Sequence[int] = K_VALUES,
        test_size: float = 0.2,
        seed: int = 42,
        rank_on: RankOn = "all",
        **kwargs: Any,
    ) -> None:
        super().__init__(n_features=n_features, **kwargs)
        if not k_values or min(k_values) < 1 or min(k_values) > n_features:
            raise ValueError(
                f"k_values={list(k_values)} must be at least 1, and one must fit n_features="
                f"{n_features}"
            )
        if rank_on not in get_args(RankOn):
            raise ValueError(f"rank_on={rank_on!r} is not one of {list(get_args(RankOn))}")
        self.k_values = tuple(sorted(k for k in k_values if k <= n_features))
        self.test_size, self.seed, self.rank_on = test_size, seed, rank_on

    def update(self, latents: Tensor, labels: Tensor | Sequence[int]) -> None:
        """Add images: latents ``[n, n_features]`` max-pooled over patches, and class labels."""
        self.add_images(latents, labels)

    def compute(self) -> SparseProbingResult:
        """Fit the probes on all images seen, by all processes.

        Raises:
            ValueError: fewer than two classes were seen.
        """
        require_sklearn("the probing metrics")
        codes, labels = self.codes(), self.label_array()
        check_classes(labels)
        train, test = split(labels, self.test_size, self.seed)
        ranking = class_f_scores(
            *((codes, labels) if self.rank_on == "all" else (codes[train], labels[train]))
        )
        ranked = np.argsort(ranking)[::-1]
        accuracy = {
            k: probe_accuracy(probe_columns(codes, ranked[:k]), labels, train, test, self.seed)
            for k in self.k_values
        }
        return SparseProbingResult(
            auc=area(accuracy),
            accuracy=accuracy,
            majority=float(np.bincount(labels[test]).max() / len(test)),
            n_images=len(labels),
            n_classes=len(np.unique(labels)),
        )


@dataclass(frozen=True)
class DownstreamPreservationResult(MetricResult):
    """Accuracy of one probe on activations and on their reconstructions.

    Attributes:
        preservation: accuracy on reconstructions over accuracy on originals, cut to [0, 2]; 0 where
            the probe gets nothing right on the originals.
        accuracy_original: accuracy on held-out originals.
        accuracy_reconstructed: accuracy on the same images' reconstructions.
        n_images: number of images seen.
        n_sparse_classes: number of classes with fewer than five held-out images.

    Examples:
        >>> labels = torch.arange(40) % 2
        >>> x = torch.eye(2)[labels]
        >>> metric = vp.metrics.DownstreamPreservation(d_in=2)
        >>> metric.update(x, torch.zeros(40, 2), labels)
        >>> found = metric.compute()
        >>> found.accuracy_original, found.accuracy_reconstructed
        (1.0, 0.5)
    """

    headline = ("preservation", "accuracy_original", "accuracy_reconstructed")

    preservation: float
    accuracy_original: float
    accuracy_reconstructed: float
    n_images: int
    n_sparse_classes: int


class DownstreamPreservation(StreamingMetric):
    """Does a linear probe trained on activations still work on reconstructions?

    Both are averaged over an image's patches; a logistic regression is fitted on the originals and
    applied to both, as in VISAEBench. The ratio rewards a weak probe: read the accuracies too.

    Args:
        d_in: width of the activations.
        test_size: share of the images held out for testing.
        seed: seed of the split.
        regularization: ``C`` of the logistic regression.
        max_iter: most iterations of its solver.

    Examples:
        >>> labels = torch.arange(40) % 2
        >>> x = torch.eye(2)[labels]
        >>> metric = vp.metrics.DownstreamPreservation(d_in=2)
        >>> metric.update(x, 0.9 * x, labels)
        >>> metric.compute().preservation
        1.0
    """

    higher_is_better = True

    def __init__(
        self,
        *,
        d_in: int,
        test_size: float = 0.2,
        seed: int = 42,
        regularization: float = 1.0,
        max_iter: int = 1000,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.d_in, self.test_size, self.seed = d_in, test_size, seed
        self.regularization, self.max_iter = regularization, max_iter
        for name in ("originals", "reconstructions"):
            self.add_rows_state(name, torch.zeros(0, d_in, dtype=torch.float32))
        self.add_rows_state("labels", torch.zeros(0, dtype=torch.int64))

    def update(
        self,
        activations: Float[Tensor, "n *patches d_in"],
        reconstruction: Float[Tensor, "*reconstructed d_out"],
        labels: Tensor | Sequence[int],
    ) -> None:
        """Add images.

        Args:
            activations: ``[n, patches, d_in]``, or ``[n, d_in]`` if already averaged over patches.
            reconstruction: reconstruction of ``activations``, of the same shape.
            labels: one integer class per image.

        Raises:
            ValueError: shapes disagree, or a value is NaN or infinite.
        """
        labels = torch.as_tensor(labels)
        shape = activations.shape
        if shape != reconstruction.shape or shape[-1] != self.d_in or len(shape) not in (2, 3):
            raise ValueError(
                f"activations {tuple(shape)} and reconstruction {tuple(reconstruction.shape)} must "
                f"both be [images, patches, {self.d_in}] or [images, {self.d_in}]"
            )
        if labels.shape != shape[:1]:
            raise ValueError(f"{shape[0]} images need as many labels, got {tuple(labels.shape)}")
        for name, value in (("originals", activations), ("reconstructions", reconstruction)):
            check_finite(value, name)
            pooled = value.detach().float()
            pooled = pooled.mean(dim=1) if pooled.ndim == 3 else pooled
            self.add_rows(name, pooled.to(self.device))
        self.add_rows("labels", labels.to(self.device, torch.int64))

    def compute(self) -> DownstreamPreservationResult:
        """Fit the probe on all images seen, by all processes.

        Raises:
            ValueError: fewer than two classes were seen.
        """
        require_sklearn("the probing metrics")
        from sklearn.linear_model import LogisticRegression

        labels: Array = self.rows("labels").cpu().numpy()
        check_classes(labels)
        originals = self.rows("originals").cpu().numpy()
        reconstructions = self.rows("reconstructions").cpu().numpy()
        train, test = split(labels, self.test_size, self.seed)
        probe = LogisticRegression(
            solver="lbfgs", max_iter=self.max_iter, C=self.regularization, random_state=self.seed
        )
        fit_quietly(probe, originals[train], labels[train])
        original = float(probe.score(originals[test], labels[test]))
        reconstructed = float(probe.score(reconstructions[test], labels[test]))
        held_out = np.bincount(labels[test])
        return DownstreamPreservationResult(
            preservation=min(reconstructed / original, 2.0) if original > 0 else 0.0,
            accuracy_original=original,
            accuracy_reconstructed=reconstructed,
            n_images=len(labels),
            n_sparse_classes=int(((held_out > 0) & (held_out < 5)).sum()),
        )


def check_classes(labels: Array) -> None:
    """Raise ``ValueError`` when the labels hold fewer than two classes."""
    found = np.unique(labels)
    if len(found) < 2:
        raise ValueError(
            f"a probe tells classes apart, and the {len(labels)} images seen have "
            f"{len(found)}; pass labels of at least two classes"
        )


def split(labels: Array, test_size: float, seed: int) -> tuple[Array, Array]:
    """Return train and test image numbers, stratified where every class number up to the largest
    has two images (VISAEBench's rule: an unused number in between turns stratification off)."""
    from sklearn.model_selection import train_test_split

    stratify = labels if np.bincount(labels).min() >= 2 else None
    train, test = train_test_split(
        np.arange(len(labels)), test_size=test_size, stratify=stratify, random_state=seed
    )
    return train, test


def probe_accuracy(columns: Array, labels: Array, train: Array, test: Array, seed: int) -> float:
    """Fit logistic regression on the train rows of ``[n, few]`` and return its test accuracy."""
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(solver="lbfgs", max_iter=500, C=1.0, random_state=seed)
    fit_quietly(probe, columns[train], labels[train])
    return float(probe.score(columns[test], labels[test]))


def fit_quietly(probe: Any, columns: Array, labels: Array) -> None:
    """Fit a probe without warning that the solver stopped at its limit."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(columns, labels)


def area(accuracy: dict[int, float]) -> float:
    """Return the normalised trapezoid area under accuracy over ``k``."""
    ks = sorted(accuracy)
    if len(ks) == 1:
        return accuracy[ks[0]]
    if not ks:
        return math.nan
    return float(np.trapezoid([accuracy[k] for k in ks], x=ks) / (ks[-1] - ks[0]))
