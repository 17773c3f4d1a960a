"""The open list of metrics: every installed package may add to it.

A package lists its metric classes under the entry-point group ``vision_plugin.metrics``:

    [project.entry-points."vision_plugin.metrics"]
    my_metric = "my_package.metrics:MyMetric"

A metric is a ``torchmetrics.Metric``. The names of its parameters say what it needs. Whoever runs
it (``vision-plugin eval``, an evaluator during training, :class:`MetricSet`) passes values of those
names. The constructor's parameters take what is known before the data:

    n_features, d_in, d_embed    latents, width of the activations, width of the embeddings
    grid_size, token_kinds       rows and columns of patches; kind of each token of an image
    model, sae, tokens           the model and SAE under study, and the kind of token
    text_embeddings, concepts    a vocabulary; class_names: the classes behind the labels
    taxonomy_paths, groups, sibling_groups, domains, n_concepts

and the parameters of ``update`` take entries of each batch of ``n`` images:

    latents                      image-level ``[n, n_features]``; see below
    activations, reconstruction  ``[n, tokens, d_in]``
    embeddings                   ``[n, d_embed]`` by an outside encoder
    labels, masks, pixels, image_ids
    logits, spliced_logits, ablated_logits    zero-shot, ``[n, classes]``
    decoder, other               directions of two dictionaries, without any image

A class that wants latents before they are reduced to one row per image sets a class attribute:
``latents_per = "token"`` for ``[n, tokens, n_features]`` or ``latents_per = "patch"`` for
``[n, patches, n_features]``, patches alone. Batches carry these as ``token_latents`` and
``patch_latents``.

A class whose ``update`` also takes sparse COO latents sets ``sparse_latents = True``. Where the
dictionary gives sparse latents, it gets ``[n, n_features]`` for images, and
``[n * tokens, n_features]`` for tokens or patches, image by image: wide dictionaries are scored
without dense latents. Batches carry these as ``sparse_latents``, ``sparse_token_latents`` and
``sparse_patch_latents``; dense latents are made only for metrics that ask for them.

``compute`` returns a :class:`MetricResult`, a mapping of numbers, a number, or a tensor with an
entry per latent.
"""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from torchmetrics import Metric

__all__ = ["MetricInfo", "available", "build", "feed", "get", "needs", "takes"]

logger = logging.getLogger(__name__)

GROUP = "vision_plugin.metrics"


@dataclass(frozen=True)
class MetricInfo:
    """One registered metric.

    Attributes:
        name: name that :func:`get` takes.
        target: where the class is, as ``module:Class``.
        package: name and version of the distribution that registered it.
        error: why it cannot be used; None when it can.

    Examples:
        >>> found = vp.metrics.available()["fvu"]
        >>> found.name, found.usable
        ('fvu', True)
    """

    name: str
    target: str
    package: str
    error: str | None = None

    @property
    def usable(self) -> bool:
        """Return whether :func:`get` will return a class."""
        return self.error is None


def available() -> dict[str, MetricInfo]:
    """Return every registered metric by name, ours and other packages'.

    A metric that cannot be imported, is no ``torchmetrics.Metric``, or shares its name with another
    one is listed with its ``error``, which is also logged; it breaks nothing else.

    Examples:
        >>> "monosemanticity" in vp.metrics.available()
        True
    """
    found: dict[str, MetricInfo] = {}
    for name, points in sorted(_points().items()):
        _, error = _load(name, points)
        found[name] = MetricInfo(
            name, points[0].value, ", ".join(_package(point) for point in points), error
        )
        if error is not None:
            logger.warning("metric %r cannot be used: %s", name, error)
    return found


