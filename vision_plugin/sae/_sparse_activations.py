"""A ``[..., d_sae]`` tensor that stores only its nonzero entries.

SAELens's trainer reads ``feature_acts`` of a training step to count which latents fired and how
often. Making a dense tensor for that, or torch's COO tensor, costs more than the whole sparse
decoder. This subclass answers those reads from the stored entries. Any other operation turns it
into the ordinary dense tensor, so that code that expects one gets the right result, only slower.
What is written to it, or to a view of it, stays written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from vision_plugin.kernels import SparseLatents

_aten = torch.ops.aten


class _Contents:
    """What a tensor and those that share its memory hold: entries, or once changed, all of it."""

    def __init__(self, latents: SparseLatents, shape: tuple[int, ...]) -> None:
        self.latents, self.shape = latents, shape
        self.written: Tensor | None = None

    def to_dense(self) -> Tensor:
        """Return a dense tensor to read."""
        if self.written is not None:
            return self.written
        return self.latents.to_dense().view(self.shape)

    def to_write(self) -> Tensor:
        """Return the dense tensor that holds the contents from now on."""
        self.written = self.to_dense()
        return self.written


class SparseActivations(Tensor):
    """Latents that look dense but are stored in compressed rows, outside the autograd graph."""

    contents: _Contents

    @staticmethod
    def __new__(
        cls, latents: SparseLatents, lead: Sequence[int] | None = None
    ) -> SparseActivations:
        """Wrap ``latents``; their values are detached.

        Args:
            latents: ``[batch, d_sae]``.
            lead: Axes that the batch consists of, such as a batch and a sequence.
        """
        shape = (*((latents.batch,) if lead is None else lead), latents.d_sae)
        return cls._of(_Contents(latents.detach(), shape))

    @classmethod
    def _of(cls, contents: _Contents) -> SparseActivations:
        values = contents.latents.values
        self: SparseActivations = Tensor._make_wrapper_subclass(
            cls, contents.shape, dtype=values.dtype, device=values.device
        )
        self.contents = contents
        return self

    def forget_writes(self) -> None:
        """Read the stored entries again, which something else has renewed."""
        self.contents.written = None

    def count_fired(self) -> Tensor:
        """Return on how many rows each latent is not zero, ``[d_sae]``, float32.

        Counts are whole numbers, whose sum does not depend on the order of adding.
        """
        contents = self.contents
        if contents.written is not None:
            return contents.written.bool().float().flatten(0, -2).sum(0)
        latents = contents.latents
        counts = torch.zeros(latents.d_sae, device=latents.values.device)
        return counts.index_add_(0, latents.indices, (latents.values != 0).float())

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Return shape and number of stored entries, without making a dense tensor."""
        nnz = self.contents.latents.values.numel()
        return f"SparseActivations(shape={list(self.shape)}, nnz={nnz})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Answer the trainer's reads from the stored entries; use a dense tensor for others."""
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None and isinstance(args[0], SparseActivations):
            result = handler(args[0], *args[1:], **kwargs)
            if result is not NotImplemented:
                return result
        # A view can be written to as well, so both hold on to the dense tensor.
        may_write = any(argument.alias_info is not None for argument in func._schema.arguments)
        dense: dict[int, SparseActivations] = {}

        def become_dense(activations: SparseActivations) -> Tensor:
            contents = activations.contents
            tensor = contents.to_write() if may_write else contents.to_dense()
            dense[id(tensor)] = activations
            return tensor

        args, kwargs = tree_map_only(SparseActivations, become_dense, (args, kwargs))
        result = func(*args, **kwargs)
        return dense.get(id(result), result)  # what was changed in place is still itself


def _detach(activations: SparseActivations) -> SparseActivations:
    return SparseActivations._of(activations.contents)


def _to_copy(activations: SparseActivations, **kwargs: Any) -> Any:
    """Cast the stored entries, for ``.bool()`` and ``.float()``; zero stays zero in any type."""
    contents = activations.contents
    if set(kwargs) - {"dtype"} or contents.written is not None:
        return NotImplemented
    latents = contents.latents
    cast = latents.with_values(latents.values.to(kwargs["dtype"]))
    return SparseActivations(cast, contents.shape[:-1])


def _sum(
    activations: SparseActivations,
    dim: list[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    """Sum over the rows or over the latents; integers and booleans are summed as int64."""
    contents = activations.contents
    if keepdim or dim is None or len(dim) != 1 or dtype is not None:
        return NotImplemented
    if len(contents.shape) != 2 or contents.written is not None:
        return NotImplemented
    latents = contents.latents
    values = latents.values
    if not values.dtype.is_floating_point:
        values = values.long()
    if dim[0] in (0, -2):
        index, size = latents.indices.long(), latents.d_sae
    else:
        index, size = latents.rows(), latents.batch
    if values.device.type == "cuda":
        return _sorted_sum(index, values, size)
    return values.new_zeros(size).index_add_(0, index, values)


def _sorted_sum(index: Tensor, values: Tensor, size: int) -> Tensor:
    """Add values by index deterministically; torch's ``index_add_`` uses atomics on GPUs."""
    ordered, order = index.sort(stable=True)
    edges = torch.arange(size + 1, device=index.device)
    offsets = torch.searchsorted(ordered, edges)
    sums = torch.segment_reduce(values[order].double(), "sum", offsets=offsets, initial=0)
    return sums.to(values.dtype)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _detach,
    _aten.alias.default: _detach,
    _aten._to_copy.default: _to_copy,
    _aten.sum.dim_IntList: _sum,
}
