"""A mode in which nothing may wait for a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_WAITS = {
    _aten._local_scalar_dense.default,  # item(), bool(), int(), float(), tolist()
    _aten.is_nonzero.default,
    _aten.equal.default,
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten.bincount.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
    _aten.repeat_interleave.Tensor,  # unless it is told the size of its result
}
_INDEXED = {
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._index_put_impl_.default,
}


# Of a tensor on the CPU these ask no operation.
_METHODS = {Tensor.tolist, Tensor.cpu, Tensor.numpy}


class WaitedError(AssertionError):
    """An operation had to know a number that a device computes."""


class _NoMethods(TorchFunctionMode):
    """Raise on the methods of tensors that copy to the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _METHODS:
            raise WaitedError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


class NoWaiting(TorchDispatchMode):
    """Raise on each operation that waits for a device, or whose shape depends on its data.

    On a GPU these would stop the host until the device is done, and cannot be captured in a CUDA
    graph: ``item``, ``nonzero``, masks as indices, copies to the CPU.
    """

    def __enter__(self) -> NoWaiting:
        """Begin to raise."""
        self._methods = _NoMethods()
        self._methods.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop raising."""
        super().__exit__(*error)
        self._methods.__exit__(*error)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run an operation that does not wait."""
        kwargs = kwargs or {}
        sized = kwargs.get("output_size") is not None
        if func in _WAITS and not (func is _aten.repeat_interleave.Tensor and sized):
            raise WaitedError(f"{func} waits for the device")
        if func in _INDEXED and any(_is_mask(index) for index in args[1]):
            raise WaitedError(f"{func} with a mask waits for the device")
        if func is _aten._to_copy.default and "device" in kwargs:
            raise WaitedError(f"{func} to {kwargs['device']} waits for the device")
        return func(*args, **kwargs)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
