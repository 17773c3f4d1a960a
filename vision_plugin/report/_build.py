"""The inputs of a report, and the code that builds it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vision_plugin._allocator import freed_memory_kept
from vision_plugin._private import name_of, without_paths
from vision_plugin.report._columns import make_columns, states_of
from vision_plugin.report._compare import Other, compare_data, top_images_of
from vision_plugin.report._content import Content
from vision_plugin.report._encoding import TokenEncoder
from vision_plugin.report._evaluation import layer_charts, score_table, training_charts
from vision_plugin.report._feature_page import feature_pages, shift_rows
from vision_plugin.report._folder import write_marker
from vision_plugin.report._heat_maps import SCRATCH, HeatMaps
from vision_plugin.report._image_page import images_data, write_patches
from vision_plugin.report._images import ImageReader, ModelView
from vision_plugin.report._index_page import tiles
from vision_plugin.report._inputs import clean
from vision_plugin.report._map import FeatureMap, feature_map
from vision_plugin.report._names import Name
from vision_plugin.report._neighbours import decoder_neighbours
from vision_plugin.report._numbers import plain
from vision_plugin.report._pages import Pages
from vision_plugin.report._passes import (
    Counted,
    Counter,
    ImagePass,
    count,
    count_given,
    show_images,
    watch,
)
from vision_plugin.report._patches import PatchRecorder
from vision_plugin.report._places import TokenPlaces
from vision_plugin.report._resume import Checkpoint
from vision_plugin.report._scripts import write_script
from vision_plugin.report._sprites import ImageWriter
from vision_plugin.report._statistics import LatentStatistics
from vision_plugin.report._steering import Steerer, effects, shifts
from vision_plugin.report._together import KeptLatents, images_to_keep, partners
from vision_plugin.report._verify import write_checksums
from vision_plugin.report._views import Views
from vision_plugin.steering import Edit, SteeringEffect

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizes:
    """Numbers and sizes of the images and neighbours that a report shows."""

    n_top: int
    n_sample: int
    n_neighbours: int
    n_steered_images: int
    n_image_pages: int
    image_size: int

    def __post_init__(self) -> None:
        least = {"n_top": 1, "n_steered_images": 1, "image_size": 8}
        for name, value in asdict(self).items():
            if value < least.get(name, 0):
                raise ValueError(f"{name}={value}: use a whole number from {least.get(name, 0)} up")


@dataclass(frozen=True)
class Job:
    """The checked inputs of one report."""

    sae: Any
    reader: ImageReader
    encoder: TokenEncoder | None
    """Model and SAE; None where only ``latents`` are given."""
    latents: Any
    scores: dict[str, np.ndarray[Any, np.dtype[np.float64]]]
    chance: float
    names: list[tuple[Name, ...]] | None
    answers: dict[int, list[dict[str, Any]]]
    features: list[int]
    steering: Mapping[int, SteeringEffect] | None
    steerer: Steerer | None
    edit: Edit | None
    others: dict[str, Any]
    """Dictionaries to compare with, by name."""
    evaluation: Mapping[str, Any] | None
    training: Sequence[Mapping[str, Any]]
    study: Mapping[str, Any] | None
    layout: str
    title: str | None
    sizes: Sizes
    progress: bool


@dataclass(frozen=True)
class Gathered:
    """All that the pages are made from."""

    content: Content
    others: list[Other]
    recorder: PatchRecorder | None
    map: FeatureMap | None


def build(job: Job, folder: Path, checkpoint: Checkpoint) -> None:
    """Write the whole report into an empty folder."""
    with freed_memory_kept():
        gathered = _gather(job, folder, checkpoint)
    content = gathered.content
    pages = Pages(folder, content.pages)
    pages.write_assets()
    made = feature_pages(content, effects(job.steering, job.steerer, job.features))
    pages.write_features(
        watch(made, "writing pages", progress=job.progress, total=len(job.features))
    )
    pages.write_index(content)
    if gathered.map is not None:
        places = [[plain(float(v), 4) for v in point] for point in gathered.map.points]
        about = {"method": gathered.map.method, "note": gathered.map.note, "points": places}
        write_script(folder / "map.js", "MAP", about)
        pages.write("map.html", content, note=gathered.map.note)
    if gathered.recorder is not None:
        numbers = write_patches(folder, content, gathered.recorder.records())
        pages.write("images.html", content, data=images_data(content, numbers))
    if gathered.others:
        write_script(
            folder / "compare.js", "COMPARE", compare_data(content, job.sae, gathered.others)
        )
        pages.write("compare.html", content)
    pages.write("summary.html", content, tiles=tiles(content), **_summary(job))
    write_marker(folder, _about(content))
    (folder / SCRATCH).unlink(missing_ok=True)
    write_checksums(folder)


def _summary(job: Job) -> dict[str, Any]:
    whole = None if job.steerer is None else job.steerer.whole_edit()
    return {
        "edit": [] if job.edit is None else [clean(line) for line in str(job.edit).splitlines()],
        "edit_shifts": [] if whole is None else shift_rows(shifts(whole)),
        "n_steered": 0 if whole is None else len(whole.before),
        "table": None if job.evaluation is None else score_table(job.evaluation),
        "training": training_charts(job.training),
        "layers": [] if job.study is None else layer_charts(job.study),
    }


def make_steerer(
    concepts: Mapping[str, Tensor] | Sequence[str] | None,
    encoder: TokenEncoder | None,
    reader: ImageReader,
    strength: float,
    strengths: Sequence[int | float],
    n_images: int,
    edit: Edit | None,
) -> Steerer | None:
    """Return a steerer for images spread over the source; None without concepts or a model."""
    if concepts is None or encoder is None:
        return None
    # Only the first images of a stream are cheap to read.
    step = 1 if reader.sequential else max(1, len(reader) // n_images)
    numbers = range(0, len(reader), step)[:n_images]
    found = {n: image for n in numbers if (image := reader.read(n)) is not None}
    if not found:
        raise ValueError(
            f"none of the {len(numbers)} images to steer could be read: raise "
            "n_steered_images=, or mend images="
        )
    return Steerer(
        encoder.model,
        encoder.sae,
        encoder.pixels(list(found.values())),
        concepts,
        strength=strength,
        strengths=strengths,
        numbers=list(found),
        tokens=encoder.tokens,
        edit=edit,
    )


def _gather(job: Job, folder: Path, checkpoint: Checkpoint) -> Gathered:
    """Run both passes, and join what they found."""
    # What outlasts a kill lies beside the folder, which does not, until it is whole.
    place = checkpoint.place or folder
    counted, others, kept = _count(job, place, checkpoint)
    summary, recorder = counted.summary, kept.recorder
    shown = torch.cat([summary.top.images, summary.sample.images], dim=1)[job.features].numpy()
    wanted = frozenset() if recorder is None else recorder.wanted
    steered = () if job.steerer is None else job.steerer.numbers
    asked = {row["image"] for rows in job.answers.values() for row in rows} - {None}
    beside = {*wanted, *steered, *asked, *top_images_of(others)}
    order = sorted({*np.unique(shown).tolist(), *beside} - {-1})
    writer = _write_images(job, shown, order, kept, place, checkpoint)
    if place != folder:
        for name in ("images", "thumbs"):
            (place / name).rename(folder / name)
    together = partners(counted.kept, job.features, counted.kept, job.sizes.n_neighbours)
    placed = feature_map(job.sae, job.features, job.layout)
    there = {
        "index.html": True,
        "map.html": placed is not None,
        "images.html": recorder is not None and bool(recorder.found),
        "compare.html": bool(others),
        "summary.html": True,
    }
    content = Content(
        title=clean(without_paths(job.title or _title(job.sae))),
        facts=tuple(_facts(job, counted)),
        tokens=None if job.encoder is None or job.latents is not None else job.encoder.tokens,
        features=job.features,
        names=job.names,
        answers=job.answers,
        columns=make_columns(counted, job.scores, job.names, job.reader, chance=job.chance),
        states=states_of(counted),
        counted=counted,
        shown=shown,
        n_top=job.sizes.n_top,
        reader=job.reader,
        writer=writer,
        heat=kept.maps,
        neighbours=decoder_neighbours(job.sae, job.features, job.sizes.n_neighbours),
        together=together,
        pages=tuple(address for address, is_there in there.items() if is_there),
        image_pages=frozenset(recorder.found) if recorder is not None else frozenset(),
    )
    return Gathered(content, others, recorder if there["images.html"] else None, placed)


@dataclass(frozen=True)
class Kept:
    """What the first pass keeps of the images shown, and the second completes."""

    views: Views | None
    """None where the model does not run, or its pixels are not colours."""
    maps: HeatMaps | None = None
    recorder: PatchRecorder | None = None
    done: dict[str, Tensor] | None = None
    """State of a build that was killed in its second pass."""


def _kept(job: Job, statistics: LatentStatistics, place: Path, checkpoint: Checkpoint) -> Kept:
    """Make room for heat maps, or take over those of a build that was killed."""
    encoder, sizes = job.encoder, job.sizes
    view = None if encoder is None else ModelView(encoder.model)
    if encoder is None or view is None:
        return Kept(None)
    if not view.usable:
        logger.warning("the model's pixels are not colours, so the report has no heat maps")
        return Kept(None)
    views = Views(view, encoder.layout.grid, statistics.shown, torch.tensor(job.features))
    if not encoder.has_patches:
        return Kept(views, done=checkpoint.load("maps"))
    columns = encoder.patch_columns
    done = checkpoint.load("maps") if (place / SCRATCH).is_file() else None
    maps = HeatMaps(
        place,
        statistics.shown,
        job.features,
        sizes.n_top + sizes.n_sample,
        encoder.layout.grid,
        columns,
        outlasts=checkpoint.folder is not None,
    )
    wanted = _image_pages(job)
    d_sae = int(job.sae.cfg.d_sae)
    recorder = PatchRecorder(wanted, job.features, d_sae, columns) if wanted else None
    if done is not None:
        maps.restore(done)
        if recorder is not None:
            recorder.restore(done)
    return Kept(views, maps, recorder, done)


def _count(job: Job, place: Path, checkpoint: Checkpoint) -> tuple[Counted, list[Other], Kept]:
    """Run the first pass over the SAE and what it is compared with."""
    d_sae, sizes = int(job.sae.cfg.d_sae), job.sizes
    widest = max([d_sae, *(int(one.cfg.d_sae) for one in job.others.values())])
    keep = images_to_keep(len(job.reader), len(job.features), widest)

    def counter(encoder: TokenEncoder | None, d: int, n_sample: int) -> Counter:
        kinds = None if encoder is None else encoder.site.token_kinds or ("pooled",)
        return Counter(
            encoder,
            LatentStatistics(d, n_top=sizes.n_top, n_sample=n_sample),
            None if kinds is None else TokenPlaces(d, kinds),
            KeptLatents(d, keep),
        )

    given = job.latents is not None or job.encoder is None
    main = counter(None if given else job.encoder, d_sae, sizes.n_sample)
    kept = _kept(job, main.statistics, place, checkpoint)
    if given:
        return count_given(job.latents, main), [], kept
    assert job.encoder is not None
    if kept.done is None:
        main.maps, main.recorder, main.views = kept.maps, kept.recorder, kept.views
    model, tokens = job.encoder.model, job.encoder.tokens
    counters = [main]
    for one in job.others.values():
        encoder = TokenEncoder(model, one, tokens=tokens)
        counters.append(counter(encoder, int(one.cfg.d_sae), 0))
    counted, *rest = count(job.reader, counters, progress=job.progress, checkpoint=checkpoint)
    if counted.summary.n_images == 0:
        raise ValueError(f"none of the {len(job.reader)} images could be read: mend images=")
    pairs = zip(job.others.items(), rest, strict=True)
    return counted, [Other(name, one, found) for (name, one), found in pairs], kept


def _image_pages(job: Job) -> list[int]:
    """Return the images that have a page of their own, spread over the source."""
    n = min(job.sizes.n_image_pages, len(job.reader))
    return sorted({i * len(job.reader) // n for i in range(n)})


def _write_images(
    job: Job,
    shown: np.ndarray[Any, np.dtype[np.int64]],
    order: list[int],
    kept: Kept,
    place: Path,
    checkpoint: Checkpoint,
) -> ImageWriter:
    """Write small copies of the images shown, and complete their heat maps."""
    size, n_features = job.sizes.image_size, len(job.features)
    if kept.views is None or job.encoder is None:
        writer = ImageWriter(place, order, size=size, n_features=n_features)
        show_images(job.reader, writer, progress=job.progress)
        return writer
    size = min(size, max(kept.views.view.size))
    writer = ImageWriter(place, order, size=size, n_features=n_features)
    ImagePass(
        job.reader,
        job.encoder,
        kept.views,
        writer,
        shown,
        kept.maps,
        kept.recorder,
        kept.done,
        checkpoint,
        job.progress,
    ).run()
    return writer


def _title(sae: Any) -> str:
    return f"Features at {sae.cfg.metadata.get('hook_name') or 'an unnamed hook'}"


def _facts(job: Job, counted: Counted) -> list[str]:
    cfg = job.sae.cfg
    architecture = cfg.architecture() if callable(getattr(cfg, "architecture", None)) else "SAE"
    facts = [f"{architecture}, {int(cfg.d_in):,} → {counted.summary.d_sae:,}"]
    facts.append(cfg.metadata.get("hook_name"))
    if job.encoder is None:
        facts.append(_model_name(cfg.metadata.get("model_name")))
    else:
        tokens = job.encoder.tokens
        facts.append(_model_name(job.encoder.model.cfg.model_name))
        facts.append("all tokens" if tokens == "all" else f"{tokens} tokens")
    facts.append(f"{counted.summary.n_images:,} images")
    return [clean(without_paths(str(fact))) for fact in facts if fact]


def _model_name(name: Any) -> str:
    """Return the name of a model; the last part of it where it is a folder here."""
    text = name_of(str(name or ""))
    return Path(text).name if name and Path(str(name)).is_dir() else text


def _about(content: Content) -> dict[str, Any]:
    return {
        "title": content.title,
        "facts": list(content.facts),
        "n_features": len(content.features),
        "n_images": content.n_images,
        "n_bad_images": len(content.reader.bad),
    }
