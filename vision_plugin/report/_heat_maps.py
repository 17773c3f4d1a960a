"""The heat maps of the images that features show, kept while all images go by."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vision_plugin.report._statistics import positive

SCRATCH = "heat.part"
"""Name of the file with the maps."""
_FLOAT16_MAX = 65504.0
_COMPARISONS = 2**24
"""Comparisons of images with each other that are held at once."""


class HeatMaps:
    """Patch latents of each feature's images, in a file: as many as a feature shows, no more.

    The loop feeds it like a metric, after the ranking: an image that enters a feature's ranking
    takes the slot of one that left it. So the model need not run again on the images shown.
    """

    sparse_latents = True
    latents_per = "token"

    def __init__(
        self,
        place: Path,
        shown: Callable[[Tensor], Tensor],
        features: Sequence[int],
        n_places: int,
        grid: tuple[int, int],
        patch_columns: Int[Tensor, " patches"],
        *,
        outlasts: bool,
    ) -> None:
        """Make the file, or open that of a build that was killed.

        Args:
            place: Folder for the file.
            shown: Returns the images ``[f, places]`` that some latents show so far, -1 for none.
            features: Latents that have a page; a map's row is the place of its latent here.
            n_places: Images that a feature shows.
            grid: Rows and columns of patches.
            patch_columns: Places of the patches among the tokens.
            outlasts: Whether the file must fit the last state after a kill: what that state names
                is then not written over, which takes twice the room.
        """
        self.grid, self._shown = grid, shown
        self._latents = torch.as_tensor(list(features), dtype=torch.int64)
        self._columns = patch_columns
        self._shape = (len(features), n_places * (1 + outlasts), grid[0] * grid[1])
        self.owners = np.full(self._shape[:2], -1, dtype=np.int32)
        """Image of every slot, ``[features, slots]``."""
        self.elsewhere = np.zeros(self._shape[:2], dtype=bool)
        """Whether the latent is largest on a token of it that is no patch."""
        self._saved = self.owners.copy()
        self.values = _mapped(place / SCRATCH, self._shape)

    def update(self, latents: Tensor, image_indices: Int[Tensor, " b"]) -> None:
        """Keep the maps of some images where they are shown now.

        Args:
            latents: Latents of their tokens, ``[b, tokens, d_sae]`` dense or ``[b * tokens,
                d_sae]`` sparse COO, image by image.
            image_indices: Their numbers, ascending.
        """
        numbers = image_indices.numpy()
        shown = self._shown(self._latents).numpy()
        new = np.isin(shown, numbers)
        touched = np.flatnonzero(new.any(1))
        for part in _parts(len(touched), shown.shape[1] * self.owners.shape[1]):
            rows = touched[part]
            busy = self._saved[rows] >= 0
            place, slots, images = _free_slots(self.owners[rows], shown[rows], new[rows], busy)
            if len(place) == 0:
                continue
            picked = _picked(
                latents, np.searchsorted(numbers, images), self._latents[rows[place]], len(numbers)
            )
            patches = picked[:, self._columns]
            where = rows[place], slots
            self.values[where] = patches.clamp(0, _FLOAT16_MAX).numpy().astype(np.float16)
            self.elsewhere[where] = (picked.amax(1) > patches.amax(1)).numpy()
            self.owners[where] = images

    def of(
        self, row: int, images: Int[np.ndarray, " n"]
    ) -> tuple[Float[np.ndarray, "n patches"], Bool[np.ndarray, " n"]]:
        """Return a feature's maps on some images, and whether it is larger at no patch of them."""
        held = self.owners[row][None] == images[:, None]
        slots, found = held.argmax(1), held.any(1)
        values = np.where(found[:, None], self.values[row][slots], np.float16(0))
        return values, self.elsewhere[row][slots] & found

    def missing(self, shown: Int[np.ndarray, "features places"]) -> set[int]:
        """Return the images among those shown of which a map was not kept."""
        return set(shown[~_in_row(shown, self.owners)].tolist()) - {-1}

    def state(self) -> dict[str, Tensor]:
        """Return whose maps the file holds, by name; the file itself outlasts a kill."""
        self.values.flush()
        # Only what is shown still must be kept, so that there is room for as many again.
        held = _in_row(self.owners, self._shown(self._latents).numpy())
        self.owners = np.where(held, self.owners, np.int32(-1))
        self._saved = self.owners.copy()
        elsewhere = torch.as_tensor(self.elsewhere.astype(np.uint8))
        return {"map_owners": torch.as_tensor(self._saved), "map_elsewhere": elsewhere}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a state with the file that it was saved beside."""
        self.owners = state["map_owners"].numpy().copy()
        self._saved = self.owners.copy()
        self.elsewhere = state["map_elsewhere"].numpy().astype(bool)


def _parts(n: int, each: int) -> Iterator[slice]:
    """Yield slices of ``n`` rows with as many comparisons as fit in memory."""
    step = max(1, _COMPARISONS // max(1, each))
    return (slice(start, start + step) for start in range(0, n, step))


def _in_row(
    these: Int[np.ndarray, "rows n"], those: Int[np.ndarray, "rows m"]
) -> Bool[np.ndarray, "rows n"]:
    """Return which of these images are among those of the same row."""
    found = np.zeros(these.shape, dtype=bool)
    for part in _parts(len(these), these.shape[1] * those.shape[1]):
        found[part] = (these[part][:, :, None] == those[part][:, None, :]).any(2)
    return found


def _free_slots(
    owners: Int[np.ndarray, "r slots"],
    shown: Int[np.ndarray, "r places"],
    new: Bool[np.ndarray, "r places"],
    busy: Bool[np.ndarray, "r slots"],
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Return row, slot and image of what takes the slots of images that are shown no more."""
    same = owners[:, :, None] == shown[:, None, :]
    free = ~busy & ~(same.any(2) & (owners >= 0))
    fresh = new & ~same.any(1)
    # An image can be shown twice, among the top ones and in the sample.
    order = np.argsort(shown, axis=1, kind="stable")
    images = np.take_along_axis(shown, order, 1)
    fresh = np.take_along_axis(fresh, order, 1)
    fresh[:, 1:] &= images[:, 1:] != images[:, :-1]
    free_first = np.argsort(~free, axis=1, kind="stable")
    rows, places = np.nonzero(fresh)
    rank = fresh.cumsum(1)[rows, places] - 1
    assert bool(free[rows, free_first[rows, rank]].all())
    return rows, free_first[rows, rank], images[rows, places]


