"""Dictionaries to compare a score with: neurons, random directions, principal components.

Each control has ``encode`` and ``decode``, so it goes wherever an SAE goes. Placed at a hook, it is
steered and spliced like an SAE:

    monosemanticity(neuron_dictionary(768).encode(activations), embeddings)
    steerability(model, neuron_dictionary(768).at("blocks.11.hook_resid_post"), pixels, texts)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vision_plugin import kernels
from vision_plugin.metrics._latents import check_finite

__all__ = [
    "ControlDictionary",
    "neuron_dictionary",
    "pca_dictionary",
    "random_dictionary",
    "with_controls",
]


@dataclass
class ControlConfig:
    """Configuration of a control: a ``DictionaryConfig`` whose metadata names its hook."""

    d_in: int
    d_sae: int
    hook_name: str | None = None
    tokens: str = "all"

    @cached_property
    def metadata(self) -> Any:
        """Return SAELens's metadata: the hook and the kind of token.

        Raises:
            ValueError: the dictionary has no hook yet.
        """
        if self.hook_name is None:
            raise ValueError(
                "this dictionary has no hook: dictionary.at('blocks.11.hook_resid_post') puts it "
                "at one"
            )
        # Importing SAELens takes seconds; importing this module should not.
        from sae_lens.saes.sae import SAEMetadata

        return SAEMetadata(hook_name=self.hook_name, tokens=self.tokens)


class ControlDictionary(nn.Module):
    """A fixed dictionary: latents are dot products with unit directions, the largest ``k`` kept.

    Args:
        name: name of the dictionary in tables.
        directions: unit rows ``[d_sae, d_in]``; the module keeps them as ``W_dec``.
        offset: subtracted before encoding and added after decoding, ``[d_in]``; 0 by default. The
            module keeps it as ``b_dec``.
        k: latents kept per activation, after a ReLU; None keeps every latent, signed.
        hook_name: hook at which its activations are read; see :meth:`at`.
        tokens: kind of token that it encodes.

    Examples:
        >>> control = vp.metrics.ControlDictionary("two axes", torch.eye(3)[:2], k=1)
        >>> control.encode(torch.tensor([[1.0, 2.0, 3.0]]))
        tensor([[0., 2.]])
    """

    use_error_term = False
    W_dec: Tensor
    b_dec: Tensor

    def __init__(
        self,
        name: str,
        directions: Float[Tensor, "d_sae d_in"],
        offset: Float[Tensor, " d_in"] | None = None,
        *,
        k: int | None = None,
        hook_name: str | None = None,
        tokens: str = "all",
    ) -> None:
        super().__init__()
        d_sae, d_in = directions.shape
        if k is not None and not 1 <= k <= d_sae:
            raise ValueError(f"k={k} must lie between 1 and the number of directions, {d_sae}")
        self.name, self.k = name, k
        self.cfg = ControlConfig(d_in, d_sae, hook_name, tokens)
        self.hook_dict: dict[str, Any] = {}
        self.register_buffer("W_dec", directions, persistent=False)
        offset = torch.zeros(d_in) if offset is None else offset
        self.register_buffer("b_dec", offset, persistent=False)

    def at(self, hook_name: str, *, tokens: str = "all") -> ControlDictionary:
        """Return the same dictionary at a hook of a model, usable wherever an SAE is.

        Examples:
            >>> control = vp.metrics.random_dictionary(4, 8, k=2, seed=0)
            >>> control.at("blocks.11.hook_resid_post").cfg.metadata["hook_name"]
            'blocks.11.hook_resid_post'
        """
        return ControlDictionary(
            self.name, self.W_dec, self.b_dec, k=self.k, hook_name=hook_name, tokens=tokens
        )

    @property
    def device(self) -> torch.device:
        """Return the device of the directions."""
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the directions."""
        return self.W_dec.dtype

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_sae"]:
        """Return latents ``[..., d_sae]`` of activations ``[..., d_in]``."""
        latents = (x - self.b_dec.to(x)) @ self.W_dec.to(x).T
        if self.k is None:
            return latents
        values, indices = latents.relu().topk(self.k, dim=-1)
        return torch.zeros_like(latents).scatter(-1, indices, values)

    def sparse_forward(
        self, x: Float[Tensor, "*batch d_in"]
    ) -> tuple[kernels.SparseLatents, Float[Tensor, "*batch d_in"]]:
        """Return the kept latents in compressed rows, and their reconstruction.

        Raises:
            ValueError: the dictionary keeps every latent.
        """
        if self.k is None:
            raise ValueError(f"{self.name} keeps every latent, so its latents are dense")
        directions, offset = self.W_dec.to(x), self.b_dec.to(x)
        zeros = directions.new_zeros(len(directions))
        values, indices = kernels.topk_encode(x, directions.T, zeros, self.k, b_in=offset)
        latents = kernels.SparseLatents.from_topk(
            values.flatten(0, -2), indices.flatten(0, -2), d_sae=len(directions)
        ).prune()
        return latents, kernels.csr_decode(latents, directions, offset).view(x.shape)

    def decode(self, feature_acts: Float[Tensor, "*batch d_sae"]) -> Float[Tensor, "*batch d_in"]:
        """Return the sum of directions weighted by latents ``[..., d_sae]``, and the offset."""
        return feature_acts @ self.W_dec.to(feature_acts) + self.b_dec.to(feature_acts)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_in"]:
        """Encode and decode."""
        return self.decode(self.encode(x))


