"""The sparse kernel's backends: which exist, which can run here, and which one runs.

A backend is an object with the methods of `Backend`, published under the entry-point group
``vision_plugin.kernels``. The operators ask `run` for a primitive; `run` picks a backend for the
device, or the one that was asked for by name, and uses the reference when its pick fails.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from typing import Any, Protocol

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

GROUP = "vision_plugin.kernels"
AUTO = "auto"
REFERENCE = "torch"
ENVIRONMENT_VARIABLE = "VISION_PLUGIN_KERNEL"

# These two also work from a bare checkout that no installer has seen, so they need no entry point.
_BUILT_IN = {
    "torch": "vision_plugin.kernels._torch_backend:BACKEND",
    "triton": "vision_plugin.kernels._triton_backend:BACKEND",
}
# Order of choice on a device that several backends serve; other packages' backends come first.
_PREFERENCE = ("triton", REFERENCE)


class Backend(Protocol):
    """What a backend provides: eight primitives on plain 2-D tensors, none differentiable.

    Every method returns new tensors, accumulates in float32 or better, and gives the same bits
    for the same input. ``indices`` and ``offsets`` are int32 compressed sparse rows. Vectors
    arrive contiguous; matrices may have any strides. Where ``offsets`` is None, every row has
    equally many entries, and ``indices`` and ``weights`` are ``[rows, k]``. A NaN among the
    pre-activations ranks above every number, and is selected.

    Examples:
        >>> from importlib.metadata import entry_points
        >>> (point,) = entry_points(group="vision_plugin.kernels", name="torch")
        >>> backend = point.load()
        >>> backend.name, backend.unusable("cpu")
        ('torch', None)
    """

    name: str

    def unusable(self, device_type: str) -> str | None:
        """Return why this backend cannot run on ``device_type`` here, or None when it can."""

    def encode_topk(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        scale: Tensor | None,
        k: int,
        relu: bool,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the top k of each row of ``(x @ W_enc + b_enc) * scale``; see `topk_encode`."""

    def encode_batch_topk(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        scale: Tensor | None,
        total: int,
        padded: bool,
        dtype: torch.dtype | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the ``total`` largest positive entries of the batch; see `batch_topk_encode`.

        With ``padded``, exactly ``total`` of them, and without waiting for the device.
        """

    def encode_threshold(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the positive entries above their latent's threshold; see `threshold_encode`."""

    def gather_sum(
        self,
        source: Tensor,
        indices: Tensor,
        offsets: Tensor | None,
        weights: Tensor,
        bias: Tensor | None,
        check: bool,
    ) -> Tensor:
        """Return sums ``out[s]`` of ``weights[p] * source[indices[p]]`` over segment s, plus bias.

        With ``check``, indices ``[rows, k]`` on a GPU may be wrong, and must then end in an error
        of the device, not in a read past the end; on a CPU they have been checked.
        """

    def level_sums(
        self,
        source: Tensor,
        indices: Tensor,
        offsets: Tensor,
        weights: Tensor,
        bias: Tensor | None,
        n_levels: int,
    ) -> Tensor:
        """Return ``out[l, r]``, the sum of row r's segments 0 to l, plus bias.

        Row r has the segments ``r * n_levels`` to ``(r + 1) * n_levels - 1``.
        """

    def pair_dot(
        self, segments: Tensor, source: Tensor, indices: Tensor, offsets: Tensor | None
    ) -> Tensor:
        """Return ``out[p]``, the dot of ``segments[s]`` and ``source[indices[p]]``."""

    def segment_sum(self, values: Tensor, offsets: Tensor) -> Tensor:
        """Return ``out[s] = sum(values[p] for p in segment s)``, ``[segments]``."""

    def transpose(
        self, indices: Tensor, offsets: Tensor | None, n_columns: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return compressed columns: (row of each entry, its place in row order, offsets)."""


@dataclass(frozen=True)
class BackendStatus:
    """What `available` reports about one backend.

    Attributes:
        name: Name of the backend, as `use_backend` takes it.
        source: Value of the entry point, ``module:object``.
        devices: Types of device that it can run on here; empty when it cannot run at all.
        reason: Why it serves no device here, or None.

    Examples:
        >>> vp.kernels.available()["torch"].name
        'torch'
    """

    name: str
    source: str
    devices: tuple[str, ...]
    reason: str | None


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name cannot be used; the message says why.

    Examples:
        >>> try:
        ...     vp.kernels.choose("cpu", "no-such-backend")
        ... except vp.kernels.BackendUnavailableError:
        ...     print("there is no such backend")
        there is no such backend
    """


_lock = threading.Lock()
_loaded: dict[str, Any] = {}  # name -> backend, or the exception that loading it raised
_broken: dict[tuple[str, str], str] = {}  # (name, device type) -> why it failed while running
_warned: set[tuple[str, str]] = set()
_chosen: dict[str, str] = {}  # device type -> what an automatic choice found


def _from_environment() -> str:
    return os.environ.get(ENVIRONMENT_VARIABLE) or AUTO


_of_process = _from_environment()
"""Read once: asking the environment takes a tenth of a call on few latents."""
_requested: ContextVar[str | None] = ContextVar("vision_plugin_kernel", default=None)


@lru_cache(maxsize=1)
def sources() -> dict[str, str]:
    """Return where every known backend is loaded from, ``module:object``, by name."""
    found = dict(_BUILT_IN)
    for point in entry_points(group=GROUP):
        if point.name in _BUILT_IN and point.value != _BUILT_IN[point.name]:
            logger.warning(
                "The kernel backend name %r belongs to vision_plugin; %s is ignored. "
                "Publish it under another name.",
                point.name,
                point.value,
            )
            continue
        found[point.name] = point.value
    return found


def available() -> dict[str, BackendStatus]:
    """Return every backend by name, with its devices here and, if it has none, the reason.

    Examples:
        >>> "torch" in vp.kernels.available()
        True
    """
    report = {}
    present = [d for d in ("cpu", "cuda", "mps") if d == "cpu" or _device_present(d)]
    for name, source in sorted(sources().items()):
        reasons = {device: _unusable(name, device) for device in present}
        devices = tuple(device for device, reason in reasons.items() if reason is None)
        first_reason = next((r for r in reversed(reasons.values()) if r is not None), None)
        report[name] = BackendStatus(name, source, devices, None if devices else first_reason)
    return report


def requested() -> str:
    """Return the backend of `use_backend`, or of the environment at the import, or ``"auto"``."""
    return _requested.get() or _of_process


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Use the backend called ``name`` for every kernel call inside the block.

    Args:
        name: A name from `available`, or ``"auto"`` to choose by device.

    Raises:
        BackendUnavailableError: no backend has this name, or it cannot be loaded. Whether it runs
            on the device of a tensor is checked by the call that has the tensor.

    Examples:
        >>> x, W_enc = torch.eye(2), torch.eye(2)
        >>> with vp.kernels.use_backend("torch"):
        ...     values, indices = vp.kernels.topk_encode(x, W_enc, torch.zeros(2), k=1)
        >>> indices.flatten().tolist()
        [0, 1]
    """
    if name != AUTO and isinstance(loaded := _load(name), Exception):
        raise BackendUnavailableError(_explain(name, str(loaded))) from loaded
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def choose(device_type: str, name: str = AUTO) -> str:
    """Return the name of the backend that serves a device.

    Args:
        device_type: Type of device, ``"cpu"``, ``"cuda"``, ...
        name: Name of a backend, or ``"auto"``.

    Raises:
        BackendUnavailableError: the backend that was asked for cannot serve the device.

    Examples:
        >>> vp.kernels.choose("cpu", "torch")
        'torch'
    """
    if name != AUTO:
        if name != REFERENCE and (reason := _unusable(name, device_type)):
            raise BackendUnavailableError(_explain(name, reason))
        return name
    if device_type not in _chosen:
        _chosen[device_type] = _first_usable(device_type)
    return _chosen[device_type]


def _first_usable(device_type: str) -> str:
    for candidate in _candidates():
        if candidate == REFERENCE:
            break
        if candidate == "triton" and device_type == "cpu":
            continue  # at best it can be interpreted there, which only asking by name does
        reason = _unusable(candidate, device_type)
        if reason is None:
            return candidate
        # A backend for GPUs need not serve the CPU, but a broken one is worth a warning.
        if device_type != "cpu" or isinstance(_load(candidate), Exception):
            _warn_once(candidate, device_type, reason)
    return REFERENCE


def run(primitive: str, where: Tensor, name: str, *arguments: Any) -> Any:
    """Run one primitive on the chosen backend; use the reference if an automatic choice fails.

    Args:
        primitive: Name of a method of `Backend`.
        where: A tensor on the device that it runs on.
        name: Name of a backend, or ``"auto"``.
        *arguments: Arguments of the method.

    Raises:
        BackendUnavailableError: the backend was asked for by name and failed.
    """
    device_type = "cpu" if where.is_cpu else "cuda" if where.is_cuda else where.device.type
    chosen = choose(device_type, name)
    given = [
        argument.contiguous() if isinstance(argument, Tensor) and argument.ndim == 1 else argument
        for argument in arguments
    ]
    if chosen == REFERENCE:
        return getattr(_load(REFERENCE), primitive)(*given)
    try:
        return getattr(_load(chosen), primitive)(*given)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = f"{primitive} failed with {type(error).__name__}: {error}"
        if name != AUTO:
            raise BackendUnavailableError(_explain(name, reason)) from error
        _broken[chosen, device_type] = reason
        _chosen.clear()
        _warn_once(chosen, device_type, reason)
        return getattr(_load(REFERENCE), primitive)(*given)


def _candidates() -> list[str]:
    others = sorted(set(sources()) - set(_PREFERENCE))
    return [*others, *_PREFERENCE]


def _load(name: str) -> Any:
    """Return the backend, or the exception that kept it from loading."""
    if name in _loaded:
        return _loaded[name]
    with _lock:
        if name not in _loaded:
            _loaded[name] = _import(name)
        return _loaded[name]


def _import(name: str) -> Any:
    known = sources()
    if name not in known:
        return LookupError(f"there is no such backend; known: {', '.join(sorted(known))}")
    module, _, attribute = known[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        return ImportError(f"{known[name]} cannot be loaded: {type(error).__name__}: {error}")


def _unusable(name: str, device_type: str) -> str | None:
    backend = _load(name)
    if isinstance(backend, Exception):
        return str(backend)
    if (name, device_type) in _broken:
        return _broken[name, device_type]
    reason: str | None = backend.unusable(device_type)
    return reason


def _explain(name: str, reason: str) -> str:
    return (
        f"The kernel backend {name!r} was asked for and cannot be used: {reason}. "
        f"Ask for {AUTO!r}, or for {REFERENCE!r}, which runs on every device."
    )


def _warn_once(name: str, device_type: str, reason: str) -> None:
    if (name, device_type) not in _warned:
        _warned.add((name, device_type))
        warnings.warn(
            f"The kernel backend {name!r} is not usable on {device_type} and {REFERENCE!r} is "
            f"used instead: {reason}",
            RuntimeWarning,
            stacklevel=3,
        )


def _device_present(device_type: str) -> bool:
    if device_type == "mps":
        return torch.backends.mps.is_available()
    return torch.cuda.is_available()


def forget() -> None:
    """Forget loaded backends, failures, warnings and the environment, as a new process does."""
    global _of_process
    with _lock:
        _loaded.clear()
    _of_process = _from_environment()
    sources.cache_clear()
    _broken.clear()
    _chosen.clear()
    _warned.clear()
