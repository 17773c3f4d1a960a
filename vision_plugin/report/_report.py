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
from vision_plugin.report._compare import read_compare
from vision_plugin.report._encoding import TokenEncoder
from vision_plugin.report._evaluation import chance_of, scores_of
from vision_plugin.report._folder import new_folder
from vision_plugin.report._images import ImageReader
from vision_plugin.report._inputs import (
    check_latent,
    check_latents,
    read_features,
    read_scores,
)
from vision_plugin.report._names import read_answers, read_names
from vision_plugin.report._resume import checkpoint_for, key_of, parts_of
from vision_plugin.report._steering import amounts_of
from vision_plugin.report._wandb import log_report
from vision_plugin.steering import Edit, SteeringEffect


def report(
    sae: Any,
    model: Any,
    images: Any,
    output_path: str | Path,
    *,
    latents: Any = None,
    scores: Mapping[str, Any] | None = None,
    names: Any = None,
    answers: Mapping[Any, Any] | None = None,
    evaluation: Mapping[str, Any] | None = None,
    training: Sequence[Mapping[str, Any]] = (),
    study: Mapping[str, Any] | None = None,
    compare: Any = None,
    tokens: str | None = None,
    features: Sequence[int] | Tensor | None = None,
    concepts: Mapping[str, Tensor] | Sequence[str] | None = None,
    steering: Mapping[int, SteeringEffect] | None = None,
    strength: float = 150.0,
    strengths: Sequence[int | float] = (),
    edit: Edit | None = None,
    layout: str = "auto",
    title: str | None = None,
    n_top: int = 16,
    n_sample: int = 20,
    n_neighbours: int = 8,
    n_steered_images: int = 8,
    n_image_pages: int = 200,
    image_size: int = 224,
    max_bad_images: int = 100,
    progress: bool = True,
) -> Path:
    """Write a folder of static pages in which an SAE's features can be browsed.

    The index sorts, filters and searches all features, by any column, by the labels of their top
    images and by brushing distributions and scatter plots. Every feature has a page: its top
    images and images from every fifth of its activations, each with a heat map over the patches;
    where it fires; decoder neighbours and features that fire on the same images; names and their
    checks; and what steering does. Further pages show images patch by patch, a map of the
    features, a comparison with other dictionaries, and a summary of the evaluation. All open from
    the file system and fetch nothing.

    The model runs once on each image, and the heat maps of those shown are kept meanwhile; where
    ``latents`` are given, it runs on the images shown alone. Memory does not grow with the number
    of images.
    The same input makes the same bytes. The folder appears, or is replaced, as a whole; a build
    that was killed goes on where it was, if the images have ids to be known by.

    Args:
        sae: A ``sae_lens.SAE`` whose metadata names a hook of the model.
        model: A VisionBridge. It may be None where ``latents`` are given; then there are no heat
            maps, and images are shown whole.
        images: An image source, a sequence of PIL images, or anything that ``open_images`` takes.
        output_path: Folder of the report. It may not exist, be empty, or hold an earlier report.
        latents: Precomputed latents per image, ``[n_images, d_sae]``, dense or sparse CSR or COO;
            by default the largest value over the image's tokens.
        scores: Arrays of one number per latent by column name, NaN where there is none.
        names: A text per latent, as a sequence of ``d_sae`` texts or a mapping from latents. In
            place of a text there may be a mapping with ``name`` and any of ``method``, ``auroc``,
            ``low``, ``high`` and ``chance`` (how the name was found and checked), or several. What
            ``vp.name_features`` and ``vp.lens.read_names`` return will do as it is.
        answers: What a language model says: by latent, mappings with ``prompt``, ``before``,
            ``after``, ``strength`` and ``image``, a number of an image; or the ``to_dict()`` of
            what ``vp.tasks.feature_answers`` returns.
        evaluation: The JSON of ``vision-plugin eval``. Its scores become columns beside
            ``scores``, and its table the summary page.
        training: The lines of ``validation.jsonl``, for the curves of the summary page.
        study: The JSON of a sparsity study, for L0 and explained variance by layer.
        compare: Dictionaries of the same model to compare with: a mapping from names to SAEs, one
            SAE, or ``"neurons"``.
        tokens: ``"cls"``, ``"patch"`` or ``"all"``; by default the kind the SAE was trained on.
        features: Numbers of the latents to report; all by default.
        concepts: Texts, or texts with their embeddings [d_embed], whose probabilities are compared
            before and while each feature is held at ``strength`` (arXiv 2504.08729).
        steering: Precomputed effects of steering, by latent.
        strength: Activation that a latent is held at; 150 as in that paper.
        strengths: Further values to hold latents at, for a curve over strengths.
        edit: An edit of the SAE's latents to look at. Its amounts become a column; with
            ``concepts`` each of its latents is changed as it says in place of being held at
            ``strength``, and the summary page shows what all of it does.
        layout: How the map is laid out: ``"umap"``, which needs the extra ``map``; ``"pca"``;
            ``"auto"``, UMAP where it is installed; or ``"none"``.
        title: Heading of the index; by default it names the hook.
        n_top: Number of top images per feature.
        n_sample: Number of images drawn at random from those a feature fires on; they are shown by
            fifths of the activation.
        n_neighbours: Number of decoder neighbours, and of features that fire together.
        n_steered_images: Number of images, spread over the source, that are steered.
        n_image_pages: Number of images, spread over the source, that are shown patch by patch.
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

    Examples:
        >>> index = vp.report(sae, model, world.images, "report", features=[12, 13], layout="none")
        >>> index.name
        'index.html'
    """
    place = local_path(output_path).resolve()
    check_replaceable(place, REPORT)
    sizes = Sizes(n_top, n_sample, n_neighbours, n_steered_images, n_image_pages, image_size)
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
    others = read_compare(compare, sae)
    if others and (model is None or latents is not None):
        raise ValueError(
            "compare= needs a model that runs on the images: pass model= and no latents="
        )
    encoder = None if model is None else TokenEncoder(model, sae, tokens=tokens)
    job = Job(
        sae=sae,
        reader=reader,
        encoder=encoder,
        latents=latents,
        scores=read_scores(
            {**amounts_of(edit, sae), **scores_of(evaluation), **(scores or {})}, d_sae
        ),
        chance=chance_of(evaluation),
        names=read_names(names, d_sae),
        answers=read_answers(answers, d_sae, len(reader)),
        features=read_features(features, d_sae),
        steering=steering,
        steerer=make_steerer(
            concepts, encoder, reader, strength, strengths, sizes.n_steered_images, edit
        ),
        edit=edit,
        others=others,
        evaluation=evaluation,
        training=training,
        study=study,
        layout=layout,
        title=title,
        sizes=sizes,
        progress=progress,
    )
    parts = parts_of(sae, encoder, reader, sizes, job.features)
    if parts is not None:
        parts |= {f"compare {name}": _weights(one) for name, one in others.items()}
        parts["latents"] = latents is not None
    key = None if parts is None else key_of(parts)
    with checkpoint_for(place, key) as checkpoint, new_folder(place) as folder:
        build(job, folder, checkpoint)
    log_report(place, job.title or place.name)
    return place / "index.html"


def _weights(dictionary: Any) -> dict[str, Any]:
    """Return what tells one dictionary from another."""
    state = getattr(dictionary, "state_dict", dict)
    return dict(state())
