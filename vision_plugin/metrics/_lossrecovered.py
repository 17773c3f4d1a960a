"""Loss recovered: how much of the model's zero-shot classification survives a reconstruction?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vision_plugin.metrics._latents import check_finite
from vision_plugin.metrics._result import MetricResult
from vision_plugin.metrics._streaming import StreamingMetric

__all__ = ["LossRecovered", "LossRecoveredResult"]


@dataclass(frozen=True)
class LossRecoveredResult(MetricResult):
    """Zero-shot cross-entropy with and without the reconstruction.

    Attributes:
        recovered: ``(ablated - spliced) / (ablated - clean)``: 1 when the reconstruction costs
            nothing, 0 when it is as bad as zeros; NaN where ablating does not raise the loss.
        clean: mean cross-entropy of the untouched model, in nats.
        spliced: mean cross-entropy with the reconstruction in place of the activations.
        ablated: mean cross-entropy with zeros in their place.
        window: ``ablated - clean``; below about one nat, ``recovered`` is mostly noise.
        accuracy_clean: share of images whose own class has the largest logit.
        accuracy_spliced: that share with the reconstruction.
        n_images: number of images seen.

    Examples:
        >>> logits, labels = torch.tensor([[5.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 1])
        >>> metric = vp.metrics.LossRecovered()
        >>> metric.update(logits, logits, torch.zeros(2, 2), labels)
        >>> found = metric.compute()
        >>> found.accuracy_clean, round(found.window, 3)
        (1.0, 0.686)
    """

    headline = ("recovered", "window", "accuracy_clean", "accuracy_spliced")

    recovered: float
    clean: float
    spliced: float
    ablated: float
    window: float
    accuracy_clean: float
    accuracy_spliced: float
    n_images: int


class LossRecovered(StreamingMetric):
    """Share of the zero-shot loss that a spliced reconstruction recovers over zero ablation.

    Logits must be at the model's own scale (cosines times 100 for CLIP): without it the whole
    window is only about 0.15 nats wide.

    Examples:
        >>> logits, labels = torch.tensor([[5.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 1])
        >>> metric = vp.metrics.LossRecovered()
        >>> metric.update(logits, 0.5 * logits, torch.zeros(2, 2), labels)
        >>> round(metric.compute().recovered, 3)
        0.895
    """

    higher_is_better = True
    losses: Tensor
    correct: Tensor
    n_images: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("losses", torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("correct", torch.zeros(2, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("n_images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(
        self,
        logits: Float[Tensor, "n classes"],
        spliced_logits: Float[Tensor, "n_spliced classes_spliced"],
        ablated_logits: Float[Tensor, "n_ablated classes_ablated"],
        labels: Tensor,
    ) -> None:
        """Add images.

        Args:
            logits: logits of the untouched model, ``[n, classes]``.
            spliced_logits: logits with the reconstruction spliced in.
            ablated_logits: logits with zeros spliced in.
            labels: class of each image, ``[n]``.

        Raises:
            ValueError: shapes disagree, or a logit is NaN or infinite.
        """
        every = {"logits": logits, "spliced": spliced_logits, "ablated": ablated_logits}
        if len({tuple(value.shape) for value in every.values()}) > 1 or labels.shape != (
            logits.shape[0],
        ):
            shapes = {name: tuple(value.shape) for name, value in every.items()}
            raise ValueError(
                f"logits must have one shape [n, classes] and labels [n], got {shapes} and "
                f"{tuple(labels.shape)}"
            )
        for name, value in every.items():
            check_finite(value, name)
        labels = labels.to(self.device, torch.int64)
        doubles = [value.detach().to(self.device, torch.float64) for value in every.values()]
        self.losses += torch.stack(
            [F.cross_entropy(value, labels, reduction="sum") for value in doubles]
        )
        self.correct += torch.stack([(value.argmax(1) == labels).sum() for value in doubles[:2]])
        self.n_images += labels.shape[0]

    def compute(self) -> LossRecoveredResult:
        """Return the losses over all images seen, by all processes.

        Raises:
            ValueError: no image was seen.
        """
        n_images = int(self.n_images)
        if n_images == 0:
            raise ValueError(
                "loss recovered is a mean over images, and none was seen; call update first"
            )
        clean, spliced, ablated = (self.losses / n_images).tolist()
        window = ablated - clean
        accuracy_clean, accuracy_spliced = (self.correct / n_images).tolist()
        return LossRecoveredResult(
            recovered=(ablated - spliced) / window if window > 0 else math.nan,
            clean=clean,
            spliced=spliced,
            ablated=ablated,
            window=window,
            accuracy_clean=accuracy_clean,
            accuracy_spliced=accuracy_spliced,
            n_images=n_images,
        )