def get(name: str) -> type[Metric]:
    """Return the metric class registered under a name.

    Args:
        name: a name that :func:`available` lists.

    Raises:
        ValueError: no metric has this name; the message lists near ones.
        ImportError: the metric is registered, but broken.

    Examples:
        >>> vp.metrics.get("monosemanticity").__name__
        'Monosemanticity'
    """
    points = _points()
    if name not in points:
        near = difflib.get_close_matches(name, points, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "no name is near;"
        raise ValueError(f"no metric is named {name!r}: {hint} installed are {sorted(points)}")
    metric, error = _load(name, points[name])
    if metric is None:
        raise ImportError(f"metric {name!r} of {_package(points[name][0])} is broken: {error}")
    return metric


def build(metric: str | type[Metric], known: Mapping[str, Any]) -> Metric:
    """Return a metric, built from the known values that its constructor names.

    Args:
        metric: a registered name, or a class.
        known: values by parameter name; those that the constructor does not name are ignored.

    Raises:
        ValueError: a required parameter is not known.

    Examples:
        >>> metric = vp.metrics.build("fvu", {"d_in": 2, "n_features": 8})
        >>> type(metric).__name__
        'FVU'
    """
    found = get(metric) if isinstance(metric, str) else metric
    who = f"metric {metric!r}" if isinstance(metric, str) else metric.__name__
    return found(**_arguments(found.__init__, known, who))


def feed(metric: Any, batch: Mapping[str, Any]) -> None:
    """Update a metric with the entries of a batch that its ``update`` names.

    Args:
        metric: any object with an ``update``.
        batch: values by name; those that ``update`` does not name are ignored.

    Raises:
        ValueError: a required value is not in the batch.

    Examples:
        >>> metric = vp.metrics.FVU(d_in=2)
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> vp.metrics.feed(metric, {"activations": x, "reconstruction": x, "labels": None})
        >>> metric.compute().mse
        0.0
    """
    who = f"{type(metric).__name__}.update"
    names = _batch_names(type(metric))
    if getattr(metric, "sparse_latents", False):
        sparse = f"sparse_{names.get('latents', 'latents')}"
        names = {**names, "latents": sparse} if sparse in batch else names
    metric.update(**_arguments(type(metric).update, batch, who, names))


def needs(metric: str | type[Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names a metric requires: parameters of its constructor, entries of a batch.

    Args:
        metric: a registered name, or a class.

    Examples:
        >>> vp.metrics.needs("monosemanticity")
        (('n_features', 'd_embed'), ('latents', 'embeddings'))
    """
    metric = get(metric) if isinstance(metric, str) else metric
    names = _batch_names(metric)
    wanted = tuple(names.get(item, item) for item in _required(metric.update))
    return _required(metric.__init__), wanted


def takes(metric: str | type[Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names a metric uses, required and optional, in the form of :func:`needs`.

    Args:
        metric: a registered name, or a class.

    Examples:
        >>> vp.metrics.takes("fvu")
        (('d_in', 'definition'), ('activations', 'reconstruction'))
    """
    metric = get(metric) if isinstance(metric, str) else metric
    names = _batch_names(metric)
    used = tuple(names.get(item.name, item.name) for item in _parameters(metric.update))
    return tuple(item.name for item in _parameters(metric.__init__)), used


def _batch_names(metric: type[Any]) -> dict[str, str]:
    """Return the batch entries that are passed to parameters of another name."""
    level = getattr(metric, "latents_per", "image")
    levels = {"image": {}, "token": {"latents": "token_latents"}}
    levels["patch"] = {"latents": "patch_latents"}
    if level not in levels:
        raise ValueError(
            f"{metric.__name__}.latents_per is {level!r}; it must be one of {sorted(levels)}"
        )
    return levels[level]


def _points() -> dict[str, list[EntryPoint]]:
    points: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        same = points.setdefault(point.name, [])
        # A path that lists a distribution twice (an editable install beside its metadata) is no
        # clash.
        if all(point.value != other.value for other in same):
            same.append(point)
    return points


def _package(point: EntryPoint) -> str:
    return f"{point.dist.name} {point.dist.version}" if point.dist else "an unnamed package"


def _load(name: str, points: list[EntryPoint]) -> tuple[type[Metric] | None, str | None]:
    if len(points) > 1:
        owners = " and ".join(f"{point.value} of {_package(point)}" for point in points)
        return None, f"two packages register {name!r}: {owners}; uninstall one"
    try:
        loaded = points[0].load()
    except Exception as error:
        # Another package's code runs here, and whatever it raises must not take ours down.
        return None, f"importing {points[0].value} raised {type(error).__name__}: {error}"
    if not (isinstance(loaded, type) and issubclass(loaded, Metric)):
        return None, f"{points[0].value} is {loaded!r}, not a subclass of torchmetrics.Metric"
    return loaded, None


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return [item for item in parameters if item.kind in named and item.name != "self"]


def _required(function: Callable[..., Any]) -> tuple[str, ...]:
    parameters = _parameters(function)
    return tuple(item.name for item in parameters if item.default is inspect.Parameter.empty)


def _arguments(
    function: Callable[..., Any],
    known: Mapping[str, Any],
    who: str,
    names: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    names = names or {}
    missing = [
        names.get(name, name) for name in _required(function) if names.get(name, name) not in known
    ]
    if missing:
        raise ValueError(f"{who} needs {missing}, but was given only {sorted(known)}")
    pairs = ((item.name, names.get(item.name, item.name)) for item in _parameters(function))
    return {name: known[source] for name, source in pairs if source in known}
