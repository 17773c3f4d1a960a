"""A ``[batch, d_sae]`` tensor that stores only its nonzero entries.

SAELens's trainer reads ``feature_acts`` of a training step to count which latents fired and how
often. Making a dense tensor for that, or torch's COO tensor, costs more than the whole sparse
decoder. This subclass answers those reads from the stored entries. Any other operation turns it
into the ordinary dense tensor, so that code that expects one gets the right result, only slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from vision_plugin.kernels import SparseLatents

_aten = torch.ops.aten


class SparseActivations(Tensor):
    """Latents that look dense but are stored in compressed rows, outside the autograd graph."""

    latents: SparseLatents

    @staticmethod
    def __new__(cls, latents: SparseLatents) -> SparseActivations:
        """Wrap ``latents`` and detach their values."""
        self: SparseActivations = Tensor._make_wrapper_subclass(
            cls,
            (latents.batch, latents.d_sae),
            dtype=latents.values.dtype,
            device=latents.values.device,
        )
        self.latents = latents.detach()
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        """Return shape and number of stored entries, without making a dense tensor."""
        return f"SparseActivations(shape={list(self.shape)}, nnz={self.latents.values.numel()})"

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
        args, kwargs = tree_map_only(SparseActivations, _dense, (args, kwargs))
        return func(*args, **kwargs)


def _dense(activations: SparseActivations) -> Tensor:
    return activations.latents.to_dense()


def _detach(activations: SparseActivations) -> SparseActivations:
    return SparseActivations(activations.latents)


def _to_copy(activations: SparseActivations, **kwargs: Any) -> Any:
    """Cast the stored entries, for ``.bool()`` and ``.float()``; zero stays zero in any type."""
    if set(kwargs) - {"dtype"}:
        return NotImplemented
    latents = activations.latents
    return SparseActivations(latents.with_values(latents.values.to(kwargs["dtype"])))


def _sum(
    activations: SparseActivations,
    dim: list[int] | None = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    """Sum over the rows or over the latents; integers and booleans are summed as int64."""
    latents = activations.latents
    if keepdim or dim is None or len(dim) != 1 or dtype is not None:
        return NotImplemented
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
