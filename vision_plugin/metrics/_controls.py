"""What a score is compared with: the neurons themselves, random directions, principal components.

Each control is a dictionary with ``encode`` and ``decode``, so it goes wherever an SAE goes:

    monosemanticity(neuron_dictionary(768).encode(activations), embeddings)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin.metrics._latents import check_finite


@dataclass(frozen=True)
class ControlDictionary:
    """A fixed dictionary: latents are dot products with unit directions, the largest ``k`` kept.

    Attributes:
        name: what a table calls it.
        directions: unit rows ``[n_features, d_in]``.
        offset: subtracted before encoding and added after decoding, ``[d_in]``.
        k: latents kept per activation, after a ReLU; None keeps every latent, signed.
    """

    name: str
    directions: Float[Tensor, "n_features d_in"]
    offset: Float[Tensor, " d_in"]
    k: int | None = None

    def encode(self, activations: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch k"]:
        """Return latents ``[..., n_features]`` of activations ``[..., d_in]``."""
        offset, directions = self.offset.to(activations), self.directions.to(activations)
        latents = (activations - offset) @ directions.T
        if self.k is None:
            return latents
        values, indices = latents.relu().topk(self.k, dim=-1)
        return torch.zeros_like(latents).scatter(-1, indices, values)

    def decode(self, latents: Float[Tensor, "*batch k"]) -> Float[Tensor, "*batch d_in"]:
        """Return the sum of directions weighted by latents ``[..., n_features]``."""
        return latents @ self.directions.to(latents) + self.offset.to(latents)


def neuron_dictionary(d_in: int) -> ControlDictionary:
    """Return the identity dictionary: its latents are the neurons, the baseline of every metric."""
    return ControlDictionary("neurons", torch.eye(d_in), torch.zeros(d_in))


def random_dictionary(d_in: int, n_features: int, *, k: int | None, seed: int) -> ControlDictionary:
    """Return unit directions drawn uniformly on the sphere.

    Args:
        d_in: width of the activations.
        n_features: number of directions.
        k: latents kept per activation; give it the SAE's own L0.
        seed: of the draw.
    """
    if k is not None and not 1 <= k <= n_features:
        raise ValueError(f"k={k} must lie between 1 and n_features={n_features}")
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n_features, d_in, generator=generator)
    return ControlDictionary(
        f"random (seed {seed})", torch.nn.functional.normalize(drawn, dim=1), torch.zeros(d_in), k
    )


def pca_dictionary(
    activations: Float[Tensor, "n d_in"], *, n_features: int | None = None, k: int | None = None
) -> ControlDictionary:
    """Return the principal components of activations ``[n, d_in]``, largest variance first.

    Args:
        activations: at least two rows.
        n_features: components kept; all ``d_in`` by default.
        k: as in :func:`random_dictionary`; None keeps signed projections.
    """
    if activations.shape[0] < 2:
        raise ValueError(
            f"principal components need at least 2 activations, got {activations.shape[0]}"
        )
    check_finite(activations, "activations")
    double = activations.double()
    mean = double.mean(0)
    covariance = (double - mean).T @ (double - mean)
    directions = torch.linalg.eigh(covariance).eigenvectors.flip(1).T[:n_features]
    return ControlDictionary("pca", directions.float(), mean.float(), k)


def with_controls(
    score: Callable[[Tensor], object],
    latents: Tensor,
    activations: Float[Tensor, "n d_in"],
    *,
    k: int | None,
    seed: int = 0,
) -> dict[str, object]:
    """Score latents beside the neurons, principal components and random directions.

    Args:
        score: takes latents ``[n, any]`` and returns a result.
        latents: those under study.
        activations: image-level activations ``[n, d_in]`` that the latents were computed from.
        k: latents kept per image by the random dictionary, which has as many as ``latents``.
        seed: of the random dictionary.

    Example:
        >>> x, e = torch.randn(8, 4), torch.randn(8, 3)
        >>> rows = with_controls(lambda a: monosemanticity(a, e), x.relu(), x, k=2)
        >>> list(rows)
        ['latents', 'neurons', 'pca', 'random (seed 0)']
    """
    d_in = activations.shape[1]
    controls = [
        neuron_dictionary(d_in),
        pca_dictionary(activations),
        random_dictionary(d_in, latents.shape[1], k=k, seed=seed),
    ]
    rows = {"latents": score(latents)}
    rows.update({control.name: score(control.encode(activations)) for control in controls})
    return rows
