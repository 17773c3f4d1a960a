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
    ``values[offsets[i]:offsets[i + 1]]`` at ``indices[offsets[i]:offsets[i + 1]]``.

    Attributes:
        values: ``[nnz]``, activations; differentiable where the encoder's inputs were.
        indices: ``[nnz]``, int32, the latent of each entry.
        offsets: ``[batch + 1]``, int32, where each row begins; the last one is nnz.
        d_sae: the number of latents.
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor
    d_sae: int

    @classmethod
    def from_topk(cls, values: Tensor, indices: Tensor, *, d_sae: int) -> SparseLatents:
        """Make one from ``topk_encode``'s ``[batch, k]`` values and indices."""
        batch, k = values.shape
        offsets = row_offsets(batch, k, device=values.device)
        return cls(values.reshape(-1), indices.reshape(-1), offsets, d_sae)

    @property
    def batch(self) -> int:
        """The number of rows."""
        return self.offsets.numel() - 1

    def rows(self) -> Tensor:
        """The row of each entry, ``[nnz]``, int64."""
        counts = self.offsets.diff().long()
        index = torch.arange(self.batch, device=self.offsets.device)
        return index.repeat_interleave(counts, output_size=self.values.numel())

    def with_values(self, values: Tensor) -> SparseLatents:
        """The same pattern with other values, ``[nnz]``."""
        return replace(self, values=values)

    def prune(self) -> SparseLatents:
        """Drop the entries that are exactly zero (a ReLU TopK row may hold some)."""
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
        """The dense latents, ``[batch, d_sae]``; differentiable."""
        dense = self.values.new_zeros(self.batch, self.d_sae)
        return dense.index_put((self.rows(), self.indices.long()), self.values)

    def columns(self, latents: Tensor) -> Tensor:
        """Some latents of every row, dense, ``[batch, len(latents)]``.

        The entries are sorted by latent at the first call; later calls touch only those of
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
        """In the order of the latents: the entries' places and rows; where each latent begins."""
        ordered, order = self.indices.sort(stable=True)
        latents = torch.arange(self.d_sae + 1, dtype=torch.int32, device=ordered.device)
        return order, self.rows()[order], torch.searchsorted(ordered, latents)

    def to_sparse_coo(self) -> Tensor:
        """The same latents as a coalesced ``torch.sparse_coo`` tensor, ``[batch, d_sae]``."""
        return torch.sparse_coo_tensor(
            torch.stack([self.rows(), self.indices.long()]),
            self.values,
            (self.batch, self.d_sae),
            is_coalesced=True,
            check_invariants=False,
        )

    def detach(self) -> SparseLatents:
        """The same latents, cut from the autograd graph."""
        return replace(self, values=self.values.detach())


def row_offsets(batch: int, k: int, *, device: torch.device) -> Tensor:
    """The offsets of ``batch`` rows with ``k`` entries each, ``[batch + 1]``, int32."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * k
