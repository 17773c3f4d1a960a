"""One internal form for latents that come dense, as COO or as CSR.

A dense tensor with few non-zeros is turned into the sparse form, so that cost follows the number
of non-zeros whatever the layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

SPARSE_BELOW = 1 / 16
"""Share of non-zeros below which a dense tensor is cheaper to process as a sparse one."""

CHUNK_ELEMENTS = 2**25
"""Elements of the largest float64 temporary (256 MiB)."""


@dataclass(frozen=True)
class LatentColumns:
    """The non-zeros of an ``[n_rows, n_features]`` matrix, sorted by latent, rows ascending.

    ``features``, ``rows`` and ``values`` (float64) have one entry per non-zero.
    """

    n_rows: int
    n_features: int
    features: Tensor
    rows: Tensor
    values: Tensor

    def counts(self) -> Tensor:
        """Return the number of non-zeros of each latent, ``[n_features]``."""
        return torch.bincount(self.features, minlength=self.n_features)

    def extrema(self) -> tuple[Tensor, Tensor]:
        """Return each latent's minimum and maximum, implicit zeros included."""
        shape = (self.n_features,)
        low = self.values.new_full(shape, torch.inf)
        high = self.values.new_full(shape, -torch.inf)
        low.scatter_reduce_(0, self.features, self.values, "amin")
        high.scatter_reduce_(0, self.features, self.values, "amax")
        has_zero = self.counts() < self.n_rows
        return (
            torch.where(has_zero, low.clamp(max=0.0), low),
            torch.where(has_zero, high.clamp(min=0.0), high),
        )

    def keep_rows(self, keep: Tensor) -> LatentColumns:
        """Return the rows where ``keep`` is true, renumbered."""
        inside = keep[self.rows]
        renumbered = keep.long().cumsum(0) - 1
        return LatentColumns(
            int(keep.sum()),
            self.n_features,
            self.features[inside],
            renumbered[self.rows[inside]],
            self.values[inside],
        )

    def to_dense(self, features: Tensor) -> Tensor:
        """Return the columns of a few latents, ``[n_rows, len(features)]``."""
        position = torch.full((self.n_features,), -1, device=self.features.device)
        position[features] = torch.arange(features.numel(), device=self.features.device)
        column = position[self.features]
        chosen = column >= 0
        dense = self.values.new_zeros(self.n_rows, features.numel())
        dense[self.rows[chosen], column[chosen]] = self.values[chosen]
        return dense


Latents = LatentColumns | Tensor
"""Either the sparse form, or a dense float tensor ``[n_rows, n_features]``."""


def read_latents(
    latents: Tensor, *, n_features: int | None = None, name: str = "latents"
) -> Latents:
    """Check latents and return the cheaper of the two forms.

    Args:
        latents: dense, sparse COO or sparse CSR, shape ``[n, k]``.
        n_features: required number of latents ``k``, when there is one.
        name: name of the tensor in an error.

    Raises:
        ValueError: the tensor is not two-dimensional, has another ``k``, or holds NaN or infinity.
    """
    if latents.ndim != 2:
        raise ValueError(
            f"{name}= must be [images, latents], got shape {tuple(latents.shape)}; reduce the "
            "token axis first (cls, max or mean)"
        )
    if n_features is not None and latents.shape[1] != n_features:
        raise ValueError(
            f"{name}= has {latents.shape[1]} latents, but the metric was built for "
            f"n_features={n_features}"
        )
    if latents.layout == torch.strided:
        check_finite(latents, name)
        if torch.count_nonzero(latents) < SPARSE_BELOW * latents.numel():
            rows, features = latents.nonzero(as_tuple=True)
            return _sorted_columns(latents.shape, rows, features, latents[rows, features])
        return latents
    if latents.layout == torch.sparse_csr:
        per_row = latents.crow_indices().diff()
        rows = torch.arange(latents.shape[0], device=latents.device).repeat_interleave(per_row)
        features, values = latents.col_indices().long(), latents.values()
    elif latents.layout == torch.sparse_coo:
        coalesced = latents.coalesce()
        rows, features = coalesced.indices()
        values = coalesced.values()
    else:
        raise ValueError(
            f"{name} has layout {latents.layout}; pass a dense, sparse COO or sparse CSR tensor"
        )
    check_finite(values, name)
    stored = values != 0
    if not bool(stored.all()):
        rows, features, values = rows[stored], features[stored], values[stored]
    return _sorted_columns(latents.shape, rows, features, values)


def read_embeddings(embeddings: Tensor, *, n_rows: int, d_embed: int | None = None) -> Tensor:
    """Check image embeddings ``[n, d]`` against the number of rows of the latents."""
    if embeddings.ndim != 2:
        raise ValueError(f"embeddings must be [images, d], got shape {tuple(embeddings.shape)}")
    if embeddings.shape[0] != n_rows:
        raise ValueError(
            f"latents are for {n_rows} images and embeddings for {embeddings.shape[0]}; row i of "
            "both must be the same image"
        )
    if d_embed is not None and embeddings.shape[1] != d_embed:
        raise ValueError(
            f"embeddings have width {embeddings.shape[1]}, but the metric was built for "
            f"d_embed={d_embed}"
        )
    check_finite(embeddings, "embeddings")
    return embeddings


def check_finite(values: Tensor, name: str) -> None:
    """Raise ``ValueError`` when a tensor holds NaN or infinity, saying how many."""
    # One bad entry makes the sum bad, and a sum needs no temporary of the tensor's size.
    if not values.is_floating_point() or bool(values.sum(dtype=torch.float64).isfinite()):
        return
    bad = int((~values.isfinite()).sum())
    if bad:
        raise ValueError(
            f"{name} holds {bad} NaN or infinite values of {values.numel()}; find the images they "
            "come from and leave them out"
        )


def row_chunks(n_rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Yield row ranges small enough for a float64 temporary of ``width`` columns."""
    step = max(1, CHUNK_ELEMENTS // max(1, width))
    for start in range(0, n_rows, step):
        yield start, min(start + step, n_rows)


def _sorted_columns(
    shape: torch.Size, rows: Tensor, features: Tensor, values: Tensor
) -> LatentColumns:
    if features.numel() and int(features.max()) >= shape[1]:
        raise ValueError(
            f"sparse latents of shape {tuple(shape)} name latent {int(features.max())}, which is "
            "outside; the tensor's column indices are corrupt"
        )
    features, order = torch.sort(features, stable=True)
    return LatentColumns(shape[0], shape[1], features, rows[order], values[order].double())
