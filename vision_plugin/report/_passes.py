"""The two passes over the images: all images for ranking and heat maps, those shown for copies."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vision_plugin._progress import Progress
from vision_plugin.evaluation import Facts, Group, ImageBatch, Loop, Place, Subject
from vision_plugin.metrics import MetricSet
from vision_plugin.report._encoding import CHUNK_ELEMENTS, TokenEncoder
from vision_plugin.report._heat_maps import HeatMaps
from vision_plugin.report._images import ImageReader
from vision_plugin.report._patches import PatchRecorder
from vision_plugin.report._places import Places, TokenPlaces
from vision_plugin.report._resume import Checkpoint, no_checkpoint
from vision_plugin.report._sprites import ImageWriter
from vision_plugin.report._statistics import LatentStatistics, LatentSummary
from vision_plugin.report._together import Kept, KeptLatents
from vision_plugin.report._views import Views

BATCH = 32
_AHEAD = 2
"""Batches that are read and prepared ahead."""
MAP_STEP = 256
"""Images between two places at which the second pass can go on; a sheet of thumbnails."""
_Item = TypeVar("_Item")


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
    maps: HeatMaps | None = None
    recorder: PatchRecorder | None = None
    views: Views | None = None

    def metrics(self) -> dict[str, Any]:
        """Return the metrics that the loop feeds; what follows the ranking comes after it."""
        found: dict[str, Any] = {"ranking": self.statistics, "places": self.places}
        found |= {"kept": self.kept, "maps": self.maps, "images": self.recorder}
        found["views"] = self.views
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
    for batch, pixels in _batches(reader, numbers, first.pixels, "encoding", progress, size=size):
        if pixels is not None:
            loop.feed(ImageBatch(batch, pixels))
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
    for numbers, images in _batches(reader, writer.order, list, "writing", progress):
        for number, image in zip(numbers, images or (), strict=True):
            writer.write(number, image)
    writer.finish()


@dataclass
class ImagePass:
    """The second pass: images as the model sees them, and the heat maps that were not kept."""

    reader: ImageReader
    encoder: TokenEncoder
    views: Views
    writer: ImageWriter
    shown: np.ndarray[Any, np.dtype[np.int64]]
    """Image numbers or -1, ``[features, places]``."""
    maps: HeatMaps | None
    recorder: PatchRecorder | None
    """Records the images that have a page of their own."""
    done: dict[str, Tensor] | None
    """State of a killed build, whose maps and records are taken over already."""
    checkpoint: Checkpoint
    progress: bool

    def run(self) -> None:
        """Write the images, and run the model on those that lack a map."""
        done = self.done
        start = 0 if done is None else int(done["next"])
        for sheets, name in ((self.writer.small, "small"), (self.writer.large, "large")):
            found = [] if done is None else done[name].tolist()
            sheets.sizes.update({n: (w, h) for n, w, h in found})
        lacking = self._lacking()
        kept = self.views.kept.keys() - lacking
        order, read = self.writer.order[start:], start
        batches = _batches(
            self.reader, order, self._view, "writing images", self.progress, known=kept
        )
        for numbers, made in batches:
            pixels, images = (None, []) if made is None else made
            others = iter(images)
            for number in numbers:
                image = self.views.take(number) if number in kept else next(others)
                self.writer.write(number, image)
            if pixels is not None:
                self._feed(pixels, [n for n in numbers if n not in kept], lacking)
            read += BATCH
            if self.checkpoint.due and read % MAP_STEP == 0:
                self.writer.finish()
                self._save(read)
        self.writer.finish()

    def _view(self, images: list[Image.Image]) -> tuple[Tensor, list[Image.Image]]:
        pixels = self.encoder.pixels(images)
        return pixels, self.views.of(pixels)

    def _lacking(self) -> set[int]:
        """Return the images that the model must run on again."""
        found = set() if self.maps is None else self.maps.missing(self.shown)
        if self.recorder is not None:
            found |= self.recorder.wanted - self.recorder.found.keys()
        return found

    def _feed(self, pixels: Tensor, numbers: list[int], lacking: set[int]) -> None:
        rows = [row for row, number in enumerate(numbers) if number in lacking]
        if not rows:
            return
        chosen = torch.tensor([numbers[row] for row in rows])
        for latents, indices in self.encoder.encode(pixels[rows], chosen):
            for metric in (self.maps, self.recorder):
                if metric is not None:
                    metric.update(latents, indices)

    def _save(self, read: int) -> None:
        state = {"next": torch.tensor(read)}
        for sheets, name in ((self.writer.small, "small"), (self.writer.large, "large")):
            sizes = [[number, *size] for number, size in sheets.sizes.items()]
            state[name] = torch.tensor(sizes, dtype=torch.int64).reshape(-1, 3)
        for metric in (self.maps, self.recorder):
            state |= {} if metric is None else metric.state()
        self.checkpoint.save("maps", state)


def watch(items: Iterable[_Item], what: str, *, progress: bool, total: int) -> Iterator[_Item]:
    """Yield the items and show how far it is."""
    with Progress(total, what, shown=progress, of="pages") as shown:
        for item in items:
            yield item
            shown.advance(1)


def _batches(
    reader: ImageReader,
    numbers: Sequence[int],
    make: Callable[[list[Image.Image]], _Item],
    what: str,
    progress: bool,
    *,
    size: int = BATCH,
    known: Container[int] = (),
) -> Iterator[tuple[list[int], _Item | None]]:
    """Yield the numbers of the readable images of each batch, and what is made of those read.

    Where none was read, that is None. Images that are known are not read.
    """
    parts = [numbers[start : start + size] for start in range(0, len(numbers), size)]

    def read(part: Sequence[int]) -> dict[int, Image.Image | None]:
        found = {n: None if n in known else reader.read(n) for n in part}
        return {n: image for n, image in found.items() if image is not None or n in known}

    def prepare(reading: Future[dict[int, Image.Image | None]]) -> tuple[list[int], _Item | None]:
        found = reading.result()
        images = [image for image in found.values() if image is not None]
        return list(found), make(images) if images else None

    # The next images are read and prepared while the model is at work on these.
    readers, makers = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
    with Progress(len(numbers), what, shown=progress) as shown, readers, makers:
        reading = (readers.submit(read, part) for part in parts)
        coming = deque(makers.submit(prepare, next(reading)) for _ in parts[:_AHEAD])
        for part in parts:
            found = coming.popleft().result()
            following = next(reading, None)
            if following is not None:
                coming.append(makers.submit(prepare, following))
            yield found
            shown.advance(len(part))
