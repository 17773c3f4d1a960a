"""Closed forms of the baselines, against what they promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vision_plugin.steering import Directions
from vision_plugin.tasks._erase import leace, probe_direction


def labelled(n: int = 600, d: int = 12, classes: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % classes
    means = torch.randn(classes, d, generator=generator)
    mixing = torch.randn(d, d, generator=generator)
    return (torch.randn(n, d, generator=generator) @ mixing + 3 * means[labels]).double(), labels


def erased(x: Tensor, labels: Tensor) -> Tensor:
    vectors, readers, offset = leace(x, labels)
    directions = Directions("hook", vectors, readers, offset)
    every = torch.arange(len(vectors))
    return directions.edited(None, x, x, every, torch.zeros_like, True)


def test_after_leace_the_classes_have_one_mean() -> None:
    x, labels = labelled()
    new = erased(x, labels)
    means = torch.stack([new[labels == c].mean(0) for c in range(4)])
    assert (means - new.mean(0)).abs().max() < 1e-3
    least_squares = torch.linalg.lstsq(
        new - new.mean(0), torch.nn.functional.one_hot(labels).double()
    )
    assert least_squares.solution.abs().max() < 1e-3
    assert len(leace(x, labels)[0]) == 3  # one direction fewer than classes


def test_leace_is_what_its_authors_package_fits() -> None:
    concept_erasure = pytest.importorskip(
        "concept_erasure", reason="needs concept-erasure, which is not installed"
    )
    x, labels = labelled(n=3000)
    codes = torch.nn.functional.one_hot(labels).double()
    ours = erased(x, labels)
    # By default the package shrinks the covariance, which is of no matter for many samples.
    for shrinkage, bound in ((False, 1e-4), (True, 0.05)):
        theirs = concept_erasure.LeaceFitter.fit(x, codes, shrinkage=shrinkage).eraser(x)
        assert (theirs - x).norm() > 0.1 * x.norm()
        assert (ours - theirs).norm() < bound * (theirs - x).norm()


def test_leace_moves_less_than_projecting_the_means_out() -> None:
    x, labels = labelled()
    means = torch.stack([x[labels == c].mean(0) for c in range(4)]) - x.mean(0)
    span = torch.linalg.svd(means, full_matrices=False).Vh[:3]
    centred = x - x.mean(0)
    projected = centred - centred @ span.T @ span
    ours = (erased(x, labels) - x).norm(dim=1).square().mean()
    theirs = (projected - centred).norm(dim=1).square().mean()
    assert ours <= theirs * (1 + 1e-6)


def test_the_probe_separates_better_than_the_difference_of_means() -> None:
    x, labels = labelled(classes=2)
    probe = probe_direction(x, labels == 1)
    mean = torch.nn.functional.normalize(x[labels == 1].mean(0) - x[labels == 0].mean(0), dim=0)

    def separation(direction: Tensor) -> float:
        along = x @ direction
        within = torch.stack([along[labels == c].var() for c in (0, 1)]).mean()
        return float((along[labels == 1].mean() - along[labels == 0].mean()).square() / within)

    assert separation(probe) > separation(mean)
