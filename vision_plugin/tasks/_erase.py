"""Closed forms that take a label out of activations."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_RIDGE = 1e-6
"""Share of the mean variance that is added to every direction before inverting."""


def leace(
    x: Float[Tensor, "n d"],
    labels: Int[Tensor, " n"],
    weights: Float[Tensor, " n"] | None = None,
) -> tuple[Float[Tensor, "r d"], Float[Tensor, "r d"], Float[Tensor, " d"]]:
    """Return LEACE: the least change after which no linear probe tells the classes apart.

    Belrose et al. 2023 (arXiv 2306.03819), theorem 4.2: with ``W`` the whitening matrix and ``P``
    the projection onto the span of ``W Cov(x, z)``, ``x - W^+ P W (x - mean)``.

    Args:
        x: Activations.
        labels: Class of each.
        weights: How much each counts; None counts them alike.

    Returns:
        Vectors, readers and offset for :class:`vision_plugin.steering.Directions`: the eraser
        subtracts ``((x - offset) @ readers.T) @ vectors``.
    """
    double = x.double()
    share = _shares(weights, len(x))
    mean = share @ double
    centred = double - mean
    weighed = centred * share[:, None]
    classes, place = labels.unique(return_inverse=True)
    codes = torch.nn.functional.one_hot(place, len(classes)).double()
    covariance = weighed.T @ centred
    values, axes = torch.linalg.eigh(covariance)
    values = values + _RIDGE * values.mean()
    whiten = axes * values.rsqrt() @ axes.T
    unwhiten = axes * values.sqrt() @ axes.T
    cross = whiten @ (weighed.T @ (codes - share @ codes))
    left, size, _ = torch.linalg.svd(cross, full_matrices=False)
    span = left[:, size > 1e-9 * size.max()]
    return (unwhiten @ span).T, (whiten @ span).T, mean


def probe_direction(
    x: Float[Tensor, "n d"],
    has: Bool[Tensor, " n"],
    weights: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, " d"]:
    """Return the unit normal of the linear discriminant between two kinds of activations.

    Args:
        x: Activations.
        has: Kind of each.
        weights: How much each counts; None counts them alike.
    """
    double, share = x.double(), _shares(weights, len(x))
    means = torch.stack([share[kind] @ double[kind] / share[kind].sum() for kind in (~has, has)])
    centred = double - means[has.long()]
    covariance = (centred * share[:, None]).T @ centred
    covariance += _RIDGE * covariance.diagonal().mean() * torch.eye(x.shape[1], dtype=torch.float64)
    direction = torch.linalg.solve(covariance, means[1] - means[0])
    unit: Tensor = torch.nn.functional.normalize(direction, dim=0)
    return unit


def _shares(weights: Tensor | None, n: int) -> Float[Tensor, " n"]:
    given = torch.ones(n, dtype=torch.float64) if weights is None else weights.double()
    return given / given.sum()
