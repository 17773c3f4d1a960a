"""Means whose intervals draw whole images, each with all its values."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin._intervals import RESAMPLES
from vision_plugin.tasks._measure import LEAST, Figure, interval


def clustered(values: Float[Tensor, " m"], images: Int[Tensor, " m"], *, seed: int = 0) -> Figure:
    """Return a mean with its 95% bootstrap interval, whole images drawn with all their values.

    Raises:
        ValueError: there are too few images for an interval.
    """
    names, cluster = torch.unique(images, return_inverse=True)
    n = len(names)
    if n < LEAST:
        raise ValueError(
            f"{n} images are too few for an interval, which needs {LEAST}: take more, or a model "
            "that answers more of them right"
        )
    total = torch.zeros(n, dtype=torch.float64).index_add_(0, cluster, values.double())
    count = torch.zeros(n, dtype=torch.float64).index_add_(
        0, cluster, torch.ones_like(total[cluster])
    )
    drawn = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(seed))
    means = total[drawn].sum(1) / count[drawn].sum(1)
    return interval(float(values.double().mean()), means)
