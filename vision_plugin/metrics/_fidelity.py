"""Fidelity of a reconstruction: variance unexplained, explained variance, cosine, squared error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin.metrics._latents import check_finite
from vision_plugin.metrics._result import MetricResult
from vision_plugin.metrics._streaming import StreamingMetric

__all__ = ["FVU", "FVUResult"]

Definition = Literal["visaebench", "per_dimension"]


@dataclass(frozen=True)
class FVUResult(MetricResult):
    """Fidelity of a reconstruction over tokens.

    Attributes:
        fvu: fraction of variance unexplained, by ``definition``; NaN where that variance is not
            positive.
        explained_variance: ``1 - sum |x - xhat|^2 / sum |x - mean(x)|^2``, the mean taken for each
            dimension; NaN for constant activations.
        cosine: mean cosine of activation and reconstruction, over tokens where neither is zero.
        mse: mean squared error per dimension.
        n_tokens: number of tokens seen.
        n_without_cosine: number of tokens whose activation or reconstruction is zero.
        definition: definition of ``fvu``.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> metric = vp.metrics.FVU(d_in=2)
        >>> metric.update(x, 0.5 * x)
        >>> found = metric.compute()
        >>> found.cosine, found.mse, found.definition
        (1.0, 0.125, 'visaebench')
    """

    headline = ("explained_variance", "cosine", "fvu")
    main = "fvu"

    fvu: float
    explained_variance: float
    cosine: float
    mse: float
    n_tokens: int
    n_without_cosine: int
    definition: Definition


class FVU(StreamingMetric):
    r"""Fraction of variance unexplained, explained variance, cosine and squared error.

    ``definition="visaebench"`` is the benchmark's: with sums over all numbers of all tokens,

        V(y) = sum y^2 / n_tokens - (sum y / n_tokens)^2,    fvu = V(x - xhat) / V(x)

    It subtracts one mean for all dimensions, divides by tokens although it sums over dimensions
    too, and ignores a constant error. This suits centred activations, such as the benchmark's; for
    others it may be negative. ``"per_dimension"`` is ``1 - explained_variance``.

    Args:
        d_in: width of the activations.
        definition: definition of the field ``fvu``.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> metric = vp.metrics.FVU(d_in=2)
        >>> metric.update(x, 0.5 * x)
        >>> metric.compute().explained_variance
        0.75
    """

    higher_is_better = False

    total: Tensor
    squares: Tensor
    residual_total: Tensor
    residual_squares: Tensor
    cosines: Tensor
    n_tokens: Tensor
    n_without_cosine: Tensor

    def __init__(self, *, d_in: int, definition: Definition = "visaebench", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if definition not in get_args(Definition):
            raise ValueError(
                f"definition={definition!r} is not one of {list(get_args(Definition))}"
            )
        self.d_in, self.definition = d_in, definition
        for name in ("total", "squares", "residual_total", "residual_squares"):
            self.add_state(name, torch.zeros(d_in, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("cosines", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        for name in ("n_tokens", "n_without_cosine"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        activations: Float[Tensor, "*tokens d_in"],
        reconstruction: Float[Tensor, "*reconstructed d_out"],
    ) -> None:
        """Add tokens: activations ``[..., d_in]`` and their reconstruction of the same shape.

        Raises:
            ValueError: shapes disagree, or a value is NaN or infinite.
        """
        if activations.shape != reconstruction.shape or activations.shape[-1] != self.d_in:
            raise ValueError(
                f"activations {tuple(activations.shape)} and reconstruction "
                f"{tuple(reconstruction.shape)} must have one shape, of width d_in={self.d_in}"
            )
        check_finite(activations, "activations")
        check_finite(reconstruction, "reconstruction")
        x = activations.detach().reshape(-1, self.d_in).to(self.device, torch.float64)
        xhat = reconstruction.detach().reshape(-1, self.d_in).to(self.device, torch.float64)
        # The residual is rounded as the model computes it, in the activations' own precision.
        residual = (activations - reconstruction).detach().reshape(-1, self.d_in)
        residual = residual.to(self.device, torch.float64)
        squares = x.square()
        self.total += x.sum(0)
        self.squares += squares.sum(0)
        self.residual_total += residual.sum(0)
        self.residual_squares += residual.square().sum(0)
        norms = squares.sum(1).sqrt() * torch.linalg.vector_norm(xhat, dim=1)
        directed = norms > 0
        dots = torch.linalg.vecdot(x, xhat)
        self.cosines += (dots / torch.where(directed, norms, 1.0)).sum()
        self.n_tokens += x.shape[0]
        self.n_without_cosine += int((~directed).sum())

    def compute(self) -> FVUResult:
        """Return the fidelity over all tokens seen, by all processes.

        Raises:
            ValueError: no token was seen.
        """
        n_tokens, without = int(self.n_tokens), int(self.n_without_cosine)
        if n_tokens == 0:
            raise ValueError("fidelity is a mean over tokens, and none was seen; call update first")
        total, squares = self.total, self.squares
        residual_squares = float(self.residual_squares.sum())
        spread = float((squares - total.square() / n_tokens).clamp(min=0).sum())
        # A spread this small is rounding error of the sum of squares.
        constant = spread <= 1e-13 * float(squares.sum())
        unexplained = math.nan if constant else residual_squares / spread
        fvu = unexplained
        if self.definition == "visaebench":
            fvu = visaebench_fvu(
                n_tokens,
                float(total.sum()),
                float(squares.sum()),
                float(self.residual_total.sum()),
                residual_squares,
            )
        n_cosines = n_tokens - without
        return FVUResult(
            fvu=fvu,
            explained_variance=1 - unexplained,
            cosine=float(self.cosines) / n_cosines if n_cosines else math.nan,
            mse=residual_squares / (n_tokens * self.d_in),
            n_tokens=n_tokens,
            n_without_cosine=without,
            definition=self.definition,
        )


def visaebench_fvu(
    n_tokens: int, total: float, squares: float, residual_total: float, residual_squares: float
) -> float:
    """Return VISAEBench's ratio of variances from sums over all numbers; NaN where undefined."""
    variance = squares / n_tokens - (total / n_tokens) ** 2
    residual_variance = residual_squares / n_tokens - (residual_total / n_tokens) ** 2
    return residual_variance / variance if variance > 0 else math.nan
