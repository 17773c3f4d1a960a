"""Hierarchy: how deep in a taxonomy do a latent's top images meet? (arXiv 2504.02821)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin.metrics._latents import read_latents
from vision_plugin.metrics._result import MetricResult, mean_of_defined
from vision_plugin.metrics._taxonomy import TaxonomyPaths, prefix_numbers
from vision_plugin.metrics._topimages import TopImages

__all__ = ["Hierarchy", "HierarchyResult", "frequency_groups", "hierarchy", "matryoshka_groups"]

LATENTS_AT_ONCE = 2**14


@dataclass(frozen=True)
class HierarchyResult(MetricResult):
    """Depth of the lowest common ancestors of top images.

    Attributes:
        depth: each latent's mean depth over pairs of its top images; 0 when they share nothing
            but the root, NaN for a latent left out.
        group_depth: mean depth of the latents of each group.
        group_size: number of latents in each group's mean.
        frequency_depth: mean depth of the latents of similar firing frequency, by its power of ten;
            empty where the frequency is not known.
        frequency_size: number of latents in each of these means.
        chance_depth: mean depth over all pairs of images, the depth of random images.
        n_left_out: number of latents with fewer positive images than ``n_top``.

    Examples:
        >>> paths = [("animal", "bird"), ("animal", "bird"), ("animal", "fish"), ("plant", "fern")]
        >>> found = vp.metrics.hierarchy(torch.tensor([[0, 1], [0, 2], [0, 3]]), paths)
        >>> found.group_depth, round(found.chance_depth, 3)
        ({0: 1.0}, 0.667)
    """

    depth: Float[Tensor, " k"]
    group_depth: dict[int, float]
    group_size: dict[int, int]
    frequency_depth: dict[int, float]
    frequency_size: dict[int, int]
    chance_depth: float
    n_left_out: int

    @property
    def score(self) -> Float[Tensor, " k"]:
        """Return the mean depth of each latent."""
        return self.depth

    def summary(self) -> dict[str, float | int]:
        """Return the mean depth, by group and frequency where known, and the counts."""
        groups = {f"depth_group_{group}": depth for group, depth in self.group_depth.items()}
        rates = {f"depth_1e{power}": depth for power, depth in self.frequency_depth.items()}
        return {
            "mean_depth": mean_of_defined(self.depth),
            **(groups if len(groups) > 1 else {}),
            **{name: depth for name, depth in rates.items() if not math.isnan(depth)},
            "chance_depth": self.chance_depth,
            "n_features": self.depth.numel(),
            "n_left_out": self.n_left_out,
        }


def hierarchy(
    top_images: Int[Tensor, "k n_top"],
    taxonomy_paths: TaxonomyPaths,
    groups: Int[Tensor, " groups"] | None = None,
    *,
    frequency: Float[Tensor, " k"] | None = None,
) -> HierarchyResult:
    """Return the mean depth at which the paths of each latent's top images split.

    The depth of the lowest common ancestor of two images is the number of leading steps that their
    paths share. In a Matryoshka SAE the early groups should meet high up, the late ones deep down.

    Args:
        top_images: image numbers ``[k, n_top]``, -1 for none, as :func:`top_images` returns them.
            Latents with a -1 are left out: they fire on too few images.
        taxonomy_paths: a path per image, broadest step first; lengths may differ.
        groups: a group number per latent, from :func:`matryoshka_groups` or
            :func:`frequency_groups`; one group by default.
        frequency: share of the images on which each latent fires, for the depth by frequency.

    Raises:
        ValueError: an image has no path, or ``groups`` has another length.

    Examples:
        >>> paths = [("animal", "bird"), ("animal", "bird"), ("animal", "fish"), ("plant", "fern")]
        >>> vp.metrics.hierarchy(torch.tensor([[0, 1], [0, 2], [0, 3]]), paths).depth.tolist()
        [2.0, 1.0, 0.0]
    """
    k, n_top = top_images.shape
    if n_top < 2:
        raise ValueError(f"top_images= has lists of length {n_top}; pairs need at least 2 images")
    if int(top_images.max()) >= len(taxonomy_paths):
        raise ValueError(
            f"image {int(top_images.max())} is among the top images, but there are only "
            f"{len(taxonomy_paths)} taxonomy paths; pass one per image, in the same order"
        )
    if groups is None:
        groups = torch.zeros(k, dtype=torch.int64)
    if groups.shape != (k,):
        raise ValueError(f"groups= has shape {tuple(groups.shape)}, but there are {k} latents")
    nodes = prefix_numbers(taxonomy_paths)
    full = (top_images >= 0).all(1).cpu()
    depth = torch.full((k,), math.nan, dtype=torch.float64)
    for part in torch.split(full.nonzero().squeeze(1), LATENTS_AT_ONCE):
        depth[part] = _mean_shared_steps(nodes[top_images.cpu()[part]])
    means, sizes = _by_group(depth, groups)
    rates = ({}, {}) if frequency is None else _by_group(depth, frequency_groups(frequency))
    return HierarchyResult(
        depth=depth,
        group_depth=means,
        group_size=sizes,
        frequency_depth=rates[0],
        frequency_size=rates[1],
        chance_depth=_chance_depth(nodes),
        n_left_out=int((~full).sum()),
    )


def matryoshka_groups(widths: Sequence[int]) -> Int[Tensor, " k"]:
    """Number the latents by Matryoshka group, from the cumulative widths of the nested SAEs.

    Args:
        widths: numbers of latents of the nested SAEs, growing.

    Raises:
        ValueError: the widths are not positive and growing.

    Examples:
        >>> vp.metrics.matryoshka_groups([2, 5]).tolist()
        [0, 0, 1, 1, 1]
    """
    steps = [stop - start for start, stop in zip([0, *widths], widths, strict=False)]
    if not steps or min(steps) < 1:
        raise ValueError(f"widths {list(widths)} must be positive and growing")
    return torch.arange(len(steps)).repeat_interleave(torch.tensor(steps))


def frequency_groups(frequency: Float[Tensor, " k"]) -> Int[Tensor, " k"]:
    """Number the latents by the power of ten of their firing frequency (dead ones: -99).

    Args:
        frequency: share of the images on which each latent fires, ``[k]``.

    Examples:
        >>> vp.metrics.frequency_groups(torch.tensor([0.5, 0.02, 0.0])).tolist()
        [-1, -2, -99]
    """
    decade = frequency.double().log10().floor().clamp(min=-99)
    return decade.long()


class Hierarchy(TopImages):
    """Depth at which the paths of each latent's top images split, streamed; see :func:`hierarchy`.

    Args:
        n_features: number of latents.
        taxonomy_paths: a path per image, in the order in which the images come.
        groups: a group number per latent; one group by default.
        n_top: number of top images per latent, 16 in the paper.

    Examples:
        >>> paths = [("animal", "bird"), ("animal", "bird"), ("plant", "fern")]
        >>> metric = vp.metrics.Hierarchy(n_features=2, taxonomy_paths=paths, n_top=2)
        >>> metric.update(torch.tensor([[2.0, 2.0], [1.0, 0.0], [0.0, 1.0]]))
        >>> metric.compute().depth.tolist()
        [2.0, 0.0]
    """

    n_active: Tensor

    def __init__(
        self,
        *,
        n_features: int,
        taxonomy_paths: TaxonomyPaths,
        groups: Int[Tensor, " k"] | None = None,
        n_top: int = 16,
        **kwargs: Any,
    ) -> None:
        super().__init__(n_features=n_features, n_top=n_top, **kwargs)
        self.taxonomy_paths, self.groups = taxonomy_paths, groups
        self.add_state("n_active", torch.zeros(n_features).long(), dist_reduce_fx="sum")

    def update(self, latents: Tensor) -> None:
        """Add images by their latents ``[n, n_features]``, dense, sparse COO or sparse CSR."""
        read = read_latents(latents.detach().to(self.device), n_features=self.n_features)
        self.n_active += (read != 0).sum(0) if isinstance(read, Tensor) else read.counts()
        super().update(latents)

    def compute(self) -> HierarchyResult:
        """Return the depths for the top images of all data seen, by all processes."""
        top = self.top()
        frequency = self.n_active.double() / max(1, top.n_images)
        return hierarchy(top.images, self.taxonomy_paths, self.groups, frequency=frequency)


def _by_group(depth: Tensor, groups: Tensor) -> tuple[dict[int, float], dict[int, int]]:
    """Return the mean of the defined depths of each group, and their number."""
    means, sizes = {}, {}
    for group in sorted(set(groups.tolist())):
        members = depth[groups.cpu() == group]
        means[group] = mean_of_defined(members)
        sizes[group] = int((~members.isnan()).sum())
    return means, sizes


def _mean_shared_steps(nodes: Tensor) -> Tensor:
    """Return the mean number of shared leading steps over pairs; nodes ``[k, n_top, depth]``."""
    n_top = nodes.shape[1]
    shared = torch.zeros(nodes.shape[0], dtype=torch.int64)
    for level in range(nodes.shape[2]):
        at = nodes[:, :, level]
        same = (at[:, :, None] == at[:, None, :]) & (at >= 0)[:, :, None]
        shared += (same.sum((1, 2)) - (at >= 0).sum(1)) // 2
    return shared.double() / (n_top * (n_top - 1) / 2)


def _chance_depth(nodes: Tensor) -> float:
    n_images = nodes.shape[0]
    if n_images < 2:
        return math.nan
    members = torch.bincount(nodes[nodes >= 0])
    return float((members * (members - 1)).sum()) / (n_images * (n_images - 1))