def _picked(
    latents: Tensor, places: Int[np.ndarray, " n"], chosen: Int[Tensor, " n"], n_images: int
) -> Float[Tensor, "n tokens"]:
    """Return one latent at every token of one image each, on the CPU."""
    where = torch.as_tensor(places)
    if not latents.is_sparse:
        device = latents.device
        return latents[where.to(device), :, chosen.to(device)].float().cpu()
    d_sae, n_tokens = latents.shape[1], latents.shape[0] // n_images
    rows, entries, values = positive(latents)
    to = torch.full((n_images * d_sae,), -1)
    to[where * d_sae + chosen] = torch.arange(len(where))
    to = to[rows // n_tokens * d_sae + entries]
    kept = to >= 0
    picked = torch.zeros(len(where), n_tokens)
    picked[to[kept], rows[kept] % n_tokens] = values[kept]
    return picked


def _mapped(path: Path, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[np.float16]]:
    """Return a file as numbers, with room for all of it: a full disk kills later writes.

    A file of this size is one that a killed build left.
    """
    size = math.prod(shape) * 2
    if path.is_file() and path.stat().st_size == size:
        return np.memmap(path, dtype=np.float16, mode="r+", shape=shape)
    if hasattr(os, "posix_fallocate") and size:
        path.unlink(missing_ok=True)
        with path.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, size)
        return np.memmap(path, dtype=np.float16, mode="r+", shape=shape)
    return np.memmap(path, dtype=np.float16, mode="w+", shape=shape)
