"""Endless, shuffled, exact batches of activations, made while training."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vision_plugin.activations._picture import BadImageError
from vision_plugin.models import Harvester, TokenSelection

logger = logging.getLogger(__name__)

PIXEL_CACHE_BYTES = 2 * 1024**3


@runtime_checkable
class Pictures(Protocol):
    """A sequence of pictures with an id each."""

    @property
    def ids(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Image.Image: ...


class ActivationStream:
    """An iterator over batches of activation vectors for SAELens's trainers.

    Pictures go through the model in a new order every epoch. The vectors of their selected tokens
    enter a buffer; batches are drawn from it at random without replacement, and it is filled up
    again when half of it is gone, so that a batch mixes many pictures. Everything follows from
    the seed.
    """

    def __init__(
        self,
        model: Any,
        pictures: Pictures,
        *,
        hook_names: list[str],
        tokens: str,
        batch_size: int,
        images_per_forward: int = 32,
        n_batches_in_buffer: int = 20,
        seed: int = 42,
        dtype: torch.dtype = torch.float32,
        max_bad_images: int = 100,
    ) -> None:
        """Check that the pictures and the hooks can serve.

        Args:
            model: A VisionBridge.
            pictures: At least one picture.
            hook_names: One hook, or several whose activations are concatenated (a transcoder's
                input and output).
            tokens: ``"cls"``, ``"patch"``, ``"all"`` or ``"random:n"``.
            batch_size: Vectors per batch.
            images_per_forward: Pictures per forward pass.
            n_batches_in_buffer: Size of the buffer in batches, 2 or more.
            seed: Order of the pictures, of the vectors, and the random tokens.
            dtype: Type of the batches.
            max_bad_images: Unreadable pictures to leave out, with a warning each, before giving up.

        Raises:
            ValueError: no pictures, or a buffer of fewer than two batches.
        """
        if len(pictures) == 0:
            raise ValueError("there are no images to train on")
        if n_batches_in_buffer < 2:
            raise ValueError(f"n_batches_in_buffer={n_batches_in_buffer}: at least 2 are needed")
        self.model, self.pictures = model, pictures
        self.harvester = Harvester(model, hook_names)
        self.selection = TokenSelection.parse(tokens)
        self.batch_size, self.images_per_forward = batch_size, images_per_forward
        self.buffer_size = n_batches_in_buffer * batch_size
        self.dtype, self.max_bad_images = dtype, max_bad_images
        self.bad_images: dict[int, BadImageError] = {}
        self.generator = torch.Generator().manual_seed(seed)
        self._pixels: dict[int, Tensor] = {}
        self._order: list[int] = []
        self._buffer: Tensor | None = None

    def __iter__(self) -> Iterator[Float[Tensor, "batch d_in"]]:
        return self

    def __next__(self) -> Float[Tensor, "batch d_in"]:
        """The next batch; there always is one."""
        self.fill()
        assert self._buffer is not None
        batch, self._buffer = self._buffer[: self.batch_size], self._buffer[self.batch_size :]
        return batch.to(self.dtype)

    def fill(self) -> None:
        """Fill the buffer where it is half empty; the first call finds what is wrong with the data.

        Raises:
            ValueError: too many pictures cannot be read, or activations are not finite.
        """
        if self._buffer is None or len(self._buffer) < self.buffer_size // 2 + self.batch_size:
            self._buffer = self._refilled()

    def _refilled(self) -> Tensor:
        parts = [] if self._buffer is None else [self._buffer]
        n_rows = sum(len(part) for part in parts)
        while n_rows < self.buffer_size:
            rows = self._next_rows()
            parts.append(rows)
            n_rows += len(rows)
        rows = torch.cat(parts)
        return rows[torch.randperm(len(rows), generator=self.generator)]

    def _next_rows(self) -> Tensor:
        """Vectors of the next pictures' selected tokens, [n, d_in]."""
        pixels = self._next_pixels()
        harvested = self.harvester(torch.stack(list(pixels.values())))
        rows = torch.cat([self._select(tensor) for tensor in harvested.values()], dim=-1)
        finite = torch.isfinite(rows).all(dim=-1)
        if not bool(finite.all()):
            ids = ", ".join(self.pictures.ids[i] for i in list(pixels)[:3])
            raise ValueError(
                f"{int((~finite).sum())} activation vectors of {self.model.cfg.model_name} at "
                f"{', '.join(self.harvester.sources)} are not finite (pictures {ids}, ...). "
                "Check the model's weights and dtype."
            )
        return rows.cpu()

    def _select(self, activation: Tensor) -> Tensor:
        if activation.ndim == 2:  # one vector per picture: a pooled activation
            return activation
        if activation.ndim == 4:  # one vector per head
            activation = activation.flatten(-2)
        layout = self.model.token_layout()
        rows = self.selection.rows(layout, len(activation), self.generator)
        batch = torch.arange(len(activation))[:, None]
        return activation[batch, rows.to(activation.device)].flatten(0, 1)

    def _next_pixels(self) -> dict[int, Tensor]:
        """Pixels of the next readable pictures, by index; at least one picture."""
        pixels: dict[int, Tensor] = {}
        while not pixels:
            if not self._order:
                order = torch.randperm(len(self.pictures), generator=self.generator)
                self._order = order.tolist()
            chosen = self._order[: self.images_per_forward]
            self._order = self._order[self.images_per_forward :]
            pixels = self._pixels_of(chosen)
        return pixels

    def _pixels_of(self, indices: list[int]) -> dict[int, Tensor]:
        """Pixels of those that can be read, kept for the next epoch while they fit in memory."""
        pictures = {i: p for i in indices if i not in self._pixels and (p := self._read(i))}
        fresh: dict[int, Tensor] = {}
        if pictures:
            pixels = self.model.preprocess(list(pictures.values()))
            fresh = dict(zip(pictures, pixels, strict=True))
            if pixels[0].nbytes * len(self.pictures) <= PIXEL_CACHE_BYTES:
                self._pixels.update(fresh)
        found = {i: fresh.get(i, self._pixels.get(i)) for i in indices}
        return {i: pixels for i, pixels in found.items() if pixels is not None}

    def _read(self, index: int) -> Image.Image | None:
        """One picture, or None for one that cannot be read, which is left out from then on."""
        if index in self.bad_images:
            return None
        try:
            return self.pictures[index]
        except BadImageError as error:
            self.bad_images[index] = error
            logger.warning("left out: %s", error)
        allowed = min(self.max_bad_images, len(self.pictures) - 1)
        if len(self.bad_images) > allowed:
            raise ValueError(
                f"{len(self.bad_images)} of {len(self.pictures)} images cannot be read, the last "
                f"of them: {self.bad_images[index]}. Mend or remove them."
            )
        return None
