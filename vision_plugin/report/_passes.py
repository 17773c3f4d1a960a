"""The two passes over the images: all images for the ranking, those shown for heat maps."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
from vision_plugin.report._images import ImageReader, ModelView
from vision_plugin.report._patches import PatchRecorder
from vision_plugin.report._places import Places, TokenPlaces
from vision_plugin.report._resume import Checkpoint, no_checkpoint
from vision_plugin.report._sprites import ImageWriter
from vision_plugin.report._statistics import LatentStatistics, LatentSummary
from vision_plugin.report._together import Kept, KeptLatents

BATCH = 32
MAP_STEP = 256
"""Images between two places at which the second pass can go on; a sheet of thumbnails."""
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


@dataclass(frozen=True)
class Counted:
    """What the first pass finds out about one dictionary."""

    summary: LatentSummary
    places: Places | None
    """None where latents were given."""
    kept: Kept


@dataclass
class Counter:
    """The metrics of one dictionary in the first pass."""

    encoder: TokenEncoder | None
    statistics: LatentStatistics
    places: TokenPlaces | None
    kept: KeptLatents

    def metrics(self) -> dict[str, Any]:
        """Return the metrics that the loop feeds."""
        found = {"ranking": self.statistics, "places": self.places, "kept": self.kept}
        return {name: metric for name, metric in found.items() if metric is not None}

    def compute(self) -> Counted:
        """Return what was counted."""
        places = None if self.places is None else self.places.compute()
        return Counted(self.statistics.compute(), places, self.kept.compute())


def count(
    reader: ImageReader,
    counters: Sequence[Counter],
    *,
    progress: bool,
    checkpoint: Checkpoint | None = None,
) -> list[Counted]:
    """Summarise all images in one pass; an image's latent is the largest over its tokens.

    Args:
        reader: Source of the images.
        counters: Metrics of each dictionary; all read one model.
        progress: Whether to show a progress bar.
        checkpoint: Where the pass goes on after it was killed.
    """
    checkpoint = checkpoint or no_checkpoint()
    facts = Facts(reader.images)
    subjects = []
    for number, counter in enumerate(counters):
        assert counter.encoder is not None
        place = Place(counter.encoder.site, counter.encoder.sae, facts)
        groups = [Group(MetricSet.of(counter.metrics()))]
        subjects.append(Subject(f"dictionary {number}", place, groups))
    loop, first = Loop(subjects), counters[0].encoder
    assert first is not None
    state = checkpoint.load("counts")
    start = 0 if state is None else int(state["next_image"])
    if state is not None:
        _restore(counters, state)
        reader.bad.update({int(n): why for n, why in _unpacked(state["bad"]).items()})
    size = loop.images_at_once(BATCH)
    numbers = range(start, len(reader))
    for batch, images in _batches(reader, numbers, "encoding", progress, size=size):
        if images:
            loop.feed(ImageBatch(batch, first.pixels(images)))
        if checkpoint.due:
            after = {"next_image": torch.tensor(numbers[0] + size), "bad": _packed(reader.bad)}
            checkpoint.save("counts", {**after, **_states(counters)})
        numbers = numbers[size:]
    return [counter.compute() for counter in counters]


def _packed(content: dict[int, str]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)


def _unpacked(packed: Tensor) -> dict[str, str]:
    found: dict[str, str] = json.loads(bytes(packed.tolist()))
    return found


def _states(counters: Sequence[Counter]) -> dict[str, Tensor]:
    return {
        f"{number}.{name}.{key}": value
        for number, counter in enumerate(counters)
        for name, metric in counter.metrics().items()
        for key, value in metric.state().items()
    }


def _restore(counters: Sequence[Counter], state: dict[str, Tensor]) -> None:
    for number, counter in enumerate(counters):
        for name, metric in counter.metrics().items():
            prefix = f"{number}.{name}."
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            metric.restore(own)


def count_given(latents: Any, counter: Counter) -> Counted:
    """Summarise given image-level latents ``[n_images, d_sae]``, dense, COO or CSR."""
    rows = _row_reader(latents)
    step = max(1, CHUNK_ELEMENTS // max(1, counter.statistics.d_sae))
    for start in range(0, latents.shape[0], step):
        part = rows(start, min(start + step, latents.shape[0])).float()
        numbers = torch.arange(start, start + len(part))
        counter.statistics.update(part, numbers)
        counter.kept.update(part, numbers)
    return counter.compute()


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


def show_images(reader: ImageReader, writer: ImageWriter, *, progress: bool) -> None:
    """Write small copies of all images that the writer has a place for."""
    for numbers, images in _batches(reader, writer.order, "writing", progress):
        for number, image in zip(numbers, images, strict=True):
            writer.write(number, image)
    writer.finish()


@dataclass
class MapPass:
    """The second pass: images as the model sees them, and their latents patch by patch."""

    reader: ImageReader
    encoder: TokenEncoder
    view: ModelView
    writer: ImageWriter
    shown: np.ndarray[Any, np.dtype[np.int64]]
    """Image numbers or -1, ``[features, places]``."""
    features: Sequence[int]
    """Latents of the rows of ``shown``."""
    recorder: PatchRecorder | None
    """Records the images that have a page of their own."""
    scratch: Path
    """File to write the heat maps to."""
    checkpoint: Checkpoint
    progress: bool

    def run(self) -> HeatMaps | None:
        """Write the images, and return the heat maps; None where there are no patches."""
        encoder, n_places = self.encoder, self.shown.shape[1]
        n_patches = encoder.layout.n_patches if encoder.has_patches else 0
        done = self.checkpoint.load("maps")
        shape = (*self.shown.shape, n_patches)
        values = _mapped(self.scratch, shape, new=done is None)
        elsewhere = np.zeros(self.shown.shape, dtype=bool)
        start = 0
        if done is not None:
            start, elsewhere = int(done["next"]), done["elsewhere"].numpy().astype(bool)
            self._restore(done)
        places = _places_by_image(self.shown)
        latent_of = torch.as_tensor(np.asarray(self.features, dtype=np.int64))
        order = self.writer.order[start:]
        for place, (numbers, images) in enumerate(
            _batches(self.reader, order, "mapping patches of", self.progress)
        ):
            if images:
                pixels = encoder.pixels(images)
                covered = _covered(pixels, encoder.layout.grid)
                for number, image in zip(numbers, self.view(covered), strict=True):
                    self.writer.write(number, image)
                for part in encoder.encode(pixels) if encoder.has_patches else ():
                    if not encoder.has_patches:
                        break
                    chosen = numbers[part.start : part.start + len(part.values)]
                    self._map(part.values, chosen, places, latent_of, n_places, values, elsewhere)
            read = start + (place + 1) * BATCH
            if self.checkpoint.due and read % MAP_STEP == 0:
                values.flush()
                self.writer.finish()
                self._save(read, elsewhere)
        self.writer.finish()
        if not encoder.has_patches:
            return None
        return HeatMaps(values, elsewhere, encoder.layout.grid)

    def _map(
        self,
        latents: Tensor,
        numbers: list[int],
        places: dict[int, np.ndarray[Any, np.dtype[np.int64]]],
        latent_of: Tensor,
        n_places: int,
        values: np.memmap[Any, np.dtype[np.float16]],
        elsewhere: np.ndarray[Any, np.dtype[np.bool_]],
    ) -> None:
        """Put the latents of some images where they are shown."""
        nowhere = np.zeros(0, dtype=np.int64)
        found = [places.get(number, nowhere) for number in numbers]
        flat = np.concatenate(found)
        row = np.repeat(np.arange(len(numbers)), [len(each) for each in found])
        feature, place = np.divmod(flat, n_places)
        device, columns = latents.device, self.encoder.patch_columns.to(latents.device)
        picked = latents[torch.as_tensor(row, device=device), :, latent_of[feature].to(device)]
        patches = picked[:, columns].float().clamp(0, _FLOAT16_MAX)
        values[feature, place] = patches.cpu().numpy().astype(np.float16)
        is_elsewhere = picked.amax(1) > picked[:, columns].amax(1)
        elsewhere[feature, place] = is_elsewhere.cpu().numpy()
        if self.recorder is not None:
            for each, number in enumerate(numbers):
                if number in self.recorder.wanted:
                    self.recorder.add(number, latents[each], latents[each, columns])

    def _save(self, read: int, elsewhere: np.ndarray[Any, np.dtype[np.bool_]]) -> None:
        sizes = [[number, *size] for number, size in self.writer.small.sizes.items()]
        large = [[number, *size] for number, size in self.writer.large.sizes.items()]
        state = {
            "next": torch.tensor(read),
            "elsewhere": torch.as_tensor(elsewhere.astype(np.uint8)),
            "small": torch.tensor(sizes, dtype=torch.int64).reshape(-1, 3),
            "large": torch.tensor(large, dtype=torch.int64).reshape(-1, 3),
        }
        recorded = {} if self.recorder is None else self.recorder.state()
        self.checkpoint.save("maps", {**state, **recorded})

    def _restore(self, state: dict[str, Tensor]) -> None:
        for sheets, name in ((self.writer.small, "small"), (self.writer.large, "large")):
            sheets.sizes.update({n: (w, h) for n, w, h in state[name].tolist()})
        if self.recorder is not None:
            self.recorder.restore(state)


def _mapped(
    path: Path, shape: tuple[int, ...], *, new: bool
) -> np.memmap[Any, np.dtype[np.float16]]:
    """Return a file as numbers, with room for all of it: a full disk kills later writes."""
    if not new:
        return np.memmap(path, dtype=np.float16, mode="r+", shape=shape)
    if hasattr(os, "posix_fallocate") and all(shape):
        path.unlink(missing_ok=True)
        with path.open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, math.prod(shape) * 2)
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
) -> Iterator[tuple[list[int], list[Image.Image]]]:
    """Yield the readable images of each batch with their numbers; a batch may be empty."""
    parts = [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def read(part: Sequence[int]) -> dict[int, Image.Image | None]:
        return {n: reader.read(n) for n in part}

    # The next images are read while the model is at work on these.
    with Progress(len(numbers), what, shown=progress) as shown, ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(read, parts[0]) if parts else None
        for following in [*parts[1:], None]:
            if coming is None:
                break
            found = coming.result()
            coming = None if following is None else ahead.submit(read, following)
            readable = {n: image for n, image in found.items() if image is not None}
            yield list(readable), list(readable.values())
            shown.advance(len(found))


def _places_by_image(
    shown: np.ndarray[Any, np.dtype[np.int64]],
) -> dict[int, np.ndarray[Any, np.dtype[np.int64]]]:
    """Return the flat places of ``shown`` by the image at them."""
    flat = shown.reshape(-1)
    order = np.argsort(flat, kind="stable")
    numbers, starts = np.unique(flat[order], return_index=True)
    parts = np.split(order, starts[1:])
    return {int(number): part for number, part in zip(numbers, parts, strict=True)}
