"""The result of every metric: a frozen record that a person and a JSON file can both read."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = ["MetricResult", "headline_of", "summary_of", "to_json"]

RARE_BELOW = 10
"""A latent that fires, but on fewer images (or tokens) than this, counts as rare."""


class MetricResult:
    """Base of the result records. Subclasses are frozen dataclasses.

    A subclass chooses the numbers of a table by overriding :meth:`summary`, and may name in
    ``headline`` the most important of them. NaN stands for "undefined" in tensors and summaries;
    the number of undefined entries is always reported beside it.

    ``torch.stack`` takes each result for its main number. torchmetrics' ``MetricTracker`` and
    ``BootStrapper`` stack results, and so they work with these metrics.

    Examples:
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> metric = vp.metrics.FVU(d_in=2)
        >>> metric.update(x, 0.5 * x)
        >>> found = metric.compute()
        >>> isinstance(found, vp.metrics.MetricResult), found.summary()["explained_variance"]
        (True, 0.75)
    """

    headline: ClassVar[tuple[str, ...]] = ()
    """Entries of the summary that a table with many metrics shows; all of them by default."""
    main: ClassVar[str] = ""
    """Entry of ``headline`` that ``higher_is_better`` is about; by default its first."""

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Stack the main numbers of results."""
        if func is not torch.stack:
            return NotImplemented
        results: Sequence[Any] = args[0]
        return torch.stack([torch.tensor(main_of(r)) for r in results], *args[1:], **kwargs or {})

    def summary(self) -> dict[str, float | int]:
        """Return the scalars worth a row in a table, by name."""
        return {
            field.name: value
            for field in dataclasses.fields(self)  # type: ignore[arg-type]
            if isinstance(value := getattr(self, field.name), (bool, int, float))
        }

    def to_dict(self) -> dict[str, Any]:
        """Return every field as plain JSON types; NaN and infinities become ``None``."""
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        return {field.name: to_json(getattr(self, field.name)) for field in fields}


def summary_of(result: Any) -> dict[str, float | int]:
    """Return the scalars of a metric's result: a record, a mapping, a number or a tensor.

    A tensor with an entry per latent gives ``mean_score`` over the entries that are not NaN, and
    ``n_undefined``.

    Args:
        result: what the metric's ``compute`` returned.

    Raises:
        TypeError: the result holds no number.

    Examples:
        >>> vp.metrics.summary_of(torch.tensor([1.0, 0.0, float("nan")]))
        {'mean_score': 0.5, 'n_undefined': 1}
    """
    if isinstance(result, MetricResult):
        return result.summary()
    if isinstance(result, Mapping):
        numbers = {str(name): _number(value) for name, value in result.items()}
        found = {name: value for name, value in numbers.items() if value is not None}
    elif isinstance(result, Tensor) and result.numel() != 1:
        values = result.detach().double().flatten()
        found = {"mean_score": mean_of_defined(values), "n_undefined": int(values.isnan().sum())}
    else:
        number = _number(result)
        found = {} if number is None else {"value": number}
    if not found:
        raise TypeError(
            f"a metric returned {type(result).__name__}, which holds no number: return a "
            "MetricResult, a mapping of numbers, a number or a tensor"
        )
    return found


def headline_of(result: Any) -> dict[str, float | int]:
    """Return the few entries of the summary that a table shows.

    Args:
        result: a metric's result, as for :func:`summary_of`.

    Examples:
        >>> latents = torch.tensor([[1.0], [1.0], [0.0]])
        >>> found = vp.metrics.monosemanticity(latents, torch.eye(2)[[0, 0, 1]])
        >>> vp.metrics.headline_of(found)["mean_score"]
        1.0
    """
    numbers = summary_of(result)
    names = getattr(result, "headline", ())
    return {name: numbers[name] for name in names if name in numbers} or numbers


def main_of(result: Any) -> float | int:
    """Return the one number that stands for a result."""
    numbers = headline_of(result)
    return numbers[getattr(result, "main", "") or next(iter(numbers))]


def _number(value: Any) -> float | int | None:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return value if isinstance(value, (bool, int, float)) else None


def to_json(value: Any) -> Any:
    """Return tensors, tuples, mappings and records as types that strict JSON can hold.

    Args:
        value: anything that a result holds.

    Examples:
        >>> vp.metrics.to_json({"score": torch.tensor([1.0, float("nan")])})
        {'score': [1.0, None]}
    """
    if isinstance(value, MetricResult):
        return value.to_dict()
    if isinstance(value, Tensor):
        return to_json(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    return value


def mean_of_defined(values: Tensor) -> float:
    """Return the mean over the entries that are not NaN, NaN when there is none."""
    defined = values[~values.isnan()]
    return float(defined.double().mean()) if defined.numel() else math.nan


def median_of_defined(values: Tensor) -> float:
    """Return the median (mean of the two middle values) of the entries that are not NaN."""
    defined = values[~values.isnan()].double().sort().values
    count = defined.numel()
    return float((defined[(count - 1) // 2] + defined[count // 2]) / 2) if count else math.nan
