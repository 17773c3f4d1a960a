"""The public function: it turns an SAE, its model and images into a folder of pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from vision_plugin._ours import REPORT, check_replaceable
from vision_plugin._paths import local_path
from vision_plugin.models.site import require_finite
from vision_plugin.report._build import Job, Sizes, build, make_steerer
from vision_plugin.report._encoding import TokenEncoder
from vision_plugin.report._folder import new_folder
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
    progress: bool = True,
) -> Path:
    """Write a folder of static pages in which an SAE's features can be browsed.

    The index sorts, searches and filters all features and shows the top images of each; every
    feature has a page with its top images and a random sample of those it fires on, each with
    a heat map over the patches, an activation histogram, decoder neighbours, and what steering
    does. It opens from the file system and fetches nothing.

    The model runs once on each image to rank them (unless ``latents`` are given), and once more on
    those shown for their heat maps. Memory does not grow with the number of images.
    The same input makes the same bytes. The folder appears, or is replaced, as a whole.

    Args:
        sae: A ``sae_lens.SAE`` whose metadata names a hook of the model.
        model: A VisionBridge. It may be None where ``latents`` are given; then there are no heat
            maps, and images are shown whole.
        images: An image source, a sequence of PIL images, or anything that ``open_images`` takes.
        output_path: Folder of the report. It may not exist, be empty, or hold an earlier report.
        latents: Precomputed latents per image, ``[n_images, d_sae]``, dense or sparse CSR or COO;
            by default the largest value over the image's tokens.
        scores: Arrays of one number per latent by column name, NaN where there is none.
        names: A text per latent, as a sequence of ``d_sae`` texts or a mapping from latents.
        tokens: ``"cls"``, ``"patch"`` or ``"all"``; by default the kind the SAE was trained on.
        features: Numbers of the latents to report; all by default.
        concepts: Texts, or texts with their embeddings [d_embed], whose probabilities are compared
            before and while each feature is held at ``strength`` (arXiv 2504.08729).
        steering: Precomputed effects of steering, by latent.
        strength: Activation that a latent is held at; 150 as in that paper.
        title: Heading of the index; by default it names the hook.
        n_top: Number of top images per feature.
        n_sample: Number of images drawn at random from those a feature fires on.
        n_neighbours: Number of decoder neighbours per feature.
        n_steered_images: Number of images, spread over the source, that are steered.
        image_size: Longest side of the images in the report, in pixels.
        max_bad_images: Number of unreadable images that are left out, with a warning and a note in
            the report, before an error.
        progress: Whether to show progress on a terminal, or log a line every half minute.

    Returns:
        Path of ``index.html``.

    Raises:
        FileExistsError: ``output_path`` holds something that is not a report.
        UnknownHookError: the model lacks the SAE's hook.
        ValueError: the arguments do not fit together, or too many images are broken.
    """
    place = local_path(output_path).resolve()
    check_replaceable(place, REPORT)
    sizes = Sizes(n_top, n_sample, n_neighbours, n_steered_images, image_size)
    if model is None and latents is None:
        raise ValueError("there are neither model= nor latents=: pass one of them")
    if model is None and concepts is not None:
        raise ValueError("concepts= needs a model: pass model=, or steering= in its place")
    d_sae = int(sae.cfg.d_sae)
    reader = ImageReader(images, max_bad_images=max_bad_images)
    if latents is not None:
        check_latents(latents, len(reader), d_sae)
    for latent in steering or {}:
        check_latent(latent, d_sae, "steering")
    if model is None:
        require_finite(sae)
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
        progress=progress,
    )
    with new_folder(place) as folder:
        build(job, folder)
    return place / "index.html"
