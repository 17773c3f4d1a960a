"""Dissection: does a latent's heat map lie on a concept's mask?

Intersection over union as in network dissection (arXiv 1704.05796), and the pointing game
(arXiv 1608.00507).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vision_plugin.metrics._latents import (
    CHUNK_ELEMENTS,
    LatentColumns,
    Latents,
    read_latents,
)
from vision_plugin.metrics._result import MetricResult, mean_of_defined
from vision_plugin.metrics._streaming import StreamingMetric

__all__ = ["Dissection", "DissectionResult", "dissection", "quantile_thresholds"]

Upsample = Literal["nearest", "bilinear"]


@dataclass(frozen=True)
class DissectionResult(MetricResult):
    """Fit of ``k`` latents to ``c`` concepts.

    Attributes:
        iou: intersection over union of the active area and the mask, over all images, ``[k, c]``;
            NaN where both are empty.
        pointing: share of the images showing the concept, and on which the latent is active, where
            the latent's largest patch touches the mask, ``[k, c]``; NaN without such an image.
        n_trials: number of images behind ``pointing``, ``[k, c]``.
        chance: share of the patches that touch the mask in images showing the concept, ``[c]``: the
            pointing score of a random patch.
        best_concept: concept of the largest IoU, -1 for a latent without one, ``[k]``.
        best_iou: IoU with the best concept, ``[k]``.
        n_images: number of images seen.

    Examples:
        >>> maps = torch.tensor([[[1.0], [0], [0], [0]]])  # 1 image, 2 x 2 patches, 1 latent
        >>> mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
        >>> mask[..., :2, :] = True  # the concept fills the upper half
        >>> found = vp.metrics.dissection(maps, mask, grid_size=(2, 2))
        >>> found.best_concept.tolist(), found.chance.tolist()
        ([0], [0.5])
    """

    headline = ("mean_best_iou", "mean_pointing_at_best", "n_detectors", "n_concepts_found")

    iou: Float[Tensor, "k c"]
    pointing: Float[Tensor, "k c"]
    n_trials: Int[Tensor, "k c"]
    chance: Float[Tensor, " c"]
    best_concept: Int[Tensor, " k"]
    best_iou: Float[Tensor, " k"]
    n_images: int

    @property
    def score(self) -> Float[Tensor, " k"]:
        """Return the intersection over union with the best concept."""
        return self.best_iou

    def summary(self) -> dict[str, float | int]:
        """Return means over latents at their best concepts, and how many concepts are found."""
        found = self.best_iou > 0.04
        rows = (self.best_concept >= 0).nonzero().squeeze(1)
        pointing = self.pointing[rows, self.best_concept[rows]]
        return {
            "mean_best_iou": mean_of_defined(self.best_iou),
            "mean_pointing_at_best": mean_of_defined(pointing),
            "n_detectors": int(found.sum()),
            "n_concepts_found": len(set(self.best_concept[found].tolist())),
            "n_features": self.best_iou.numel(),
            "n_never_active": int((self.n_trials.sum(1) == 0).sum()),
            "n_images": self.n_images,
        }


class Dissection(StreamingMetric):
    """Intersection over union and pointing game of latent heat maps against concept masks.

    Args:
        n_features: number of latents, ``k``.
        n_concepts: number of masks per image, ``c``.
        grid_size: rows and columns of patches.
        threshold: activation above which a place is active: one number, or one per latent such as
            :func:`quantile_thresholds` returns. 0 suits sparse latents.
        upsample: interpolation of the patch grid to the masks' size.

    Examples:
        >>> maps = torch.tensor([[[1.0], [0], [0], [0]]])  # 1 image, 2 x 2 patches, 1 latent
        >>> mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
        >>> mask[..., :2, :] = True  # the concept fills the upper half
        >>> metric = vp.metrics.Dissection(n_features=1, n_concepts=1, grid_size=(2, 2))
        >>> metric.update(maps, mask)
        >>> metric.compute().iou.tolist()
        [[0.5]]
    """

    sparse_latents = True
    higher_is_better = True
    latents_per = "patch"

    intersection: Tensor
    active_area: Tensor
    mask_area: Tensor
    hits: Tensor
    trials: Tensor
    touched_share: Tensor
    n_shown: Tensor
    n_images: Tensor

    def __init__(
        self,
        *,
        n_features: int,
        n_concepts: int,
        grid_size: tuple[int, int],
        threshold: float | Float[Tensor, " k"] = 0.0,
        upsample: Upsample = "nearest",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if upsample not in get_args(Upsample):
            raise ValueError(f"upsample={upsample!r} is not one of {list(get_args(Upsample))}")
        if isinstance(threshold, Tensor) and threshold.shape != (n_features,):
            raise ValueError(
                f"threshold= has shape {tuple(threshold.shape)}, expected ({n_features},)"
            )
        self.n_features, self.n_concepts = n_features, n_concepts
        self.grid_size, self.threshold, self.upsample = grid_size, threshold, upsample
        both = (n_features, n_concepts)
        double, whole = torch.float64, torch.int64
        for name, shape, dtype in (
            ("intersection", both, double),
            ("active_area", (n_features,), double),
            ("mask_area", (n_concepts,), double),
            ("hits", both, whole),
            ("trials", both, whole),
            ("touched_share", (n_concepts,), double),
            ("n_shown", (n_concepts,), whole),
            ("n_images", (), whole),
        ):
            self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum")

    def update(self, latents: Tensor, masks: Bool[Tensor, "n_masks c height width"]) -> None:
        """Add images.

        Args:
            latents: patch latents ``[n, patches, k]`` dense, or ``[n * patches, k]`` dense, sparse
                COO or sparse CSR, image by image, patches row by row.
            masks: pixels that show each concept, ``[n, c, height, width]``; height and width are
                multiples of the grid's.

        Raises:
            ValueError: sizes do not fit the metric or each other.
        """
        n_patches = math.prod(self.grid_size)
        self._check(latents, masks)
        latents = latents.detach().to(self.device)
        if latents.ndim == 3:
            latents = latents.flatten(0, 1)
        read = read_latents(latents, n_features=self.n_features)
        masks = masks.to(self.device)
        concepts = _Concepts(masks, self.grid_size, nearest=self.upsample == "nearest")
        step = max(1, CHUNK_ELEMENTS // max(1, concepts.per_latent))
        for features in torch.split(self._fed(read), step):
            dense = (
                read.to_dense(features) if isinstance(read, LatentColumns) else read[:, features]
            )
            maps = dense.view(len(masks), n_patches, len(features)).transpose(1, 2)
            self._add(features, maps.unflatten(2, self.grid_size), concepts)
        self.mask_area += concepts.pixels.sum((0, 2))
        self.touched_share += concepts.touched.double().mean(2).sum(0)
        self.n_shown += concepts.touched.any(2).sum(0)
        self.n_images += len(masks)

    def _fed(self, read: Latents) -> Tensor:
        """Return the latents that can exceed the threshold: all, or those with a value."""
        every = torch.arange(self.n_features, device=self.device)
        threshold = torch.as_tensor(self.threshold)
        if isinstance(read, Tensor) or bool((threshold < 0).any()):
            return every
        return every[read.counts() > 0]

    def _add(self, features: Tensor, maps: Tensor, concepts: _Concepts) -> None:
        """Add the maps ``[n, some latents, height, width]`` of some latents."""
        threshold = torch.as_tensor(self.threshold, device=self.device)
        threshold = threshold[features] if threshold.ndim else threshold
        peak = maps.flatten(2).argmax(2)
        fires = maps.amax((2, 3)) > threshold
        at_peak = torch.stack(
            [of_concept.gather(1, peak) for of_concept in concepts.touched.unbind(1)], dim=2
        )
        trial = fires[:, :, None] & concepts.touched.any(2)[:, None, :]
        self.hits[features] += (at_peak & trial).sum(0)
        self.trials[features] += trial.sum(0)
        size = concepts.size
        if size is not None:
            maps = F.interpolate(maps.float(), size=size, mode="bilinear", align_corners=False)
        active = (maps.flatten(2) > threshold.view(-1, 1)).double()
        self.intersection[features] += torch.einsum("nkq,ncq->kc", active, concepts.pixels)
        self.active_area[features] += active.sum((0, 2)) * concepts.pixels_per_place

    def compute(self) -> DissectionResult:
        """Return the fit over all images seen, by all processes."""
        union = self.active_area[:, None] + self.mask_area - self.intersection
        iou = self.intersection / union
        best_iou, best = iou.nan_to_num(nan=-1.0).max(1)
        none = best_iou <= 0
        return DissectionResult(
            iou=iou,
            pointing=self.hits / self.trials.double(),
            n_trials=self.trials.clone(),
            chance=self.touched_share / self.n_shown,
            best_concept=torch.where(none, -1, best),
            best_iou=torch.where(none, math.nan, best_iou),
            n_images=int(self.n_images),
        )

    def _check(self, latents: Tensor, masks: Tensor) -> None:
        height, width = self.grid_size
        expected = (len(masks), height * width, self.n_features)
        flat = (expected[0] * expected[1], self.n_features)
        if tuple(latents.shape) not in (expected, flat):
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}, expected {expected} or {flat}"
            )
        if masks.shape[1] != self.n_concepts or masks.shape[2] % height or masks.shape[3] % width:
            raise ValueError(
                f"masks have shape {tuple(masks.shape)}; expected [n, {self.n_concepts}, H, W] "
                f"with H a multiple of {height} and W of {width}"
            )


class _Concepts:
    """Masks of concepts, at the places where latents are compared with them.

    With ``nearest`` the pixels of a patch are active together, so the places are the patches, and
    mask pixels per patch are enough; otherwise they are the pixels.

    Attributes:
        touched: whether a patch shows a concept, ``[n, c, patches]``.
        pixels: mask pixels, ``[n, c, places]``, float64.
        pixels_per_place: number of pixels of a place.
        size: height and width to which maps are enlarged; None keeps the grid's own size.
    """

    def __init__(self, masks: Tensor, grid_size: tuple[int, int], *, nearest: bool) -> None:
        cells = _cells(masks, grid_size)
        self.touched = cells.any(-1)
        if nearest:
            self.pixels, self.pixels_per_place = cells.double().sum(-1), cells.shape[-1]
            self.size = None
        else:
            self.pixels, self.pixels_per_place = masks.flatten(2).double(), 1
            self.size = masks.shape[2:]

    @property
    def per_latent(self) -> int:
        """Return the number of elements of one latent's map over all images."""
        return int(self.pixels.shape[0] * self.pixels.shape[2])


