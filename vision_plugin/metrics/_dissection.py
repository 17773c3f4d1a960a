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

from vision_plugin.metrics._latents import check_finite
from vision_plugin.metrics._result import MetricResult, mean_of_defined
from vision_plugin.metrics._streaming import StreamingMetric

Upsample = Literal["nearest", "bilinear"]


@dataclass(frozen=True)
class DissectionResult(MetricResult):
    """Fit of ``k`` latents to ``c`` concepts.

    Attributes:
        iou: intersection over union of the active area and the mask, over all images, ``[k, c]``;
            NaN where both are empty.
        pointing: share of the images showing the concept, and on which the latent is active, where
            the latent's largest patch touches the mask, ``[k, c]``; NaN without such an image.
        n_trials: number of those images, ``[k, c]``.
        chance: share of the patches that touch the mask in images showing the concept: what a
            random patch scores at pointing, ``[c]``.
        best_concept: concept of the largest IoU, -1 for a latent without one.
        best_iou: that IoU.
        n_images: images seen.
    """

    headline = ("mean_best_iou", "mean_pointing_at_best", "n_detectors", "n_concepts_found")

    iou: Float[Tensor, "k c"]
    pointing: Float[Tensor, "k c"]
    n_trials: Int[Tensor, "k c"]
    chance: Float[Tensor, " c"]
    best_concept: Int[Tensor, " k"]
    best_iou: Float[Tensor, " k"]
    n_images: int

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
        threshold: a place is active where the latent is above this: one number, or one per latent
            such as the quantiles of :func:`quantile_thresholds`. 0 suits sparse latents.
        upsample: how the patch grid is brought to the masks' size.
    """

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
                f"threshold has shape {tuple(threshold.shape)}, expected ({n_features},)"
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

    def update(
        self, latents: Float[Tensor, "n patches k"], masks: Bool[Tensor, "n_masks c height width"]
    ) -> None:
        """Add images.

        Args:
            latents: patch latents ``[n, patches, k]``, patches row by row.
            masks: where each concept is, ``[n, c, height, width]``, in pixels; height and width
                are multiples of the grid's.

        Raises:
            ValueError: sizes do not fit the metric or each other.
        """
        self._check(latents, masks)
        maps = latents.detach().to(self.device).transpose(1, 2)
        maps = maps.reshape(*maps.shape[:2], *self.grid_size)
        masks = masks.to(self.device)
        touched = _cells(masks, self.grid_size).any(-1)
        self._add_areas(maps, masks)
        peak = maps.flatten(2).argmax(2)
        active = maps.amax((2, 3)) > self._threshold(1)
        shown = touched.any(2)
        at_peak = torch.stack(
            [of_concept.gather(1, peak) for of_concept in touched.unbind(1)], dim=2
        )
        trial = active[:, :, None] & shown[:, None, :]
        self.hits += (at_peak & trial).sum(0)
        self.trials += trial.sum(0)
        self.touched_share += touched.double().mean(2).sum(0)
        self.n_shown += shown.sum(0)
        self.n_images += len(masks)

    def _add_areas(self, maps: Tensor, masks: Tensor) -> None:
        if self.upsample == "nearest":
            # The pixels of a patch are active together, so mask pixels per patch are enough.
            active = (maps > self._threshold(3)).flatten(2).double()
            cells = _cells(masks, self.grid_size)
            pixels, per_place = cells.double().sum(-1), cells.shape[-1]
        else:
            size = masks.shape[2:]
            large = F.interpolate(maps.float(), size=size, mode="bilinear", align_corners=False)
            active = (large > self._threshold(3)).flatten(2).double()
            pixels, per_place = masks.flatten(2).double(), 1
        self.intersection += torch.einsum("nkq,ncq->kc", active, pixels)
        self.active_area += active.sum((0, 2)) * per_place
        self.mask_area += pixels.sum((0, 2))

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

    def _threshold(self, trailing: int) -> Tensor:
        """Return the threshold, shaped to compare with ``[n, k]`` and more trailing axes."""
        threshold = torch.as_tensor(self.threshold, device=self.device)
        return threshold.view(-1, *[1] * (trailing - 1)) if threshold.ndim else threshold

    def _check(self, latents: Tensor, masks: Tensor) -> None:
        check_finite(latents, "latents")
        height, width = self.grid_size
        expected = (len(masks), height * width, self.n_features)
        if latents.shape != expected:
            raise ValueError(f"latents have shape {tuple(latents.shape)}, expected {expected}")
        if masks.shape[1] != self.n_concepts or masks.shape[2] % height or masks.shape[3] % width:
            raise ValueError(
                f"masks have shape {tuple(masks.shape)}; expected [n, {self.n_concepts}, H, W] "
                f"with H a multiple of {height} and W of {width}"
            )


def dissection(
    latents: Float[Tensor, "n patches k"],
    masks: Bool[Tensor, "n_masks c height width"],
    *,
    grid_size: tuple[int, int],
    threshold: float | Float[Tensor, " k"] = 0.0,
    upsample: Upsample = "nearest",
) -> DissectionResult:
    """Compare heat maps with masks in one call; see :class:`Dissection`."""
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
    """Return what each latent exceeds on ``share`` of all patches (0.005 in the paper)."""
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
