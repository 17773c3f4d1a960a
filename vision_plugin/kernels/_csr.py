"""A batch of sparse latents in compressed-row form."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparseLatents:
    """The active latents of a batch, row after row (compressed sparse rows).

    Within a row the latents ascend. The entries of row ``i`` are
    ``values[offsets[i]:offsets[i + 1]]`` at ``indices[offsets[i]:offsets[i + 1]]``. The tensors may
    have any strides.

    Attributes:
        values: Activations, ``[nnz]``; differentiable where the encoder's inputs were.
        indices: Latent of each entry, ``[nnz]``, int32.
        offsets: Place where each row begins, ``[batch + 1]``, int32; the last one is nnz.
        d_sae: Number of latents.
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor
    d_sae: int

    @classmethod
    def from_topk(cls, values: Tensor, indices: Tensor, *, d_sae: int) -> SparseLatents:
        """Return latents from ``topk_encode``'s ``[batch, k]`` values and indices."""
        batch, k = values.shape
        offsets = row_offsets(batch, k, device=values.device)
        return cls(values.reshape(-1), indices.reshape(-1), offsets, d_sae)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.offsets.numel() - 1

    def rows(self) -> Tensor:
        """Return the row of each entry, ``[nnz]``, int64."""
        counts = self.offsets.diff().long()
        index = torch.arange(self.batch, device=self.offsets.device)
        return index.repeat_interleave(counts, output_size=self.values.numel())

    def with_values(self, values: Tensor) -> SparseLatents:
        """Return the same pattern with other values, ``[nnz]``."""
        return replace(self, values=values)

    def prune(self) -> SparseLatents:
        """Drop entries that are exactly zero (a ReLU TopK row may have some)."""
        keep = self.values != 0
        kept = torch.zeros(keep.numel() + 1, dtype=torch.int32, device=keep.device)
        torch.cumsum(keep, 0, dtype=torch.int32, out=kept[1:])
        return replace(
            self,
            values=self.values[keep],
            indices=self.indices[keep],
            offsets=kept[self.offsets.long()],
        )

    def to_dense(self) -> Tensor:
        """Return the dense latents, ``[batch, d_sae]``; differentiable."""
        dense = self.values.new_zeros(self.batch, self.d_sae)
        return dense.index_put((self.rows(), self.indices.long()), self.values)

    def columns(self, latents: Tensor) -> Tensor:
        """Return some latents of every row, dense, ``[batch, len(latents)]``.

        The first call sorts the entries by latent; later calls read only the entries of
        ``latents``.
        """
        order, rows, starts = self._by_latent
        chosen = latents.to(device=starts.device, dtype=torch.long)
        counts = starts[chosen + 1] - starts[chosen]
        column = torch.arange(len(chosen), device=starts.device).repeat_interleave(counts)
        first = starts[chosen] - counts.cumsum(0) + counts
        entries = torch.arange(len(column), device=starts.device) + first[column]
        dense = self.values.new_zeros(self.batch, len(chosen))
        return dense.index_put((rows[entries], column), self.values[order[entries]])

    @cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """Places and rows of the entries in the order of latents; then where each latent begins."""
        ordered, order = self.indices.sort(stable=True)
        latents = torch.arange(self.d_sae + 1, dtype=torch.int32, device=ordered.device)
        return order, self.rows()[order], torch.searchsorted(ordered, latents)

    def to_sparse_coo(self) -> Tensor:
        """Return the latents as a coalesced ``torch.sparse_coo`` tensor, ``[batch, d_sae]``."""
        return torch.sparse_coo_tensor(
            torch.stack([self.rows(), self.indices.long()]),
            self.values,
            (self.batch, self.d_sae),
            is_coalesced=True,
            check_invariants=False,
        )

    def detach(self) -> SparseLatents:
        """Return the same latents without their autograd graph."""
        return replace(self, values=self.values.detach())


def row_offsets(batch: int, k: int, *, device: torch.device) -> Tensor:
    """Return the offsets of ``batch`` rows with ``k`` entries each, ``[batch + 1]``, int32."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * k
