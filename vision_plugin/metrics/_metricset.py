"""Several registered metrics, updated with the same batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchmetrics import Metric

from vision_plugin.metrics._registry import build, feed, get, needs, takes
from vision_plugin.metrics._result import summary_of

__all__ = ["MetricSet"]


class MetricSet:
    """Several metrics by name; each takes from a batch the entries that its ``update`` names.

    An evaluator, after or during training, needs nothing else.

    Args:
        names: registered names; see :func:`available`.
        known: constructor arguments by name, such as ``n_features``; a metric takes those it names.
        options: further constructor arguments for single metrics, by the metric's name.

    Raises:
        ValueError: a metric is unknown, lacks an argument, or has no such option.

    Examples:
        >>> scores = vp.metrics.MetricSet(["monosemanticity"], {"n_features": 2, "d_embed": 2})
        >>> three = torch.eye(2)[[0, 0, 1]]
        >>> scores.update({"latents": three, "embeddings": three})
        >>> scores.scalars()["monosemanticity/n_rare"]
        2
    """

    def __init__(
        self,
        names: Sequence[str],
        known: Mapping[str, Any],
        *,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        options = options or {}
        self.metrics: dict[str, Metric] = {}
        for name in names:
            own, metric = options.get(name, {}), get(name)
            parameters, _ = takes(metric)
            unknown = sorted(set(own) - set(parameters))
            if unknown:
                raise ValueError(
                    f"metric {name!r} has no option {unknown[0]!r}; it takes {list(parameters)}"
                )
            lacking = [item for item in needs(metric)[0] if item not in known and item not in own]
            if lacking:
                raise ValueError(f"metric {name!r} needs {lacking}; known are {sorted(known)}")
            self.metrics[name] = build(metric, {**known, **own})

    @classmethod
    def of(cls, metrics: Mapping[str, Any]) -> MetricSet:
        """Return a set of metrics that are already built.

        Args:
            metrics: Objects with ``update`` and ``compute``, by the name that the set gives them.
        """
        made = cls([], {})
        made.metrics.update(metrics)
        return made

    def update(self, batch: Mapping[str, Any]) -> None:
        """Feed every metric from one batch.

        Args:
            batch: values by name; see the docstring of ``_registry.py`` for the names in use.

        Raises:
            ValueError: the batch lacks an entry that a metric needs, or a metric refuses the batch.
        """
        for metric in self.metrics.values():
            feed(metric, batch)

    def merge_state(self, other: MetricSet) -> None:
        """Add another set's states, as if its data had come after this one's.

        Raises:
            ValueError: the other set holds other metrics.
        """
        if self.metrics.keys() != other.metrics.keys():
            raise ValueError(f"cannot merge {sorted(other.metrics)} into {sorted(self.metrics)}")
        for name, metric in self.metrics.items():
            metric.merge_state(other.metrics[name])

    def reset(self) -> None:
        """Forget all data."""
        for metric in self.metrics.values():
            metric.reset()

    def compute(self) -> dict[str, Any]:
        """Return each metric's result by name."""
        return {name: metric.compute() for name, metric in self.metrics.items()}

    def scalars(self) -> dict[str, float | int]:
        """Return all summaries as ``metric/number``, for a table or a logger."""
        return {
            f"{name}/{key}": value
            for name, result in self.compute().items()
            for key, value in summary_of(result).items()
        }
