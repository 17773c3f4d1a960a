"""A batch of sparse latents in compressed-row form."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


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
        k: Entries per row where all rows have equally many, else None. ``offsets`` is then made
            when it is first asked for, and the kernels do without it.
        trusted: Whether an encoder made the indices and offsets. Others are checked when used.
        padded: Whether zeros may fill up the last row, see `batch_topk_encode`.

    Examples:
        >>> values, indices = torch.tensor([[2.0], [3.0]]), torch.tensor([[0], [2]])
        >>> rows = vp.kernels.SparseLatents.from_topk(values, indices, d_sae=3)
        >>> rows.to_dense()
        tensor([[2., 0., 0.],
                [0., 0., 3.]])
    """

    def __init__(
        self,
        values: Tensor,
        indices: Tensor,
        offsets: Tensor | None,
        d_sae: int,
        *,
        k: int | None = None,
        trusted: bool = False,
        padded: bool = False,
    ) -> None:
        self.values, self.indices, self.d_sae = values, indices, d_sae
        self.k, self.trusted, self.padded = k, trusted, padded
        self._offsets = offsets
        self._equal_rows: tuple[Tensor, Tensor, Tensor, Tensor] | None = None

    @classmethod
    def from_topk(
        cls, values: Tensor, indices: Tensor, *, d_sae: int, trusted: bool = False
    ) -> SparseLatents:
        """Return latents from ``topk_encode``'s ``[batch, k]`` values and indices."""
        k = values.shape[1]
        made = cls(values.reshape(-1), indices.reshape(-1), None, d_sae, k=k, trusted=trusted)
        if values.is_contiguous() and indices.is_contiguous() and not values.requires_grad:
            made._equal_rows = made.values, made.indices, values, indices
        return made

    def segments(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return values, indices and offsets as the kernels take them.

        Where all rows have ``k`` entries, these are ``[batch, k]``, ``[batch, k]`` and None.
        """
        if self.k is None:
            return self.values, self.indices, self.offsets
        if self._equal_rows is not None and not self.values.requires_grad:
            of_values, of_indices, values, indices = self._equal_rows
            if of_values is self.values and of_indices is self.indices:
                return values, indices, None
        shape = (self.batch, self.k)
        return self.values.reshape(shape), self.indices.reshape(shape), None

    @property
    def offsets(self) -> Tensor:
        """Place where each row begins, ``[batch + 1]``, int32."""
        if self._offsets is None:
            self._offsets = row_offsets(self.batch, self.k or 0, device=self.values.device)
        return self._offsets

    @property
    def batch(self) -> int:
        """Number of rows."""
        if self._offsets is None:
            return self.values.shape[0] // (self.k or 1)
        return self._offsets.numel() - 1

    def __repr__(self) -> str:
        """Return the sizes."""
        return f"SparseLatents(batch={self.batch}, d_sae={self.d_sae}, nnz={self.values.numel()})"

    def rows(self) -> Tensor:
        """Return the row of each entry, ``[nnz]``, int64."""
        if self.k is not None:
            return torch.arange(self.batch, device=self.values.device).repeat_interleave(self.k)
        counts = self.offsets.diff().long()
        index = torch.arange(self.batch, device=self.offsets.device)
        return index.repeat_interleave(counts, output_size=self.values.numel())

    def with_values(self, values: Tensor) -> SparseLatents:
        """Return the same pattern with other values, ``[nnz]``."""
        return SparseLatents(
            values,
            self.indices,
            self._offsets,
            self.d_sae,
            k=self.k,
            trusted=self.trusted,
            padded=self.padded,
        )

    def prune(self) -> SparseLatents:
        """Drop entries that are exactly zero (a ReLU TopK row may have some)."""
        keep = self.values != 0
        kept = torch.zeros(keep.numel() + 1, dtype=torch.int32, device=keep.device)
        torch.cumsum(keep, 0, dtype=torch.int32, out=kept[1:])
        offsets = kept[self.offsets.long()]
        return SparseLatents(
            self.values[keep], self.indices[keep], offsets, self.d_sae, trusted=self.trusted
        )

    def to_dense(self) -> Tensor:
        """Return the dense latents, ``[batch, d_sae]``; differentiable."""
        dense = self.values.new_zeros(self.batch, self.d_sae)
        # Zeros that fill up must not replace what is there.
        place = (self.rows(), self.indices.long())
        return dense.index_put(place, self.values, accumulate=self.padded)

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
        place = (rows[entries], column)
        return dense.index_put(place, self.values[order[entries]], accumulate=self.padded)

    @cached_property
    def _by_latent(self) -> tuple[Tensor, Tensor, Tensor]:
        """Places and rows of the entries in the order of latents; then where each latent begins."""
        ordered, order = self.indices.sort(stable=True)
        latents = torch.arange(self.d_sae + 1, dtype=torch.int32, device=ordered.device)
        return order, self.rows()[order], torch.searchsorted(ordered, latents)

    def to_sparse_coo(self) -> Tensor:
        """Return a ``torch.sparse_coo`` tensor, ``[batch, d_sae]``; coalesced unless padded."""
        return torch.sparse_coo_tensor(
            torch.stack([self.rows(), self.indices.long()]),
            self.values,
            (self.batch, self.d_sae),
            is_coalesced=not self.padded,
            check_invariants=False,
        )

    def detach(self) -> SparseLatents:
        """Return the same latents without their autograd graph."""
        return self.with_values(self.values.detach())


def row_offsets(batch: int, k: int, *, device: torch.device) -> Tensor:
    """Return the offsets of ``batch`` rows with ``k`` entries each, ``[batch + 1]``, int32."""
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * k
