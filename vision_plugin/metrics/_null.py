"""The permutation null of a weighted mean pairwise similarity, in closed form.

Shuffling which image carries which activation leaves ``D = sum_{i!=j} w_i w_j`` alone and makes
``Q = sum_{i!=j} w_i w_j s_ij`` random. Its mean is ``D`` times the data set's mean similarity. For
the variance, both symmetric matrices are split as the analysis of variance does,

    w_i w_j = mean + u_i + u_j + rest_ij,    s_ij = mean + g_i + g_j + rest'_ij    (i != j)

where ``u`` and ``g`` sum to zero and every row of the rests sums to zero. Under a uniform random
permutation the two parts are uncorrelated (they lie in inequivalent representations of the
symmetric group), hence

    Var Q = 4 (n-2)^2 |u|^2 |g|^2 / (n-1)  +  2 |rest|^2 |rest'|^2 / (n (n-3))

the permutation variance of Mantel (1967, Cancer Research 27:209), with the norms over ordered
pairs. All norms follow from the first four power sums of ``w`` and from the Gram matrix and the sum
of the embeddings, so no permutation is ever drawn and one streaming pass is enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SimilaritySpread:
    """Mean off-diagonal similarity, and the squared norms of its main and residual parts."""

    n_images: int
    mean: float
    main: float
    rest: float


def similarity_spread(n_images: int, embedding_sum: Tensor, gram: Tensor) -> SimilaritySpread:
    """Describe the similarities of ``n_images`` unit embeddings from their sum and Gram matrix."""
    n = n_images
    total = float(embedding_sum @ embedding_sum) - n
    mean = total / (n * (n - 1))
    if n < 3:
        return SimilaritySpread(n, mean, 0.0, 0.0)
    row_squares = float(embedding_sum @ gram @ embedding_sum) - 2 * (total + n) + n
    main = (row_squares - n * ((n - 1) * mean) ** 2) / (n - 2) ** 2
    squares = float((gram * gram).sum()) - n
    rest = squares - n * (n - 1) * mean**2 - 2 * (n - 2) * main
    return SimilaritySpread(n, mean, max(main, 0.0), max(rest, 0.0))


def null_deviation(powers: Tensor, spread: SimilaritySpread) -> Tensor:
    """Return the standard deviation of each latent's score under shuffling, ``[k]``.

    Args:
        powers: sums of ``w``, ``w^2``, ``w^3``, ``w^4`` over all images, shape ``[4, k]``.
        spread: what :func:`similarity_spread` returned for the same images.

    Returns:
        NaN where the score is undefined or does not vary (two images, or all similarities equal).
    """
    n = spread.n_images
    if n < 3:
        return torch.full_like(powers[0], math.nan)
    # The score does not depend on the scale of w; a sum of 1 keeps the fourth powers in range.
    first = powers[0]
    second, third, fourth = (powers[p] / first ** (p + 1) for p in (1, 2, 3))
    pairs = 1 - second
    mean = pairs / (n * (n - 1))
    row_squares = second - 2 * third + fourth
    main = ((row_squares - n * ((n - 1) * mean) ** 2) / (n - 2) ** 2).clamp(min=0)
    rest = (second**2 - fourth - n * (n - 1) * mean**2 - 2 * (n - 2) * main).clamp(min=0)
    variance = 4 * (n - 2) ** 2 / (n - 1) * main * spread.main
    if n > 3:
        variance = variance + 2 / (n * (n - 3)) * rest * spread.rest
    deviation = variance.sqrt() / pairs
    return torch.where(deviation > 0, deviation, torch.full_like(deviation, math.nan))