def dissection(
    latents: Float[Tensor, "n patches k"],
    masks: Bool[Tensor, "n_masks c height width"],
    *,
    grid_size: tuple[int, int],
    threshold: float | Float[Tensor, " k"] = 0.0,
    upsample: Upsample = "nearest",
) -> DissectionResult:
    """Compare heat maps with masks in one call; see :class:`Dissection`.

    Args:
        latents: latents of the patches ``[n, patches, k]``.
        masks: pixels of each concept ``[n, c, height, width]``.
        grid_size: rows and columns of patches.
        threshold: activation above which a place is active: one number, or one per latent.
        upsample: interpolation of the patch grid to the masks' size.

    Examples:
        >>> maps = torch.tensor([[[1.0], [0], [0], [0]]])  # 1 image, 2 x 2 patches, 1 latent
        >>> mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
        >>> mask[..., :2, :] = True  # the concept fills the upper half
        >>> found = vp.metrics.dissection(maps, mask, grid_size=(2, 2))
        >>> found.iou.tolist(), found.pointing.tolist()
        ([[0.5]], [[1.0]])
    """
    metric = Dissection(
        n_features=latents.shape[2],
        n_concepts=masks.shape[1],
        grid_size=grid_size,
        threshold=threshold,
        upsample=upsample,
        sync_on_compute=False,
    ).to(latents.device)
    metric.update(latents, masks)
    return metric.compute()


