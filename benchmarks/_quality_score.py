"""Scores of an SAE's latents on the benchmark's vectors, whoever trained it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vision_plugin import metrics
from vision_plugin.kernels import SparseLatents

DENSE_ABOVE = 0.1
PROBED_ON = (1, 5, 20)
"""Latents that a probe may use."""


@dataclass(frozen=True)
class Scored:
    """The vectors that every SAE is scored on, image by image."""

    rows: Tensor
    """[images * tokens, d_in]."""
    n_images: int
    """Images they come from."""
    labels: Tensor | None
    """Group of each image, [images]."""
    embeddings: dict[str, Tensor]
    """[images, d_embed] by the embedding model's name."""


@dataclass(frozen=True)
class Encoded:
    """What an SAE makes of the scored vectors."""

    latents: SparseLatents
    reconstruction: Tensor
    """[images * tokens, d_in]."""
    W_dec: Tensor
    """Decoder directions, [d_sae, d_in]."""
    at_k: Tensor | None
    """Reconstruction with the threshold at which exactly k latents fire on average; None for kinds
    of SAE whose latents are counted for each vector."""


def explained_variance(rows: Tensor, reconstruction: Tensor) -> float:
    """``1 - sum |x - xhat|^2 / sum |x - mean(x)|^2``."""
    fidelity = metrics.FVU(d_in=rows.shape[1], definition="per_dimension")
    fidelity.update(rows, reconstruction)
    return float(fidelity.compute().explained_variance)


def scores(encoded: Encoded, scored: Scored) -> dict[str, Any]:
    """Alive and dense latents, L0, explained variance, monosemanticity and probing accuracy."""
    latents = encoded.latents
    sparsity = metrics.Sparsity(n_features=latents.d_sae, dense_above=DENSE_ABOVE)
    sparsity.update(latents.to_sparse_coo())
    fires = sparsity.compute()
    explained = explained_variance(scored.rows, encoded.reconstruction)
    found: dict[str, Any] = {
        "alive": latents.d_sae - fires.n_dead,
        "dense": fires.n_dense,
        "l0": fires.l0,
        "explained_variance": explained,
        "explained_variance_at_k": explained
        if encoded.at_k is None
        else explained_variance(scored.rows, encoded.at_k),
    }
    pooled = _pooled(latents, scored.n_images)
    for name, embeddings in scored.embeddings.items():
        score = metrics.monosemanticity(pooled, embeddings).score
        found[f"monosemanticity by {name}"] = float(score[~score.isnan()].mean())
    if scored.labels is not None:
        probing = metrics.SparseProbing(
            n_features=latents.d_sae, k_values=PROBED_ON, rank_on="train"
        )
        probing.update(pooled, scored.labels)
        result = probing.compute()
        found |= {f"probing on {k}": accuracy for k, accuracy in result.accuracy.items()}
        found["probing, largest group"] = result.majority
    return found


def _pooled(latents: SparseLatents, n_images: int) -> Tensor:
    """Largest activation of each latent on each image, [images, d_sae]."""
    image = latents.rows() // (latents.batch // n_images)
    place = image * latents.d_sae + latents.indices.long()
    flat = latents.values.new_zeros(n_images * latents.d_sae)
    return flat.scatter_reduce(0, place, latents.values, "amax").view(n_images, latents.d_sae)


def stability(directions: list[Tensor]) -> float:
    """Mean cosine of a direction with its nearest of another seed, over all pairs of seeds."""
    means = [
        float(metrics.stability(first, second, assign=False).max_cosine.nanmean())
        for place, first in enumerate(directions)
        for second in directions[place + 1 :]
    ]
    return sum(means) / len(means)


def at_k(sae: Any, rows: Tensor, k: int) -> Tensor:
    """What a thresholded SAE makes of vectors when k latents fire on each, on average."""
    with torch.no_grad():
        before = torch.cat(
            [sae.process_sae_in(p) @ sae.W_enc + sae.b_enc for p in rows.split(2048)]
        )
        cut = before.flatten().topk(k * len(rows)).values[-1]
        return torch.cat([sae.decode(p.relu() * (p >= cut)) for p in before.split(2048)])
