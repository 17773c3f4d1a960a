"""Latents whose decoder directions point the same way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class Neighbours:
    """Each latent's nearest latents by the cosine of their decoder rows, nearest first."""

    latents: Int[np.ndarray, "features n"]
    cosines: Float[np.ndarray, "features n"]


@torch.no_grad()
def decoder_neighbours(sae: Any, features: list[int], n: int) -> Neighbours | None:
    """Find each latent's nearest neighbours among all latents.

    Args:
        sae: A ``sae_lens.SAE``.
        features: Numbers of the latents whose neighbours are wanted.
        n: Number of neighbours per latent.

    Returns:
        None if the SAE has no decoder matrix or no neighbour is wanted. A latent whose decoder
        row is zero has cosine 0 with all others.
    """
    decoder = getattr(sae, "W_dec", None)
    if not isinstance(decoder, Tensor) or decoder.ndim != 2 or len(decoder) != sae.cfg.d_sae:
        return None
    rows = decoder.detach().float()
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    n = min(n, len(rows) - 1)
    if n == 0:
        return None
    wanted = torch.tensor(features, dtype=torch.long, device=rows.device)
    latents, cosines = [], []
    for part in wanted.split(max(1, _CHUNK_ELEMENTS // len(rows))):
        similar = rows[part] @ rows.T
        similar[torch.arange(len(part), device=part.device), part] = -torch.inf
        best = similar.topk(n, dim=1)
        latents.append(best.indices.cpu().numpy())
        cosines.append(best.values.clamp(-1, 1).cpu().numpy())
    return Neighbours(np.concatenate(latents), np.concatenate(cosines))