def neuron_dictionary(d_in: int) -> ControlDictionary:
    """Return the identity dictionary: its latents are the neurons, the baseline of every metric.

    Setting its latent ``j`` overwrites dimension ``j`` of the activation.

    Args:
        d_in: width of the activations.

    Examples:
        >>> x = torch.tensor([[1.0, -2.0]])
        >>> vp.metrics.neuron_dictionary(2).encode(x)
        tensor([[ 1., -2.]])
    """
    return ControlDictionary("neurons", torch.eye(d_in))


def random_dictionary(d_in: int, n_features: int, *, k: int | None, seed: int) -> ControlDictionary:
    """Return unit directions drawn uniformly on the sphere.

    Args:
        d_in: width of the activations.
        n_features: number of directions.
        k: latents kept per activation, best the SAE's own L0; None keeps every latent.
        seed: seed of the random draw.

    Examples:
        >>> control = vp.metrics.random_dictionary(128, 256, k=8, seed=0)
        >>> int((control.encode(acts[:, 0]) > 0).sum(1).max())
        8
        >>> control.at("blocks.2.hook_resid_post").cfg.metadata["hook_name"]
        'blocks.2.hook_resid_post'
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n_features, d_in, generator=generator)
    return ControlDictionary(f"random (seed {seed})", nn.functional.normalize(drawn, dim=1), k=k)


def pca_dictionary(
    activations: Float[Tensor, "n d_in"], *, n_features: int | None = None, k: int | None = None
) -> ControlDictionary:
    """Return the principal components of activations ``[n, d_in]``, largest variance first.

    Args:
        activations: at least two activations.
        n_features: number of components kept; all ``d_in`` by default.
        k: latents kept per activation, after a ReLU; None keeps signed projections.

    Raises:
        ValueError: there are fewer than two activations, or one is NaN or infinite.

    Examples:
        >>> control = vp.metrics.pca_dictionary(acts[0], n_features=4)
        >>> control.W_dec.shape
        torch.Size([4, 128])
        >>> torch.allclose(control.W_dec @ control.W_dec.T, torch.eye(4), atol=1e-4)
        True
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
    return ControlDictionary("pca", directions.float(), mean.float(), k=k)


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
        score: function that takes latents ``[n, any]`` and returns a result.
        latents: latents under study, ``[n, k]``.
        activations: image-level activations ``[n, d_in]`` that the latents were computed from.
        k: latents kept per image by the random dictionary, which is as wide as ``latents``.
        seed: seed of the random dictionary.

    Examples:
        >>> x, e = torch.randn(8, 4), torch.randn(8, 3)
        >>> rows = vp.metrics.with_controls(
        ...     lambda a: vp.metrics.monosemanticity(a, e), x.relu(), x, k=2
        ... )
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
