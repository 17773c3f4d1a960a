"""Refuse a dictionary whose weights cannot give numbers, once, when it is first used."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

LIMIT = torch.finfo(torch.float32).max ** 0.5
"""Largest weight whose square float32 can hold."""

_checked: weakref.WeakKeyDictionary[Any, tuple[object, ...]] = weakref.WeakKeyDictionary()


def require_finite(dictionary: Any) -> None:
    """Raise if a weight is NaN or infinite, or so large that float32 overflows on it.

    Weights that were found good are not read again until they change.

    Raises:
        ValueError: the message gives the tensor and how many of its values are bad.
    """
    tensors = [(name, t) for name, t in _weights(dictionary) if not t.is_meta]
    seen = tuple((name, t.data_ptr(), t._version, t.dtype) for name, t in tensors)
    is_module = isinstance(dictionary, nn.Module)
    if is_module and _checked.get(dictionary) == seen:
        return
    for name, tensor in tensors:
        low, high = (float(edge) for edge in torch.aminmax(tensor.detach()))
        if low >= -LIMIT and high <= LIMIT:
            continue
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            what = f"holds {bad} values of {tensor.numel()} that are NaN or infinite"
        else:
            bad = int((tensor.abs() > LIMIT).sum())
            what = (
                f"holds {bad} values of {tensor.numel()} beyond {LIMIT:.1e}, whose squares "
                "overflow float32"
            )
        raise ValueError(
            f"{name} of this {type(dictionary).__name__} {what}: its training diverged or its "
            "file is damaged; use an earlier checkpoint"
        )
    if is_module:
        _checked[dictionary] = seen


def _weights(dictionary: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield a dictionary's tensors of numbers, by name."""
    if isinstance(dictionary, nn.Module):
        named = [*dictionary.named_parameters(), *dictionary.named_buffers()]
    else:
        named = [(n, t) for n, t in getattr(dictionary, "__dict__", {}).items()]
    for name, tensor in named:
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
            yield name, tensor
