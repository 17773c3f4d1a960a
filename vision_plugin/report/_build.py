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

from vision_plugin.report._content import Content, feature_pages
from vision_plugin.report._encoding import TokenEncoder
from vision_plugin.report._folder import write_marker
from vision_plugin.report._images import LOSSLESS_BELOW, ImageReader, ImageWriter, ModelView
from vision_plugin.report._inputs import clean
from vision_plugin.report._neighbours import decoder_neighbours
from vision_plugin.report._pages import write_assets, write_features, write_index
from vision_plugin.report._passes import (
    HeatMaps,
    map_heat,
    show_images,
    summarise,
    summarise_given,
    watch,
)
from vision_plugin.report._statistics import LatentStatistics, LatentSummary
from vision_plugin.report._steering import Steerer, effects
from vision_plugin.report._verify import write_checksums
from vision_plugin.steering import SteeringEffect

logger = logging.getLogger(__name__)

_SCRATCH = "heat.part"


@dataclass(frozen=True)
class Sizes:
    """Numbers and sizes of the images and neighbours that a report shows."""

    n_top: int
    n_sample: int
    n_neighbours: int
    n_steered_images: int
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
    names: list[str] | None
    features: list[int]
    steering: Mapping[int, SteeringEffect] | None
    steerer: Steerer | None
    title: str | None
    sizes: Sizes
    progress: bool


def build(job: Job, folder: Path) -> None:
    """Write the whole report into an empty folder."""
    summary = _summarise(job)
    shown = torch.cat([summary.top.images, summary.sample.images], dim=1)[job.features].numpy()
    writer, heat = _write_images(job, shown, folder)
    content = Content(
        title=clean(job.title or _title(job.sae)),
        facts=tuple(clean(fact) for fact in _facts(job, summary)),
        tokens=None if job.encoder is None or job.latents is not None else job.encoder.tokens,
        features=job.features,
        names=job.names,
        scores=job.scores,
        summary=summary,
        shown=shown,
        n_top=job.sizes.n_top,
        reader=job.reader,
        writer=writer,
        heat=heat,
        neighbours=decoder_neighbours(job.sae, job.features, job.sizes.n_neighbours),
    )
    effect_of = effects(job.steering, job.steerer, job.features)
    n_pages = len(job.features)
    pages = watch(
        feature_pages(content, effect_of), "writing pages", progress=job.progress, total=n_pages
    )
    write_assets(folder)
    write_features(folder, pages)
    write_index(folder, content)
    write_marker(folder, _about(content))
    (folder / _SCRATCH).unlink(missing_ok=True)
    write_checksums(folder)


def make_steerer(
    concepts: Mapping[str, Tensor] | Sequence[str] | None,
    encoder: TokenEncoder | None,
    reader: ImageReader,
    strength: float,
    n_images: int,
) -> Steerer | None:
    """Return a steerer for images spread over the source; None without concepts or a model."""
    if concepts is None or encoder is None:
        return None
    # Only the first images of a stream are cheap to read.
    step = 1 if reader.sequential else max(1, len(reader) // n_images)
    numbers = range(0, len(reader), step)[:n_images]
    images = [image for n in numbers if (image := reader.read(n)) is not None]
    if not images:
        raise ValueError(
            f"none of the {len(numbers)} images to steer could be read: raise "
            "n_steered_images=, or mend images="
        )
    return Steerer(
        encoder.model,
        encoder.sae,
        encoder.pixels(images),
        concepts,
        strength=strength,
        tokens=encoder.tokens,
    )


def _summarise(job: Job) -> LatentSummary:
    d_sae, sizes = int(job.sae.cfg.d_sae), job.sizes
    statistics = LatentStatistics(d_sae, n_top=sizes.n_top, n_sample=sizes.n_sample)
    if job.latents is not None or job.encoder is None:
        return summarise_given(job.latents, statistics)
    summary = summarise(job.reader, job.encoder, statistics, progress=job.progress)
    if summary.n_images == 0:
        raise ValueError(f"none of the {len(job.reader)} images could be read: mend images=")
    return summary


def _write_images(
    job: Job, shown: np.ndarray[Any, np.dtype[np.int64]], folder: Path
) -> tuple[ImageWriter, HeatMaps | None]:
    """Write small copies of the images shown; return heat maps if the model can run on them."""
    images, size = folder / "images", job.sizes.image_size
    view = None if job.encoder is None else ModelView(job.encoder.model)
    if job.encoder is None or view is None or not view.usable:
        if view is not None:
            logger.warning("the model's pixels are not colours, so the report has no heat maps")
        writer = ImageWriter(images, size=size, lossless=False)
        show_images(job.reader, writer, shown, progress=job.progress)
        return writer, None
    writer = ImageWriter(images, size=size, lossless=max(view.size) <= LOSSLESS_BELOW)
    heat = map_heat(
        job.reader,
        job.encoder,
        view,
        writer,
        shown,
        job.features,
        folder / _SCRATCH,
        progress=job.progress,
    )
    return writer, heat


def _title(sae: Any) -> str:
    return f"Features at {sae.cfg.metadata.get('hook_name') or 'an unnamed hook'}"


def _facts(job: Job, summary: LatentSummary) -> list[str]:
    cfg = job.sae.cfg
    architecture = cfg.architecture() if callable(getattr(cfg, "architecture", None)) else "SAE"
    facts = [f"{architecture}, {int(cfg.d_in):,} → {summary.d_sae:,}"]
    facts.append(cfg.metadata.get("hook_name"))
    if job.encoder is None:
        facts.append(cfg.metadata.get("model_name"))
    else:
        tokens = job.encoder.tokens
        facts.append(job.encoder.model.cfg.model_name)
        facts.append("all tokens" if tokens == "all" else f"{tokens} tokens")
    facts.append(f"{summary.n_images:,} images")
    return [str(fact) for fact in facts if fact]


def _about(content: Content) -> dict[str, Any]:
    return {
        "title": content.title,
        "facts": list(content.facts),
        "n_features": len(content.features),
        "n_images": content.n_images,
        "n_bad_images": len(content.reader.bad),
    }