def quantile_thresholds(
    latents: Float[Tensor, "n patches k"], *, share: float = 0.005
) -> Float[Tensor, " k"]:
    """Return the value that each latent exceeds on ``share`` of all patches (paper: 0.005).

    Args:
        latents: latents of the patches ``[n, patches, k]``.
        share: share of the patches, between 0 and 1.

    Raises:
        ValueError: the share does not lie between 0 and 1.

    Examples:
        >>> maps = torch.arange(100.0).reshape(1, 100, 1)  # 1 image, 100 patches, 1 latent
        >>> threshold = vp.metrics.quantile_thresholds(maps, share=0.05)
        >>> int((maps > threshold).sum())
        5
    """
    if not 0 < share < 1:
        raise ValueError(f"share={share} must lie between 0 and 1")
    flat = latents.flatten(0, 1)
    below = max(1, math.ceil((1 - share) * flat.shape[0]))
    return flat.kthvalue(below, dim=0).values


def _cells(masks: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Cut masks ``[n, c, H, W]`` into patches: ``[n, c, patches, pixels of a patch]``."""
    n, c, height, width = masks.shape
    rows, columns = grid_size
    cut = masks.view(n, c, rows, height // rows, columns, width // columns)
    return cut.permute(0, 1, 2, 4, 3, 5).flatten(4).flatten(2, 3)
