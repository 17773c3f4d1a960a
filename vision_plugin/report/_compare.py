"""Two dictionaries side by side: which features both have, and which one has alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vision_plugin.metrics import neuron_dictionary
from vision_plugin.report._columns import states_of
from vision_plugin.report._content import Content
from vision_plugin.report._inputs import clean
from vision_plugin.report._numbers import plain
from vision_plugin.report._passes import Counted
from vision_plugin.report._together import partners

N_IMAGES = 6
NEURONS = "neurons"


@dataclass(frozen=True)
class Other:
    """A dictionary that is compared with the SAE of the report."""

    name: str
    dictionary: Any
    counted: Counted


def read_compare(compare: Any, sae: Any) -> dict[str, Any]:
    """Return dictionaries by name.

    Args:
        compare: A mapping from names to dictionaries, one dictionary, ``"neurons"``, or None.
        sae: The SAE of the report.

    Raises:
        ValueError: a text is not ``"neurons"``, or two names read alike.
    """
    if compare is None:
        return {}
    if isinstance(compare, str):
        compare = {compare: compare}
    elif not isinstance(compare, Mapping):
        compare = {"the other": compare}
    found: dict[str, Any] = {}
    for name, one in compare.items():
        if isinstance(one, str):
            if one != NEURONS:
                raise ValueError(
                    f"compare={one!r}: give an SAE, a mapping from names, or 'neurons'"
                )
            metadata = sae.cfg.metadata
            tokens = metadata.get("tokens") or "all"
            one = neuron_dictionary(int(sae.cfg.d_in)).at(metadata.get("hook_name"), tokens=tokens)
        if clean(name) in found:
            raise ValueError(f"compare= has two names that read {clean(name)!r}: rename one")
        found[clean(name)] = one
    return found


def top_images_of(others: list[Other]) -> list[int]:
    """Return the images that the comparison shows of the other dictionaries."""
    shown: set[int] = set()
    for other in others:
        shown |= set(other.counted.summary.top.images[:, :N_IMAGES].flatten().tolist())
    return sorted(shown - {-1})


def compare_data(content: Content, sae: Any, others: list[Other]) -> list[dict[str, Any]]:
    """Return the matches and the columns of every other dictionary."""
    return [_one(content, sae, other) for other in others]


def _one(content: Content, sae: Any, other: Other) -> dict[str, Any]:
    summary, slots = other.counted.summary, content.writer.small.slots
    written = content.writer.written
    everything = list(range(summary.d_sae))
    forth = partners(content.counted.kept, content.features, other.counted.kept, 1)
    back = partners(other.counted.kept, everything, content.counted.kept, 1)
    images = [
        [slots[number] for number in row if number in written]
        for row in summary.top.images[:, :N_IMAGES].tolist()
    ]
    by_cosine = _nearest(sae, other.dictionary, content.features)
    return {
        "name": other.name,
        "n": summary.d_sae,
        "n_images": content.counted.kept.n_images,
        "states": states_of(other.counted).tolist(),
        "columns": {
            "frequency": [plain(float(v)) for v in summary.frequency],
            "max": [plain(float(v)) for v in summary.top.values[:, 0]],
        },
        "images": images,
        "correlation": None
        if forth is None or back is None
        else {
            "forth": _pairs(forth.latents[:, 0], forth.correlations[:, 0]),
            "back": _pairs(back.latents[:, 0], back.correlations[:, 0]),
        },
        "cosine": by_cosine,
    }


def _pairs(latents: Any, values: Any) -> list[list[float | int | None]]:
    pairs = zip(np.asarray(latents).tolist(), np.asarray(values).tolist(), strict=True)
    return [[latent, plain(value, 4)] for latent, value in pairs]


@torch.no_grad()
def _nearest(sae: Any, other: Any, features: list[int]) -> dict[str, Any] | None:
    """Return each latent's nearest of the other by cosine, both ways; None without decoders."""
    decoders = [getattr(one, "W_dec", None) for one in (sae, other)]
    if not all(isinstance(d, Tensor) and d.ndim == 2 for d in decoders):
        return None
    first, second = (d.detach().float().cpu() for d in decoders if d is not None)
    if first.shape[1] != second.shape[1] or _hook(sae) != _hook(other):
        return None
    first, second = (
        rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12) for rows in (first, second)
    )
    first = first[features]
    forth = torch.full((len(first),), -2.0), torch.zeros(len(first), dtype=torch.int64)
    back = torch.full((len(second),), -2.0), torch.zeros(len(second), dtype=torch.int64)
    for start in range(0, len(first), 4096):
        cosines = first[start : start + 4096] @ second.T
        best = cosines.max(1)
        forth[0][start : start + 4096], forth[1][start : start + 4096] = best
        best = cosines.max(0)
        better = best.values > back[0]
        back[0][better] = best.values[better]
        back[1][better] = torch.tensor(features)[best.indices[better] + start]
    return {"forth": _pairs(forth[1], forth[0]), "back": _pairs(back[1], back[0])}


def _hook(dictionary: Any) -> Any:
    return dictionary.cfg.metadata.get("hook_name")
