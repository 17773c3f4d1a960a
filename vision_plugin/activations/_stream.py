"""Endless shuffled batches of activations, computed while training."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from vision_plugin.activations._errors import StoreMismatchError
from vision_plugin.images import BadImageError, hash_ids
from vision_plugin.models import Harvester, TokenSelection

logger = logging.getLogger(__name__)

PIXEL_CACHE_BYTES = 2 * 1024**3


@runtime_checkable
class ImagesWithIds(Protocol):
    """Images by number, with an id for each: an ``ImageSource``, or anything like it."""

    @property
    def ids(self) -> Sequence[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Image.Image: ...


class ActivationStream:
    """An iterator over batches of activation vectors for SAELens's trainers.

    Images go through the model in a new order every epoch. The vectors of their selected tokens
    enter a buffer. Batches are drawn from it at random without replacement, and it is refilled
    when half of it is used, so that a batch mixes many images. The seed determines everything,
    and :meth:`state_dict` saves the position.

    Examples:
        >>> stream = vp.activations.ActivationStream(
        ...     model, vp.open_images("demo:8"), hook_names=[hook], tokens="patch", batch_size=32
        ... )
        >>> next(stream).shape
        torch.Size([32, 128])
    """

    def __init__(
        self,
        model: Any,
        images: ImagesWithIds,
        *,
        hook_names: list[str],
        tokens: str,
        batch_size: int,
        images_per_forward: int = 32,
        n_batches_in_buffer: int = 20,
        seed: int = 42,
        dtype: torch.dtype = torch.float32,
        max_bad_images: int = 100,
        by_hook: bool = False,
    ) -> None:
        """Check the arguments; nothing runs through the model yet.

        Args:
            model: A VisionBridge.
            images: Images with ids, at least one.
            hook_names: One hook, or several whose activations are concatenated (a transcoder's
                input and output).
            tokens: ``"cls"``, ``"patch"``, ``"register"``, ``"all"`` or ``"random:n"``.
            batch_size: Vectors per batch.
            images_per_forward: Images per forward pass.
            n_batches_in_buffer: Size of the buffer in batches, 2 or more.
            seed: Seed of the order of images and vectors, and of the random tokens.
            dtype: Type of the batches.
            max_bad_images: Unreadable images to leave out, with a warning each, before an error.
            by_hook: Serve dictionaries of batches by hook name instead, whose rows belong to the
                same tokens. Each hook's batches are the same as from a stream of that hook alone.

        Raises:
            ValueError: no images, or a buffer of fewer than two batches.
        """
        if len(images) == 0:
            raise ValueError("there are no images to train on")
        if n_batches_in_buffer < 2:
            raise ValueError(f"n_batches_in_buffer={n_batches_in_buffer}: use 2 or more")
        self.model, self.images = model, images
        self.harvester = Harvester(model, hook_names)
        self.selection = TokenSelection.parse(tokens)
        self.tokens, self.seed, self.by_hook = tokens, seed, by_hook
        self.batch_size, self.images_per_forward = batch_size, images_per_forward
        self.buffer_size = n_batches_in_buffer * batch_size
        self.dtype, self.max_bad_images = dtype, max_bad_images
        self.bad_images: dict[int, BadImageError] = {}
        self.generator = torch.Generator().manual_seed(seed)
        self._pixels: dict[int, Tensor] = {}
        self._order: list[int] = []
        self._buffer: dict[str, Tensor] = {}
        self._enough = False

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        """Return the next batch, [batch, d_in], or these by hook name; batches never end."""
        self.fill()
        size = self.batch_size
        batch = {name: rows[:size].to(self.dtype) for name, rows in self._buffer.items()}
        self._buffer = {name: rows[size:] for name, rows in self._buffer.items()}
        return batch if self.by_hook else _side_by_side(batch)

    def sample(self) -> Any:
        """Return all vectors in the buffer as one large batch; they stay in it."""
        self.fill()
        rows = {name: rows.to(self.dtype) for name, rows in self._buffer.items()}
        return rows if self.by_hook else _side_by_side(rows)

    def fill(self) -> None:
        """Fill the buffer if it is half empty; the first call finds faults in the data.

        Raises:
            ValueError: too many images cannot be read, activations are not finite, or all
                images together give less than a batch.
        """
        if self._n_buffered() < self.buffer_size // 2 + self.batch_size:
            self._refill()

    # ------------------------------------------------------------------ the position

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch: tensors (with the buffer) and JSON values."""
        return {
            "identity": self._identity(),
            "generator": self.generator.get_state(),
            "order": torch.tensor(self._order, dtype=torch.long),
            "buffer": dict(self._buffer),
            "bad_images": {str(i): error.reason for i, error in self.bad_images.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position from :meth:`state_dict`; the batches from there on are the same.

        Raises:
            StoreMismatchError: it belongs to other images, hooks, tokens, seed or sizes.
        """
        here = self._identity()
        wrong = [
            f"{name}: {state['identity'].get(name)!r} saved, {value!r} here"
            for name, value in here.items()
            if state["identity"].get(name) != value
        ]
        if wrong:
            raise StoreMismatchError(f"the saved position is of other batches: {'; '.join(wrong)}")
        self.generator.set_state(state["generator"])
        self._order = state["order"].tolist()
        self._buffer = dict(state["buffer"])
        self.bad_images = {
            int(i): BadImageError(self.images.ids[int(i)], reason)
            for i, reason in state["bad_images"].items()
        }

    def _identity(self) -> dict[str, Any]:
        return {
            "pictures": hash_ids(self.images.ids)[:16],
            "hook_names": list(self.harvester.sources),
            "tokens": self.tokens,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "images_per_forward": self.images_per_forward,
            "buffer_size": self.buffer_size,
        }

    # ------------------------------------------------------------------ filling

    def _n_buffered(self) -> int:
        return len(next(iter(self._buffer.values()))) if self._buffer else 0

    def _refill(self) -> None:
        parts = [self._buffer] if self._buffer else []
        n_rows = self._n_buffered()
        while n_rows < self.buffer_size:
            rows = self._next_rows()
            parts.append(rows)
            n_rows += len(next(iter(rows.values())))
        order = torch.randperm(n_rows, generator=self.generator)
        self._buffer = {
            name: torch.cat([part[name] for part in parts])[order]
            for name in self.harvester.sources
        }

    def _next_rows(self) -> dict[str, Tensor]:
        """Return the vectors of the next images' selected tokens, [n, d_in] by hook."""
        pixels = self._next_pixels()
        harvested = self.harvester(torch.stack(list(pixels.values())))
        rows = self._selected(harvested)
        finite = torch.stack([torch.isfinite(part).all(dim=-1) for part in rows.values()]).all(0)
        if not bool(finite.all()):
            ids = ", ".join(self.images.ids[i] for i in list(pixels)[:3])
            raise ValueError(
                f"{int((~finite).sum())} activation vectors of {self.model.cfg.model_name} at "
                f"{', '.join(self.harvester.sources)} are not finite (images {ids}, ...). "
                "Check the model's weights and dtype."
            )
        if not self._enough:
            self._check_enough(len(finite) // len(pixels))
        return {name: part.cpu() for name, part in rows.items()}

    def _check_enough(self, rows_per_image: int) -> None:
        readable = len(self.images) - len(self.bad_images)
        if readable * rows_per_image < self.batch_size:
            raise ValueError(
                f"{readable} images give {readable * rows_per_image} vectors, which is less "
                f"than one batch of {self.batch_size}: add images, or make the batch smaller "
                "(train_batch_size_tokens=)"
            )
        self._enough = True

    def _selected(self, harvested: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return [n, d_in] for each hook; all hooks share the same drawn tokens."""
        n_images = len(next(iter(harvested.values())))
        layout, drawn = self.model.token_layout(), None
        rows: dict[str, Tensor] = {}
        for name, activation in harvested.items():
            if activation.ndim == 2:  # one vector per image: a pooled activation
                rows[name] = activation
                continue
            if activation.ndim == 4:  # one vector per head
                activation = activation.flatten(-2)
            if drawn is None:
                drawn = self.selection.rows(layout, n_images, self.generator)
            batch = torch.arange(n_images)[:, None]
            rows[name] = activation[batch, drawn.to(activation.device)].flatten(0, 1)
        if len({len(part) for part in rows.values()}) > 1:
            counts = {name: len(part) // n_images for name, part in rows.items()}
            raise ValueError(f"these hooks differ in vectors per image: {counts}. Read them apart")
        return rows

    def _next_pixels(self) -> dict[int, Tensor]:
        """Return the pixels of the next readable images, by index; at least one image."""
        pixels: dict[int, Tensor] = {}
        while not pixels:
            if not self._order:
                order = torch.randperm(len(self.images), generator=self.generator)
                self._order = order.tolist()
            chosen = self._order[: self.images_per_forward]
            self._order = self._order[self.images_per_forward :]
            pixels = self._pixels_of(chosen)
        return pixels

    def _pixels_of(self, indices: list[int]) -> dict[int, Tensor]:
        """Return the pixels of readable images, kept for the next epoch while memory allows."""
        images = {i: p for i in indices if i not in self._pixels and (p := self._read(i))}
        fresh: dict[int, Tensor] = {}
        if images:
            pixels = self.model.preprocess(list(images.values()))
            fresh = dict(zip(images, pixels, strict=True))
            if pixels[0].nbytes * len(self.images) <= PIXEL_CACHE_BYTES:
                self._pixels.update(fresh)
        found = {i: fresh.get(i, self._pixels.get(i)) for i in indices}
        return {i: pixels for i, pixels in found.items() if pixels is not None}

    def _read(self, index: int) -> Image.Image | None:
        """Return one image, or None if it cannot be read; it is left out from then on."""
        if index in self.bad_images:
            return None
        try:
            return self.images[index]
        except BadImageError as error:
            self.bad_images[index] = error
            logger.warning("left out: %s", error)
        allowed = min(self.max_bad_images, len(self.images) - 1)
        if len(self.bad_images) > allowed:
            raise ValueError(
                f"{len(self.bad_images)} of {len(self.images)} images cannot be read, the last "
                f"of them: {self.bad_images[index]}. Mend or remove them."
            )
        return None


def _side_by_side(batch: dict[str, Tensor]) -> Float[Tensor, "batch d_in"]:
    parts = list(batch.values())
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
