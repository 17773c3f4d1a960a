"""CLIP-Dissect: the word whose similarity to the images follows a latent best (soft-WPMI).

For a latent with top images ``x_1, x_2, ...`` (arXiv 2204.10965),

    P(w | x) = softmax over words of a * cosine(x, w)
    S(w) = sum over ranks r of log(1 + p_r (P(w | x_r) - 1))
    soft-WPMI(w) = S(w) - lambda * log(mean over latents of exp S(w))

with ``p_r`` falling from .998 to .97 over 100 ranks, ``a`` = 10 and ``lambda`` = 1. A sparse latent
may fire on fewer images: an image on which it does not fire has ``p_r = 0`` and says nothing. So
that latents of few and of many images compare, each term is taken relative to its value at
``P = 0``, ``log(1 + P p_r / (1 - p_r))``; where all latents have 100 images, this subtracts the
same number everywhere, which changes no ``soft-WPMI`` at ``lambda`` = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin.lens._firing import Firing

EPSILON = 1e-7
"""Added within the logarithm, as the authors do."""
_FACTORS = 12
"""Factors, each at most 500, multiplied before a logarithm is taken: float32 holds them."""
_BLOCK_BYTES = 2**28
"""Memory of the probabilities of a block of words."""
_CHUNK_ELEMENTS = 2**18
"""Products that are held at once: few enough to stay in a processor's cache."""


@dataclass(frozen=True, kw_only=True)
class DissectSettings:
    """The numbers in soft-WPMI; the defaults are CLIP-Dissect's.

    Examples:
        >>> vp.lens.DissectSettings().n_images
        100
    """

    n_images: int = 100
    """Top images of a latent that are looked at."""
    sharpness: float = 10.0
    """Factor of the cosine similarities in the softmax over words."""
    weight: float = 1.0
    """Factor of a word's mean over all latents, ``lambda``."""
    first: float = 0.998
    """Probability that the top image shows what the latent is about."""
    last: float = 0.97
    """What it falls to over the ranks."""

    def __post_init__(self) -> None:
        if self.n_images < 1:
            raise ValueError(f"n_images={self.n_images} must be at least 1")
        if not 0 < self.last <= self.first < 1:
            raise ValueError(
                f"first={self.first} and last={self.last} must be probabilities above 0 and below "
                "1, the last not above the first"
            )
        if not (math.isfinite(self.sharpness) and math.isfinite(self.weight)):
            raise ValueError(f"sharpness={self.sharpness} and weight={self.weight} must be finite")

    def slopes(self) -> list[float]:
        """Return ``p / (1 - p)`` of each rank."""
        step = (self.first - self.last) / self.n_images
        chances = [self.first - rank * step for rank in range(self.n_images)]
        return [chance / (1 - chance + EPSILON) for chance in chances]


@dataclass(frozen=True, eq=False)
class Dissected:
    """Each latent's best words.

    Attributes:
        words: Numbers of the words, the best first, -1 for a latent that never fires.
        scores: Their soft-WPMI; NaN for a latent that never fires.

    Examples:
        >>> fires = torch.tensor(
        ...     [[1.0, 0.0], [1.0, 0.0], [0.0, 0.0]]
        ... )  # the second latent never does
        >>> found = vp.lens.dissect(fires, torch.eye(2)[[0, 0, 1]], torch.eye(2))
        >>> found.words.tolist()
        [[0], [-1]]
    """

    words: Int[Tensor, "d_sae n"]
    scores: Float[Tensor, "d_sae n"]


