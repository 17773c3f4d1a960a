"""Muon: momentum whose update is made orthogonal, for the weight matrices of small transformers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Muon:
    """Steps weight matrices along the orthogonal factor of their momentum.

    It learns the demo world from about half as many images as AdamW does. (Jordan et al. 2024,
    "Muon: An optimizer for hidden layers in neural networks".) Written here because torch has it
    only from 2.9 on, and in bfloat16, which is slow on a CPU. Matrices of one shape are stepped
    together.

    Args:
        matrices: parameters of two dimensions.
        lr: the learning rate, as the share of the steepest step of spectral norm 1.
        momentum: how much of the last step's momentum is kept.
        weight_decay: the share of a weight that a step at rate 1 takes away.
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.01,
    ) -> None:
        self.lr = lr
        self.momentum = momentum
        self.weight_decay = weight_decay
        self._groups: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for matrix in matrices:
            self._groups[matrix.shape].append(matrix)
        self._momenta = {
            shape: torch.zeros(len(group), *shape) for shape, group in self._groups.items()
        }

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Step every matrix that has a gradient, at `scale` times the learning rate."""
        for shape, group in self._groups.items():
            gradient = torch.stack([_gradient(matrix) for matrix in group])
            momentum = self._momenta[shape].lerp_(gradient, 1 - self.momentum)
            update = orthogonalize(gradient.lerp(momentum, self.momentum))
            rate = self.lr * scale
            for matrix, direction in zip(group, update, strict=True):
                matrix.mul_(1 - rate * self.weight_decay)
                matrix.sub_(direction, alpha=rate * max(1.0, shape[0] / shape[1]) ** 0.5)


def orthogonalize(
    matrices: Float[Tensor, "n rows columns"], *, iterations: int = 5
) -> Float[Tensor, "n rows columns"]:
    """Move each matrix's singular values to about 1 (between 0.7 and 1.2) and keep its directions.

    A quintic Newton-Schulz iteration with the coefficients of Jordan et al. (2024).
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x: Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


def _gradient(matrix: nn.Parameter) -> Tensor:
    return torch.zeros_like(matrix) if matrix.grad is None else matrix.grad
