"""Base of the metrics whose states can only be merged together.

torchmetrics merges each state on its own (sum, min, max, cat). Sums relative to a running minimum,
or image numbers counted from a shard's first image, can only be merged with the other states at
hand. Such metrics give one pure function that merges two sets of states, and this base applies it
everywhere torchmetrics merges: ``forward``, ``merge_state`` and the sync between processes.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors

from vision_plugin.metrics._result import headline_of

__all__ = ["StreamingMetric"]

State = dict[str, Tensor]


class StreamingMetric(Metric):
    """A metric whose updates stream and whose states merge.

    Tensor states added with :meth:`add_coupled_state` are merged by :meth:`merge_coupled`; list
    states added with :meth:`add_rows_state` are concatenated in the order of the merge. States
    added with torchmetrics's own ``add_state`` keep its rules.

    Raises:
        ValueError: ``compute`` is called before any data was seen, here or in another process.

    Examples:
        >>> class Mean(vp.metrics.StreamingMetric):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        ...         self.add_state("n", torch.tensor(0), dist_reduce_fx="sum")
        ...
        ...     def update(self, latents):
        ...         self.total += latents.sum()
        ...         self.n += latents.numel()
        ...
        ...     def compute(self):
        ...         return float(self.total / self.n)
        >>> metric = Mean()
        >>> metric.update(torch.tensor([1.0, 3.0]))
        >>> metric.compute()
        2.0
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._coupled: list[str] = []
        self._empty_rows: dict[str, Tensor] = {}

    def add_coupled_state(self, name: str, default: Tensor) -> None:
        """Declare a tensor state merged by :meth:`merge_coupled`; a sync stacks it per process.

        torchmetrics keeps the default beside the state. A default that repeats one number is kept
        as that number, which halves the memory of a large state.
        """
        # Cloned, since copying a view copies all of its storage. Set after add_state, which would
        # write the repetitions out.
        constant = default.flatten()[:1].clone()
        repeats = default.numel() > 1 and bool((default.amin() == default.amax()).item())
        self.add_state(name, default=constant if repeats else default, dist_reduce_fx=None)
        if repeats:
            self._defaults[name] = constant.expand(default.numel()).view(default.shape)
        setattr(self, name, default)
        self._coupled.append(name)

    def add_rows_state(self, name: str, empty: Tensor) -> None:
        """Declare a list of tensors, concatenated along the first axis; ``empty`` has no rows."""
        self.add_state(name, default=[], dist_reduce_fx="cat")
        self._empty_rows[name] = empty

    @staticmethod
    def merge_coupled(first: State, second: State) -> State:
        """Merge two sets of coupled states, ``first`` seen before ``second``, changing neither."""
        raise NotImplementedError

    def drop_cycle(self) -> None:
        """Drop torchmetrics's wrappers, when no further update or compute will come.

        The wrappers and the metric refer to each other, so a large state would otherwise stay in
        memory until the garbage collector next runs.
        """
        for name in ("update", "compute"):
            self.__dict__.pop(name, None)

    def set_dtype(self, dst_type: str | torch.dtype) -> StreamingMetric:
        """Change nothing: sums in half precision overflow and counts stop at 65,504.

        Args:
            dst_type: Type that the results are wanted in; data of any type can be given already.
        """
        del dst_type
        return self

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the few numbers that a table shows, as torchmetrics plots a metric's values.

        Args:
            val: A result, or results one after the other; by default what is computed now.
            ax: Axes of matplotlib to draw on; by default new ones.

        Returns:
            The figure, None where ``ax`` was given, and the axes.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        val = self.compute() if val is None else val
        return self._plot([_drawn(v) for v in val] if isinstance(val, list) else _drawn(val), ax)

    def coupled_states(self) -> State:
        """Return the coupled states; after a sync, merged over processes in rank order."""
        states = {name: getattr(self, name) for name in self._coupled}
        stacked = any(states[name].ndim > self._default(name).ndim for name in self._coupled)
        if not stacked:
            return states
        n_processes = states[self._coupled[0]].shape[0]
        merged = {name: value[0] for name, value in states.items()}
        for rank in range(1, n_processes):
            merged = self.merge_coupled(merged, {n: value[rank] for n, value in states.items()})
        return merged

    def add_rows(self, name: str, rows: Tensor) -> None:
        """Append rows to a rows state."""
        getattr(self, name).append(rows)

    def rows(self, name: str) -> Tensor:
        """Return a rows state as one tensor, empty before the first rows."""
        value = getattr(self, name)
        if isinstance(value, Tensor):
            return value
        return torch.cat(value) if value else self._empty_rows[name].to(self.device)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add another metric's states, as if its data had come after this one's.

        Raises:
            ValueError: the other metric is of another class, or its states have other shapes.
        """
        other = incoming_state
        if isinstance(other, Metric):
            if type(other) is not type(self):
                raise ValueError(
                    f"cannot merge a {type(other).__name__} into a {type(self).__name__}: "
                    "only metrics of the same class hold the same states"
                )
            self._update_count += other._update_count
            other = other.metric_state
        self._check_shapes(other)
        self._set_merged({name: getattr(self, name) for name in self._defaults}, other)
        self._computed = None

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Merge for ``forward``, where the incoming states hold the earlier data."""
        self._set_merged(incoming_state, {name: getattr(self, name) for name in self._defaults})

    def _set_merged(self, first: dict[str, Any], second: dict[str, Any]) -> None:
        merged: dict[str, Any] = {}
        if self._coupled:
            merged.update(
                self.merge_coupled(
                    {name: first[name] for name in self._coupled},
                    {name: second[name] for name in self._coupled},
                )
            )
        for name, reduction in self._reductions.items():
            if name in merged:
                continue
            if reduction is dim_zero_cat:
                merged[name] = [*_as_list(first[name]), *_as_list(second[name])]
            elif callable(reduction):
                merged[name] = reduction(torch.stack([first[name], second[name]]))
        for name, value in merged.items():
            setattr(self, name, value)

    def _wrap_compute(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        """Protect the record from torchmetrics's clean-up by a box.

        That clean-up rejects frozen dataclasses, and would turn a tensor for one latent, shape
        ``[1]``, into a scalar.
        """

        def boxed_compute(*args: Any, **kwargs: Any) -> _Box:
            if not self.update_called and self._is_empty():
                raise ValueError(
                    f"{type(self).__name__} has seen no data: call update before compute"
                )
            return _Box(compute(*args, **kwargs))

        wrapped = super()._wrap_compute(boxed_compute)

        @functools.wraps(compute)
        def unboxed_compute(*args: Any, **kwargs: Any) -> Any:
            with warnings.catch_warnings():
                # Said as an error, and only where it is true: merged data is data.
                warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
                return wrapped(*args, **kwargs).record

        return unboxed_compute

    def _is_empty(self) -> bool:
        """Return whether no state has data, its own, merged, loaded or from another process."""
        for name, default in self._defaults.items():
            value = getattr(self, name)
            if isinstance(default, list):
                if any(len(rows) for rows in _as_list(value)):
                    return False
            elif not bool(((value == default) | (value.isnan() & default.isnan())).all()):
                return False
        return True

    def _check_shapes(self, other: dict[str, Any]) -> None:
        for name in self._defaults:
            if name not in other:
                raise ValueError(
                    f"cannot merge: the incoming state has no {name!r}, only {sorted(other)}"
                )
            mine, theirs = getattr(self, name), other[name]
            if isinstance(mine, Tensor) and mine.shape != theirs.shape:
                raise ValueError(
                    f"cannot merge {type(self).__name__}: state {name!r} has shape "
                    f"{tuple(mine.shape)} here and {tuple(theirs.shape)} there; "
                    "build both metrics with the same sizes"
                )

    def _default(self, name: str) -> Tensor:
        default = self._defaults[name]
        assert isinstance(default, Tensor)
        return default

    def _sync_dist(
        self,
        dist_sync_fn: Callable[..., Any] = gather_all_tensors,
        process_group: Any | None = None,
    ) -> None:
        """Gather from all processes; a process without data still sends rows of the right width."""
        for name, empty in self._empty_rows.items():
            if isinstance(getattr(self, name), list) and not getattr(self, name):
                setattr(self, name, [empty.to(self.device)])
        super()._sync_dist(dist_sync_fn, process_group)


class _Box:
    """Hold a metric's result where torchmetrics does not look inside it."""

    def __init__(self, record: Any) -> None:
        self.record = record


def _drawn(result: Any) -> dict[str, Tensor]:
    return {name: torch.tensor(float(value)) for name, value in headline_of(result).items()}


def _as_list(value: Tensor | list[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else value