@torch.no_grad()
def dissect(
    latents: Tensor | Firing,
    image_embeddings: Float[Tensor, "images d_of_images"],
    text_embeddings: Float[Tensor, "words d_of_texts"],
    *,
    n_words: int = 1,
    settings: DissectSettings | None = None,
    watch: Callable[[int], object] | None = None,
) -> Dissected:
    """Find the words whose similarity to the images follows each latent best, by soft-WPMI.

    All latents are scored in one pass over blocks of words, so memory does not grow with latents
    times words.

    Args:
        latents: Latents of the images, ``[n, d_sae]``: dense, sparse COO or sparse CSR; an entry
            at or below 0 does not fire.
        image_embeddings: Unit embeddings of the images, ``[n, d_embed]``.
        text_embeddings: Unit embeddings of the words, ``[words, d_embed]``.
        n_words: Words to return per latent.
        settings: The numbers in soft-WPMI; None takes CLIP-Dissect's.
        watch: Called with the number of words of each block that is done.

    Raises:
        ValueError: the latents are of another number of images, the embeddings differ in width, or
            there are no words.

    Examples:
        >>> latents = torch.eye(2)[[0, 0, 1, 1]]  # 4 images, 2 latents
        >>> found = vp.lens.dissect(latents, torch.eye(2)[[0, 0, 1, 1]], torch.eye(2))
        >>> found.words.flatten().tolist()
        [0, 1]
    """
    settings = settings or DissectSettings()
    firing = latents if isinstance(latents, Firing) else Firing.of(latents)
    _check(firing, image_embeddings, text_embeddings)
    n_words = min(n_words, len(text_embeddings))
    top = firing.top(settings.n_images)
    counts = firing.counts.clamp(max=settings.n_images)
    # Latents of many images come first: of each rank, a front part of the latents has an image.
    order = torch.sort(counts, descending=True, stable=True).indices
    top, counts = top[order].T.contiguous(), counts[order]
    best = torch.full((len(order), n_words), -torch.inf)
    words = torch.full((len(order), n_words), -1)
    for start, chances in _probabilities(image_embeddings, text_embeddings, settings.sharpness):
        scores = _evidence(chances, top, counts, settings.slopes())
        mean = _log_sum_exp(scores, 0) - math.log(len(order))
        scores -= settings.weight * mean
        values, places = scores.topk(min(n_words, scores.shape[1]), dim=1)
        both = torch.cat([best, values], 1)
        best, chosen = both.topk(n_words, dim=1)
        words = torch.cat([words, places + start], 1).gather(1, chosen)
        if watch is not None:
            watch(scores.shape[1])
    silent = counts == 0
    best[silent], words[silent] = torch.nan, -1
    back = torch.argsort(order)
    return Dissected(words[back], best[back])


def _probabilities(images: Tensor, texts: Tensor, sharpness: float) -> Iterator[tuple[int, Tensor]]:
    """Yield blocks of words: the first one's number, and ``P`` with a row of zeros at the end."""
    images, texts = images.float() * sharpness, texts.float()
    size = max(1, _BLOCK_BYTES // (4 * (len(images) + 1)))
    rows = max(1, _BLOCK_BYTES // (4 * len(texts)))
    total = torch.cat([_log_sum_exp(part @ texts.T, 1) for part in images.split(rows)])
    for start in range(0, len(texts), size):
        some = texts[start : start + size]
        chances = torch.empty(len(images) + 1, len(some))
        torch.mm(images, some.T, out=chances[:-1])
        chances[:-1].sub_(total[:, None]).exp_()
        chances[-1] = 0
        yield start, chances


def _log_sum_exp(values: Float[Tensor, "rows columns"], dim: int) -> Float[Tensor, " left"]:
    """Return ``torch.logsumexp``, which takes ten times as long over many columns on a CPU."""
    most = values.amax(dim, keepdim=True)
    return (values - most).exp_().sum(dim).log_() + most.squeeze(dim)


def _evidence(
    chances: Tensor, top: Int[Tensor, "ranks latents"], counts: Tensor, slopes: list[float]
) -> Float[Tensor, "latents words"]:
    """Return the sum over ranks of ``log(1 + slope * P)``, latents of most images first."""
    n_latents, n_words = top.shape[1], chances.shape[1]
    found = torch.zeros(n_latents, n_words)
    size = max(1, _CHUNK_ELEMENTS // n_words)
    gathered, product = (torch.empty(min(size, n_latents), n_words) for _ in range(2))
    for start in range(0, n_latents, size):
        total = found[start : start + size]
        with_image = (counts[start : start + size, None] > torch.arange(len(top))).sum(0).tolist()
        product.fill_(1)
        for rank, slope in enumerate(slopes):
            n = with_image[rank]
            if n == 0:
                break
            some, result = gathered[:n], product[:n]
            torch.index_select(chances, 0, top[rank, start : start + n], out=some)
            result.addcmul_(result, some, value=slope)
            if rank % _FACTORS == _FACTORS - 1:
                total += product[: len(total)].log_()
                product.fill_(1)
        total += product[: len(total)].log_()
    return found


def _check(firing: Firing, images: Tensor, texts: Tensor) -> None:
    if firing.n_images != len(images):
        raise ValueError(
            f"latents= are of {firing.n_images} images and image_embeddings= of {len(images)}: "
            "give both of the same images in the same order"
        )
    if len(texts) == 0:
        raise ValueError("text_embeddings= is empty: give at least one word")
    if images.shape[1] != texts.shape[1]:
        raise ValueError(
            f"text_embeddings= have {texts.shape[1]} numbers and image_embeddings= "
            f"{images.shape[1]}: they are of two models, so embed the words with the model that "
            "embedded the images"
        )
