"""The two passes over the images: all images for the ranking, those shown for heat maps."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vision_plugin._progress import Progress
from vision_plugin.evaluation import Facts, Group, ImageBatch, Loop, Place, Subject
from vision_plugin.metrics import MetricSet
from vision_plugin.report._encoding import CHUNK_ELEMENTS, TokenEncoder
from vision_plugin.report._images import ImageReader, ImageWriter, ModelView
from vision_plugin.report._statistics import LatentStatistics, LatentSummary, TokenFrequency

BATCH = 32
_FLOAT16_MAX = 65504.0
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class HeatMaps:
    """Patch latents of the shown images, on disk while the report is built."""

    values: np.memmap[Any, np.dtype[np.float16]]
    """[features, places, patches]."""
    elsewhere: np.ndarray[Any, np.dtype[np.bool_]]
    """[features, places]: whether the latent is largest on a token that is no patch."""
    grid: tuple[int, int]
    """Rows and columns of patches."""


def summarise(
    reader: ImageReader, encoder: TokenEncoder, statistics: LatentStatistics, *, progress: bool
) -> LatentSummary:
    """Summarise all images in one pass; an image's latent is the largest over its tokens."""
    frequency = TokenFrequency(statistics.d_sae)
    metrics = MetricSet.of({"ranking": statistics, "frequency": frequency})
    place = Place(encoder.site, encoder.sae, Facts(reader.images))
    loop = Loop([Subject("sae", place, [Group(metrics)])])
    size = loop.images_at_once(BATCH)
    for numbers, images in _batches(reader, range(len(reader)), "encoding", progress, size=size):
        loop.feed(ImageBatch(numbers.tolist(), encoder.pixels(images)))
    return replace(statistics.compute(), token_frequency=frequency.compute())


