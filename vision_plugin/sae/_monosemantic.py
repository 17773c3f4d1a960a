"""A loss that rewards latents which fire on similar vectors (MonoLoss).

Source: "MonoLoss: A Training Objective for Interpretable Monosemantic Representations"
(arXiv 2602.12403). It is the monosemanticity score of Pach et al. (2025) on a batch, with the
vectors of the batch as embeddings, computed from sums instead of pairs.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin.sae._terms import add_term

_SMALL = 1e-8


def monosemanticity_loss(
    x: Float[Tensor, "batch d_in"], latents: Float[Tensor, "batch d_sae"]
) -> Float[Tensor, ""]:
    """Return 1 minus the mean score of the latents that fire on at least two vectors.

    Let ``a`` be a latent scaled to the range from 0 to 1 over the batch, and ``e`` the vectors
    scaled to unit norm. The latent's score is
    ``(|sum_i a_i e_i|^2 - sum_i a_i^2) / ((sum_i a_i)^2 - sum_i a_i^2)``: the mean similarity of
    two vectors, weighted by how strongly the latent fires on both.

    Args:
        x: Vectors that the SAE reads; they get no gradient.
        latents: Latents of these vectors, not negative.

    Examples:
        >>> x = torch.eye(2)[[0, 0, 1]]
        >>> clean, mixed = torch.tensor([[1.0], [1.0], [0.0]]), torch.tensor([[1.0], [0.0], [1.0]])
        >>> vp.sae.monosemanticity_loss(x, clean), vp.sae.monosemanticity_loss(x, mixed)
        (tensor(0.), tensor(1.))
    """
    directions = torch.nn.functional.normalize(x.detach(), dim=1)
    low, high = latents.detach().amin(0), latents.detach().amax(0)
    scaled = (latents - low) / (high - low).clamp(min=_SMALL)
    squares = scaled.square().sum(0)
    together = (directions.T @ scaled).square().sum(0) - squares
    pairs = scaled.sum(0).square() - squares
    counted = pairs > _SMALL
    if not bool(counted.any()):
        return latents.new_zeros(())
    score: Tensor = 1 - (together[counted] / pairs[counted]).mean()
    return score


def reward_monosemanticity(sae: Any, coefficient: float) -> None:
    """Add the monosemanticity loss to every training step of an SAE from now on.

    The authors weigh it against a mean squared error. SAELens sums the squared error over
    ``d_in``, so this function multiplies the loss by ``d_in``.

    Args:
        sae: SAE in training.
        coefficient: Weight of the loss relative to the mean squared error.
    """
    weight = coefficient * sae.cfg.d_in
    if hasattr(sae, "loss_terms"):
        sae.loss_terms["mono_loss"] = lambda x, latents: (
            weight * monosemanticity_loss(x, latents.to_dense())
        )
        return

    def term(step_input: Any, output: Any) -> Tensor:
        x = step_input.sae_in[..., : sae.cfg.d_in].reshape(-1, sae.cfg.d_in)
        latents = output.feature_acts.reshape(-1, sae.cfg.d_sae)
        loss: Tensor = weight * monosemanticity_loss(x, latents)
        return loss

    add_term(sae, "mono_loss", term)
