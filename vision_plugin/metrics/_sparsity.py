"""Sparsity: how many latents fire, on which tokens, and how often each latent fires."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin.metrics._latents import LatentColumns, read_latents
from vision_plugin.metrics._result import RARE_BELOW, MetricResult
from vision_plugin.metrics._streaming import StreamingMetric

__all__ = ["Sparsity", "SparsityResult", "l0_map"]

HISTOGRAM_EDGES = tuple(-6 + half / 2 for half in range(13))
"""Bin edges of log10 firing frequency: -6, -5.5, ..., 0."""


@dataclass(frozen=True)
class SparsityResult(MetricResult):
    """Firing of ``k`` latents over tokens.

    Attributes:
        l0: mean number of latents that are not zero, over all tokens.
        l0_by_kind: that mean over the tokens of one kind (``cls``, ``patch``, ``register``).
        l0_by_position: that mean over the tokens at one place in the sequence, ``[n_positions]``.
        frequency: share of the tokens on which each latent fires.
        n_active: number of tokens on which each latent fires.
        histogram: latents per bin of log10 frequency. Dead latents are in none; the first bin also
            holds all lower frequencies.
        histogram_edges: the edges of the bins.
        n_dead: number of latents that never fire.
        n_rare: number of latents that fire, but on fewer than ten tokens.
        n_dense: number of latents with a frequency above ``dense_above``.
        n_tokens: number of tokens seen.

    Examples:
        >>> metric = vp.metrics.Sparsity(n_features=3)
        >>> metric.update(torch.tensor([[1.0, 2.0, 0.0], [1.0, 0.0, 0.0]]))
        >>> found = metric.compute()
        >>> found.frequency.tolist(), found.n_dead
        ([1.0, 0.5, 0.0], 1)
    """

    headline = ("l0", "n_dead", "n_rare", "n_dense")

    l0: float
    l0_by_kind: dict[str, float]
    l0_by_position: Float[Tensor, " n_positions"]
    frequency: Float[Tensor, " k"]
    n_active: Int[Tensor, " k"]
    histogram: tuple[int, ...]
    histogram_edges: tuple[float, ...]
    n_dead: int
    n_rare: int
    n_dense: int
    dense_above: float
    n_tokens: int

    @property
    def score(self) -> Float[Tensor, " k"]:
        """Return the firing frequency of each latent."""
        return self.frequency

    def summary(self) -> dict[str, float | int]:
        """Return L0, by kind of token where known, and the counts."""
        kinds = {f"l0_{kind}": value for kind, value in self.l0_by_kind.items()}
        return {"n_features": self.n_active.numel(), **kinds, **super().summary()}


class Sparsity(StreamingMetric):
    """L0 by kind and place of token, firing frequencies, dead, rare and dense latents.

    Args:
        n_features: number of latents.
        token_kinds: kind of each token of an image, in order, such as ``("cls", "patch", ...)``;
                by default all tokens have one unnamed kind.
        dense_above: frequency above which a latent is counted as dense.

    Examples:
        >>> metric = vp.metrics.Sparsity(n_features=3, token_kinds=("cls", "patch"))
        >>> metric.update(torch.tensor([[[1.0, 2.0, 0.0], [1.0, 0.0, 0.0]]]))  # 1 image, 2 tokens
        >>> found = metric.compute()
        >>> found.l0, found.l0_by_kind
        (1.5, {'cls': 2.0, 'patch': 1.0})
    """

    sparse_latents = True
    higher_is_better = False
    latents_per = "token"

    n_images: Tensor
    n_active: Tensor
    fired_at: Tensor

    def __init__(
        self,
        *,
        n_features: int,
        token_kinds: Sequence[str] | None = None,
        dense_above: float = 0.1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if n_features < 1 or (token_kinds is not None and not token_kinds):
            raise ValueError(
                f"n_features={n_features} must be at least 1, and token_kinds= must name a token"
            )
        self.n_features, self.dense_above = n_features, dense_above
        self.token_kinds = None if token_kinds is None else tuple(token_kinds)
        self.n_positions = len(self.token_kinds or ("any",))
        self.add_state("n_images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        for name, size in (("n_active", n_features), ("fired_at", self.n_positions)):
            self.add_state(name, torch.zeros(size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, latents: Tensor) -> None:
        """Add tokens.

        Args:
            latents: ``[images, tokens, n_features]`` dense, or ``[images * tokens, n_features]``
                dense, sparse COO or sparse CSR, image by image.

        Raises:
            ValueError: the number of tokens does not fit ``token_kinds``.
        """
        if latents.ndim == 3:
            if self.token_kinds is not None and latents.shape[1] != self.n_positions:
                raise ValueError(
                    f"latents have {latents.shape[1]} tokens per image, but token_kinds= names "
                    f"{self.n_positions}"
                )
            latents = latents.flatten(0, 1)
        read = read_latents(latents.detach().to(self.device), n_features=self.n_features)
        n_rows = latents.shape[0]
        if n_rows % self.n_positions:
            raise ValueError(
                f"{n_rows} rows are not whole images of {self.n_positions} tokens each"
            )
        if isinstance(read, LatentColumns):
            self.n_active += read.counts()
            places = read.rows % self.n_positions
            self.fired_at += torch.bincount(places, minlength=self.n_positions)
        else:
            fires = read != 0
            self.n_active += fires.sum(0)
            self.fired_at += fires.sum(1).view(-1, self.n_positions).sum(0)
        self.n_images += n_rows // self.n_positions

    def compute(self) -> SparsityResult:
        """Return the sparsity over all tokens seen, by all processes.

        Raises:
            ValueError: no token was seen.
        """
        n_images, n_active = int(self.n_images), self.n_active.clone()
        n_tokens = n_images * self.n_positions
        if n_tokens == 0:
            raise ValueError("sparsity is a mean over tokens, and none was seen; call update first")
        fired_at = self.fired_at
        by_kind: Counter[str] = Counter()
        for kind, fired in zip(self.token_kinds or (), fired_at.tolist(), strict=False):
            by_kind[kind] += fired
        per_kind = Counter(self.token_kinds or ())
        frequency = n_active.double() / n_tokens
        return SparsityResult(
            l0=float(n_active.sum()) / n_tokens,
            l0_by_kind={kind: by_kind[kind] / (n * n_images) for kind, n in per_kind.items()},
            l0_by_position=fired_at.double() / n_images,
            frequency=frequency,
            n_active=n_active,
            histogram=_histogram(frequency),
            histogram_edges=HISTOGRAM_EDGES,
            n_dead=int((n_active == 0).sum()),
            n_rare=int(((n_active > 0) & (n_active < RARE_BELOW)).sum()),
            n_dense=int((frequency > self.dense_above).sum()),
            dense_above=self.dense_above,
            n_tokens=n_tokens,
        )


def _histogram(frequency: Tensor) -> tuple[int, ...]:
    edges = torch.tensor(HISTOGRAM_EDGES, dtype=torch.float64, device=frequency.device)
    logs = frequency[frequency > 0].log10().clamp(min=HISTOGRAM_EDGES[0])
    n_bins = len(HISTOGRAM_EDGES) - 1
    # A frequency of 1 sits on the last edge and belongs to the last bin.
    bins = (torch.bucketize(logs, edges, right=True) - 1).clamp(max=n_bins - 1)
    return tuple(torch.bincount(bins, minlength=n_bins).tolist())


def l0_map(result: SparsityResult, token_kinds: Sequence[str], grid: tuple[int, int]) -> Tensor:
    """Return the mean L0 of each patch as an image, ``[height, width]``.

    Args:
        result: result of a :class:`Sparsity` built with ``token_kinds``.
        token_kinds: kind of each token of an image, as given to it.
        grid: rows and columns of patches.

    Raises:
        ValueError: the grid has another number of patches.

    Examples:
        >>> kinds = ("cls", "patch", "patch", "patch", "patch")
        >>> metric = vp.metrics.Sparsity(n_features=2, token_kinds=kinds)
        >>> metric.update(torch.tensor([[[0.0, 0], [1, 0], [1, 1], [0, 0], [0, 1]]]))
        >>> vp.metrics.l0_map(metric.compute(), kinds, (2, 2)).tolist()
        [[1.0, 2.0], [0.0, 1.0]]
    """
    is_patch = torch.tensor([kind == "patch" for kind in token_kinds])
    if is_patch.numel() != result.l0_by_position.numel() or int(is_patch.sum()) != math.prod(grid):
        raise ValueError(
            f"{int(is_patch.sum())} patches among {is_patch.numel()} tokens do not fill a grid of "
            f"{grid[0]} by {grid[1]} for {result.l0_by_position.numel()} positions"
        )
    return result.l0_by_position[is_patch].view(*grid)
