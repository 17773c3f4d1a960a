"""Decoders whose rows stay near the convex hull of data points: relaxed archetypal SAEs (RA-SAE).

Source: Fel et al. (2025), "Archetypal SAE: Adaptive and Stable Dictionary Learning for Concept
Extraction in Large Vision Models" (2502.12892), equation 4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.cluster.vq import kmeans2
from torch import Tensor, nn

MIXING = "archetypal_mixing"
MIXING_LR_RATIO = 0.02
"""Learning rate of the mixing, as a multiple of the others': a row of it sums to 1 over all points,
and Adam moves every entry by the same amount."""
_LLOYD_STEPS = 10
_SMALL = 1e-8


@torch.no_grad()
def archetypes(
    rows: Float[Tensor, "n d_in"], n_points: int, *, seed: int
) -> Float[Tensor, "n_points d_in"]:
    """Return the centres of k-means clusters of the rows, at a mean norm of 1.

    Args:
        rows: Activations less the decoder's bias.
        n_points: Number of centres.
        seed: Seed of the first centres.

    Raises:
        ValueError: there are fewer rows than centres.
    """
    if len(rows) < n_points:
        raise ValueError(
            f"archetypal_points={n_points} is more than the {len(rows)} activations of the first "
            "buffer: use fewer points, or a larger n_batches_in_buffer"
        )
    points = rows.detach().cpu().numpy().astype(np.float64)
    generator = np.random.default_rng(seed)
    first = points[generator.permutation(len(points))[:n_points]]
    centres, _ = kmeans2(points, first, iter=_LLOYD_STEPS, minit="matrix", missing="warn")
    found = torch.from_numpy(centres).to(rows)
    scale: Tensor = found.norm(dim=1).mean().clamp(min=_SMALL)
    return found / scale


class ArchetypalDecoder:
    """Holds ``W_dec`` at ``exp(scale) * (mixing @ points + relaxation)`` while an SAE trains.

    ``mixing`` has rows that are not negative and sum to 1, so that ``mixing @ points`` lies in the
    hull of the points. ``relaxation`` has rows no longer than a bound. The optimiser moves these
    three in place of ``W_dec``: their gradients follow from the gradient of ``W_dec``, which
    SAELens's trainer computes and clips. The saved SAE has a plain ``W_dec``.
    """

    def __init__(self, sae: Any, *, bound: float) -> None:
        """Make the three for an SAE, without points yet.

        Args:
            sae: In training.
            bound: Longest row of the relaxation, where the points have a mean norm of 1.
        """
        self.W_dec: nn.Parameter = sae.W_dec
        self.bound = bound
        self.points = self.W_dec.new_zeros(0, self.W_dec.shape[1])
        self.mixing = nn.Parameter(self.W_dec.new_zeros(len(self.W_dec), 0))
        self.relaxation = nn.Parameter(torch.zeros_like(self.W_dec.data))
        self.scale = nn.Parameter(self.W_dec.new_zeros(()))

    def place(self, points: Tensor, *, norm: float) -> None:
        """Give each row a point of its own to begin at, in turn, and write the decoder.

        Args:
            points: [n_points, d_in], at a mean norm of 1.
            norm: Mean norm of the decoder's rows to begin with.
        """
        self.points = points
        own = torch.arange(len(self.W_dec), device=points.device) % len(points)
        self.mixing.data = nn.functional.one_hot(own, len(points)).to(points.dtype)
        self.scale.data.fill_(float(np.log(norm)))
        self.write()

    def parameters(self) -> dict[str, nn.Parameter]:
        """What the optimiser moves in place of ``W_dec``, by name."""
        return {
            MIXING: self.mixing,
            "archetypal_relaxation": self.relaxation,
            "archetypal_scale": self.scale,
        }

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Let an optimiser of :meth:`parameters` find their gradients, and keep ``W_dec`` true."""
        optimizer.register_step_pre_hook(lambda *_: self._pull_back())
        optimizer.register_step_post_hook(lambda *_: self.write())

    def _pull_back(self) -> None:
        """Turn the gradient of ``W_dec`` into those of the three, by the chain rule."""
        grad, self.W_dec.grad = self.W_dec.grad, None
        if grad is None:
            return
        scaled = grad * self.scale.detach().exp()
        self.mixing.grad = scaled @ self.points.T
        self.relaxation.grad = scaled
        self.scale.grad = (grad * self.W_dec.detach()).sum()

    @torch.no_grad()
    def write(self) -> None:
        """Bring the mixing and the relaxation within their bounds, and write ``W_dec``."""
        mixing = self.mixing.data.relu_()
        mixing /= mixing.sum(1, keepdim=True).clamp(min=_SMALL)
        length = self.relaxation.data.norm(dim=1, keepdim=True).clamp(min=_SMALL)
        self.relaxation.data *= (self.bound / length).clamp(max=1)
        self.W_dec.copy_(self.scale.exp() * (mixing @ self.points + self.relaxation))

    def state(self) -> dict[str, Tensor]:
        """All that decides how the decoder goes on."""
        return {"points": self.points, **{n: p.data for n, p in self.parameters().items()}}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on where :meth:`state` was taken."""
        self.points = state["points"].to(self.W_dec)
        for name, parameter in self.parameters().items():
            parameter.data = state[name].to(self.W_dec)
