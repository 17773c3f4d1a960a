"""The one public function: from an SAE, its model and images to a folder of pages."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vision_plugin.report._build import Job, Sizes, build, make_steerer
from vision_plugin.report._encoding import TokenEncoder
from vision_plugin.report._folder import check_replaceable, new_folder
from vision_plugin.report._images import ImageReader
from vision_plugin.report._inputs import (
    check_latent,
    check_latents,
    read_features,
    read_names,
    read_scores,
)
from vision_plugin.steering import SteeringEffect


def report(
    sae: Any,
    model: Any,
    images: Any,
    output_path: str | Path,
    *,
    latents: Any = None,
    scores: Mapping[str, Any] | None = None,
    names: Any = None,
    tokens: str | None = None,
    features: Sequence[int] | Tensor | None = None,
    concepts: Mapping[str, Tensor] | Sequence[str] | None = None,
    steering: Mapping[int, SteeringEffect] | None = None,
    strength: float = 150.0,
    title: str | None = None,
    n_top: int = 16,
    n_sample: int = 8,
    n_neighbours: int = 8,
    n_steered_images: int = 8,
    image_size: int = 224,
    max_bad_images: int = 100,
    progress: bool | None = None,
) -> Path:
    """Write a folder of static pages in which an SAE's features can be browsed.

    The index sorts, searches and filters all features and shows the top images of each; every
    feature has a page with its top images and a random sample of those it fires on, each with
    a heat map over the patches, an activation histogram, decoder neighbours, and what steering
    does. It opens from the file system and fetches nothing.

    Images are run through the model once to rank them (not where ``latents`` are given), and
    those shown once more for their heat maps. Memory does not grow with the number of images.
    The same input makes the same bytes. The folder appears, or is replaced, as a whole.

    Args:
        sae: A ``sae_lens.SAE`` whose metadata names a hook of the model.
        model: A VisionBridge. None will do where ``latents`` are given; then there are no heat
            maps, and images are shown whole.
        images: An image source, a sequence of PIL images, or anything that ``open_images`` takes.
        output_path: Folder of the report. It may not exist, be empty, or hold an earlier report.
        latents: Latents per image, [n_images, d_sae], dense or sparse CSR or COO, if they are at
            hand; else the largest value over the image's tokens is computed.
        scores: One number per latent by column name, NaN where there is none.
        names: A text per latent, as a sequence of d_sae or a mapping from latents.
        tokens: ``"cls"``, ``"patch"`` or ``"all"``; by default what the SAE was trained on.
        features: The latents to report; all by default.
        concepts: Texts, or texts with their embeddings [d_embed], whose probabilities are compared
            before and while each feature is held at ``strength`` (arXiv 2504.08729).
        steering: The same, computed before, by latent.
        strength: What a latent is held at.
        title: Heading of the index.
        n_top: Top images per feature.
        n_sample: Images drawn at random from those a feature fires on.
        n_neighbours: Decoder neighbours per feature.
        n_steered_images: Images, spread over the source, that are steered.
        image_size: Longest side of the images in the report, in pixels.
        max_bad_images: Unreadable images that are left out, with a warning and a note in the
            report, before giving up.
        progress: Show progress bars; by default on a terminal.

    Returns:
        Path of ``index.html``.

    Raises:
        FileExistsError: ``out`` holds something that is no report.
        UnknownHookError: the model lacks the SAE's hook.
        ValueError: what was handed in does not fit together, or too many images are broken.
    """
    place = Path(output_path).expanduser().resolve()
    check_replaceable(place)
    sizes = Sizes(n_top, n_sample, n_neighbours, n_steered_images, image_size)
    if model is None and latents is None:
        raise ValueError("without a model the latents are needed: pass latents=, or the model")
    if model is None and concepts is not None:
        raise ValueError("steering towards concepts needs the model: pass it, or steering=")
    d_sae = int(sae.cfg.d_sae)
    reader = ImageReader(images, max_bad_images=max_bad_images)
    if latents is not None:
        check_latents(latents, len(reader), d_sae)
    for latent in steering or {}:
        check_latent(latent, d_sae, "steering")
    encoder = None if model is None else TokenEncoder(model, sae, tokens=tokens)
    job = Job(
        sae=sae,
        reader=reader,
        encoder=encoder,
        latents=latents,
        scores=read_scores(scores, d_sae),
        names=read_names(names, d_sae),
        features=read_features(features, d_sae),
        steering=steering,
        steerer=make_steerer(concepts, encoder, reader, strength, sizes.n_steered_images),
        title=title,
        sizes=sizes,
        progress=sys.stderr.isatty() if progress is None else progress,
    )
    with new_folder(place) as folder:
        build(job, folder)
    return place / "index.html"