def summarise_given(latents: Any, statistics: LatentStatistics) -> LatentSummary:
    """Summarise given image-level latents ``[n_images, d_sae]``, dense, COO or CSR."""
    rows = _row_reader(latents)
    step = max(1, CHUNK_ELEMENTS // max(1, statistics.d_sae))
    for start in range(0, latents.shape[0], step):
        part = rows(start, min(start + step, latents.shape[0]))
        statistics.update(part.float(), torch.arange(start, start + len(part)))
    return statistics.compute()


def _row_reader(latents: Any) -> Any:
    if not isinstance(latents, Tensor):
        return lambda start, stop: torch.as_tensor(np.asarray(latents[start:stop]))
    latents = latents.detach()
    if latents.layout == torch.sparse_coo:
        latents = latents.to_sparse_csr()
    if latents.layout == torch.strided:
        return lambda start, stop: latents[start:stop]
    first, columns, values = latents.crow_indices(), latents.col_indices(), latents.values()

    def rows(start: int, stop: int) -> Tensor:
        low, high = int(first[start]), int(first[stop])
        counts = first[start : stop + 1].diff()
        where = torch.arange(stop - start, device=first.device).repeat_interleave(counts)
        shape = (stop - start, latents.shape[1])
        dense: Tensor = torch.zeros(shape, dtype=values.dtype, device=values.device)
        dense[where, columns[low:high].long()] = values[low:high]
        return dense

    return rows


def show_images(
    reader: ImageReader,
    writer: ImageWriter,
    shown: np.ndarray[Any, np.dtype[np.int64]],
    *,
    progress: bool,
) -> None:
    """Write small copies of the images shown, ``[features, places]`` with -1 for none."""
    numbers = _distinct(shown)
    for rows, images in _batches(reader, numbers, "writing", progress):
        for number, image in zip(rows.tolist(), images, strict=True):
            writer.write(number, image)


def map_heat(
    reader: ImageReader,
    encoder: TokenEncoder,
    view: ModelView,
    writer: ImageWriter,
    shown: np.ndarray[Any, np.dtype[np.int64]],
    features: Sequence[int],
    scratch: Path,
    *,
    progress: bool,
) -> HeatMaps | None:
    """Write the shown images as the model sees them, and return their latents patch by patch.

    Args:
        reader: Source of the images.
        encoder: Model and SAE.
        view: Turns pixels back into images.
        writer: Writes the small copies.
        shown: Image numbers or -1, ``[features, places]``.
        features: Latents of the rows of ``shown``.
        scratch: File to write the heat maps to.
        progress: Whether to show a progress bar.

    Returns:
        None where the activation has no patches.
    """
    n_patches = encoder.layout.n_patches if encoder.has_patches else 0
    values = _mapped(scratch, (*shown.shape, n_patches))
    elsewhere = np.zeros(shown.shape, dtype=bool)
    places = _places_by_image(shown)
    latent_of = torch.as_tensor(np.asarray(features, dtype=np.int64))
    columns = encoder.patch_columns if encoder.has_patches else None
    for rows, images in _batches(reader, _distinct(shown), "mapping patches of", progress):
        pixels = encoder.pixels(images)
        covered = _covered(pixels, encoder.layout.grid)
        for number, image in zip(rows.tolist(), view(covered), strict=True):
            writer.write(number, image)
        for part in encoder.encode(pixels) if encoder.has_patches else ():
            if columns is None or not encoder.has_patches:
                break
            numbers = rows[part.start : part.start + len(part.values)].tolist()
            flat = np.concatenate([places[number] for number in numbers])
            row = np.repeat(np.arange(len(numbers)), [len(places[n]) for n in numbers])
            feature, place = np.divmod(flat, shown.shape[1])
            device = part.values.device
            picked = part.values[
                torch.as_tensor(row, device=device), :, latent_of[feature].to(device)
            ]
            patches = picked[:, columns.to(device)].float().clamp(0, _FLOAT16_MAX)
            values[feature, place] = patches.cpu().numpy().astype(np.float16)
            is_elsewhere = picked.amax(1) > picked[:, columns.to(device)].amax(1)
            elsewhere[feature, place] = is_elsewhere.cpu().numpy()
    if not encoder.has_patches:
        return None
    return HeatMaps(values, elsewhere, encoder.layout.grid)


def _mapped(path: Path, shape: tuple[int, ...]) -> np.memmap[Any, np.dtype[np.float16]]:
    """Return a new file as zeros, with room for all of it: a full disk kills later writes."""
    if hasattr(os, "posix_fallocate"):
        with path.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, max(1, math.prod(shape) * 2))
        return np.memmap(path, dtype=np.float16, mode="r+", shape=shape)
    return np.memmap(path, dtype=np.float16, mode="w+", shape=shape)


def watch(items: Iterable[_Item], what: str, *, progress: bool, total: int) -> Iterator[_Item]:
    """Yield the items and show how far it is."""
    with Progress(total, what, shown=progress, of="pages") as shown:
        for item in items:
            yield item
            shown.advance(1)


def _covered(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the part of the pixels that patches cover; a remainder at the far edges has none."""
    rows, columns = grid
    height, width = pixels.shape[-2:]
    return pixels[..., : height // rows * rows, : width // columns * columns]


def _batches(
    reader: ImageReader, numbers: Sequence[int], what: str, progress: bool, *, size: int = BATCH
) -> Iterator[tuple[Tensor, list[Image.Image]]]:
    """Yield readable images with their numbers."""
    with Progress(len(numbers), what, shown=progress) as shown:
        for start in range(0, len(numbers), size):
            found = {n: reader.read(n) for n in numbers[start : start + size]}
            readable = {n: image for n, image in found.items() if image is not None}
            if readable:
                yield torch.tensor(list(readable)), list(readable.values())
            shown.advance(len(found))


def _distinct(shown: np.ndarray[Any, np.dtype[np.int64]]) -> list[int]:
    return [int(number) for number in np.unique(shown) if number >= 0]


def _places_by_image(
    shown: np.ndarray[Any, np.dtype[np.int64]],
) -> dict[int, np.ndarray[Any, np.dtype[np.int64]]]:
    """Return the flat places of ``shown`` by the image at them."""
    flat = shown.reshape(-1)
    order = np.argsort(flat, kind="stable")
    numbers, starts = np.unique(flat[order], return_index=True)
    parts = np.split(order, starts[1:])
    return {int(number): part for number, part in zip(numbers, parts, strict=True)}
