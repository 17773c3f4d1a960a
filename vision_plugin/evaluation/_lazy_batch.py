"""A batch for metrics of which each entry is made when a metric asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor


class LazyBatch(Mapping[str, Any]):
    """Values by name that are made when they are first read.

    Args:
        makers: Functions that make the values, by name.

    Examples:
        >>> batch = vp.evaluation.LazyBatch({"squares": lambda: torch.arange(3) ** 2})
        >>> batch["squares"], "cubes" in batch
        (tensor([0, 1, 4]), False)
    """

    def __init__(self, makers: Mapping[str, Callable[[], Any]]) -> None:
        self._makers = dict(makers)
        self._made: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._made:
            self._made[name] = self._makers[name]()
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def plus(self, **values: Any) -> LazyBatch:
        """The same with more values; each of the others is still made once for both."""
        same = {name: partial(self.__getitem__, name) for name in self._makers}
        more = LazyBatch(same | dict.fromkeys(values, dict))
        more._made = values
        return more

    def of_images(self, rows: Int[Tensor, " chosen"], n_images: int) -> LazyBatch:
        """The same for some of the batch's images.

        Args:
            rows: Places of the images in the batch.
            n_images: Number of images in the batch.
        """
        return LazyBatch({name: partial(self._taken, name, rows, n_images) for name in self})

    def _taken(self, name: str, rows: Int[Tensor, " chosen"], n_images: int) -> Any:
        value = self[name]
        if isinstance(value, Tensor):
            per_image = len(value) // n_images  # tokens of sparse latents come image by image
            places = rows[:, None] * per_image + torch.arange(per_image)
            return value.index_select(0, places.flatten().to(value.device))
        return [value[row] for row in rows.tolist()] if isinstance(value, list) else value
