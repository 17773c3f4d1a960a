"""The images on which each latent is largest, numbered in the order of arrival."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin.metrics._latents import read_latents
from vision_plugin.metrics._result import MetricResult
from vision_plugin.metrics._streaming import State, StreamingMetric
from vision_plugin.metrics._top import VOID, merge_top, top_values

__all__ = ["TopImages", "TopImagesResult", "top_images"]


@dataclass(frozen=True)
class TopImagesResult(MetricResult):
    """Each latent's top images.

    Attributes:
        images: image numbers, largest activation first, -1 where no further image has a positive
            activation.
        values: the activations, 0 beside a -1.
        n_images: number of images seen.

    Examples:
        >>> found = vp.metrics.top_images(torch.tensor([[1.0], [3.0], [0.0]]), n_top=2)
        >>> found.images.tolist(), found.values.tolist()
        ([[1, 0]], [[3.0, 1.0]])
    """

    images: Int[Tensor, "k n_top"]
    values: Float[Tensor, "k n_top"]
    n_images: int


class TopImages(StreamingMetric):
    """Keep the images on which each latent is largest; ties go to the earlier image.

    Args:
        n_features: number of latents, ``k``.
        n_top: images kept per latent.

    Examples:
        >>> metric = vp.metrics.TopImages(n_features=1, n_top=2)
        >>> metric.update(torch.tensor([[1.0], [3.0]]))
        >>> metric.update(torch.tensor([[2.0]]))
        >>> metric.compute().images.tolist()
        [[1, 2]]
    """

    sparse_latents = True

    def __init__(self, *, n_features: int, n_top: int = 16, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if n_features < 1 or n_top < 1:
            raise ValueError(f"n_features={n_features} and n_top={n_top} must both be at least 1")
        self.n_features, self.n_top = n_features, n_top
        self.add_coupled_state("n_images", torch.zeros((), dtype=torch.int64))
        shape = (n_features, n_top)
        self.add_coupled_state("top_value", torch.full(shape, VOID, dtype=torch.float64))
        self.add_coupled_state("top_image", torch.full(shape, -1))

    def update(self, latents: Tensor) -> None:
        """Add images by their latents ``[n, n_features]``, dense, sparse COO or sparse CSR."""
        read = read_latents(latents.detach().to(self.device), n_features=self.n_features)
        values, rows = top_values(read, self.n_top)
        state = {name: getattr(self, name) for name in self._coupled}
        added = {"n_images": torch.tensor(latents.shape[0]), "top_value": values, "top_image": rows}
        for name, value in self.merge_coupled(state, added).items():
            setattr(self, name, value)

    @staticmethod
    def merge_coupled(first: State, second: State) -> State:
        """Merge two shards' top lists; the second's image numbers follow the first's."""
        later = second["top_image"]
        later = torch.where(later < 0, later, later + first["n_images"])
        value, image = merge_top(
            (first["top_value"], first["top_image"]), (second["top_value"], later)
        )
        total = first["n_images"] + second["n_images"].to(first["n_images"].device)
        return {"n_images": total, "top_value": value, "top_image": image}

    def top(self) -> TopImagesResult:
        """Return the top images of all data seen, by all processes when synced."""
        state = self.coupled_states()
        positive = state["top_value"] > 0
        return TopImagesResult(
            images=torch.where(positive, state["top_image"], -1),
            values=torch.where(positive, state["top_value"], 0.0),
            n_images=int(state["n_images"]),
        )

    def compute(self) -> MetricResult:
        """Return the top images of all data seen, by all processes."""
        return self.top()


def top_images(latents: Tensor, *, n_top: int = 16) -> TopImagesResult:
    """Return each latent's top images in one call.

    Args:
        latents: image-level latents ``[n, k]``, dense, sparse COO or sparse CSR.
        n_top: images kept per latent.

    Raises:
        ValueError: latents are not ``[images, latents]``, or not finite, or ``n_top`` is below 1.

    Examples:
        >>> latents = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 5.0]])  # 3 images, 2 latents
        >>> vp.metrics.top_images(latents, n_top=2).images.tolist()
        [[1, 2], [2, -1]]
    """
    if latents.ndim != 2:
        raise ValueError(f"latents= must be [images, latents], got shape {tuple(latents.shape)}")
    metric = TopImages(n_features=latents.shape[1], n_top=n_top).to(latents.device)
    metric.update(latents)
    return metric.top()
