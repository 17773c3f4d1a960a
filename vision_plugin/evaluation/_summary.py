"""The numbers of an evaluation, arranged for a table: by metric, by number, by dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

DICTIONARY_TITLES: Mapping[str, str] = MappingProxyType(
    {
        "sae": "SAE",
        "pca": "PCA",
        "random": "random directions",
        "random_model": "random model's neurons",
    }
)
"""Headings of the dictionaries of an evaluation; others are called by their own name.

Examples:
    >>> vp.evaluation.DICTIONARY_TITLES["random"]
    'random directions'
"""


def summary_by_metric(
    summary: Mapping[str, Mapping[str, Any]],
) -> tuple[list[str], dict[str, dict[str, dict[str, Any]]]]:
    """Return the dictionaries of a summary, the SAE first, and its numbers.

    Examples:
        >>> found = vp.evaluation.summary_by_metric(
        ...     {"fvu/sae": {"fvu": 0.1}, "fvu/pca": {"fvu": 0.3}}
        ... )
        >>> found[0], found[1]["fvu"]["fvu"]
        (['sae', 'pca'], {'sae': 0.1, 'pca': 0.3})

    Args:
        summary: Numbers by ``"metric/dictionary"``, as ``evaluation.json`` has them.

    Returns:
        Names of the dictionaries, and values by metric, number and dictionary.
    """
    dictionaries: dict[str, None] = {"sae": None}
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for key, numbers in summary.items():
        metric, _, dictionary = key.rpartition("/")
        dictionaries[dictionary] = None
        for name, value in numbers.items():
            found.setdefault(metric, {}).setdefault(name, {})[dictionary] = value
    return list(dictionaries), found
