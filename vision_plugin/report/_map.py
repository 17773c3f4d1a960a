"""Features in two dimensions: UMAP where it is installed, else principal components."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

logger = logging.getLogger(__name__)

METHODS = ("auto", "umap", "pca", "none")
_NEIGHBOURS = 15


@dataclass(frozen=True)
class FeatureMap:
    """A place in the unit square for each feature."""

    method: str
    note: str
    points: Float[np.ndarray, "features 2"]


@torch.no_grad()
def feature_map(sae: Any, features: list[int], method: str) -> FeatureMap | None:
    """Lay features out by their decoder directions.

    Args:
        sae: A ``sae_lens.SAE``.
        features: Numbers of the latents.
        method: ``"umap"``, ``"pca"``, ``"auto"`` (UMAP where it is installed), or ``"none"``.

    Returns:
        None where it is not wanted, there is no decoder matrix, or there are fewer than 3 features.

    Raises:
        ValueError: the method is unknown, or UMAP is asked for and not installed.
    """
    if method not in METHODS:
        raise ValueError(f"layout={method!r}: use one of {', '.join(METHODS)}")
    decoder = getattr(sae, "W_dec", None)
    if method == "none" or len(features) < 3 or not isinstance(decoder, Tensor):
        return None
    if decoder.ndim != 2 or len(decoder) != sae.cfg.d_sae:
        return None
    rows = decoder.detach().float().cpu()[features]
    unit = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    has_umap = find_spec("umap") is not None
    if method == "umap" and not has_umap:
        raise ValueError(
            "layout='umap' needs umap-learn: pip install 'vision-plugin[map]', or layout='pca'"
        )
    if has_umap and method != "pca" and len(features) > _NEIGHBOURS:
        import umap

        # The same map in every run takes one thread, and umap warns unless it is told so.
        layout = umap.UMAP(n_neighbors=_NEIGHBOURS, metric="cosine", random_state=0, n_jobs=1)
        found = layout.fit_transform(unit.numpy())
        note = f"UMAP of the decoder directions, cosine, {_NEIGHBOURS} neighbours"
        return FeatureMap("UMAP", note, _unit_square(np.asarray(found, dtype=np.float64)))
    centred = (unit - unit.mean(0)).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    axes = vectors[:, -2:].flip(1)
    # The sign of a component is arbitrary: its largest entry is positive, in every run.
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    share = float(values[-2:].sum() / values.sum().clamp(min=1e-30))
    note = f"Two principal components of the decoder directions: {share:.0%} of their variance"
    return FeatureMap("PCA", note, _unit_square((centred @ axes).numpy()))


def _unit_square(points: np.ndarray[Any, np.dtype[np.float64]]) -> Any:
    low, high = points.min(0), points.max(0)
    span = float((high - low).max()) or 1.0
    middle = (low + high) / 2
    return (points - middle) / span + 0.5
