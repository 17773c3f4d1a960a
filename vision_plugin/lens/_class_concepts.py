"""A class taken apart into concepts, each with how much the class's answer depends on it.

CRAFT (Fel et al. 2023, arXiv 2211.10154): a dictionary is fitted to the activations of a class's
images, and Sobol's total indices say how much the answer for the class depends on each latent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin._extras import require_sklearn
from vision_plugin._inputs import check_template, sentences
from vision_plugin.evaluation import class_of_images
from vision_plugin.images import open_images
from vision_plugin.lens._class_concepts_result import ClassConcepts, Deletion
from vision_plugin.lens._craft import (
    Scaled,
    Score,
    check_design,
    dense_latents,
    importance_of,
)
from vision_plugin.lens._dictionaries import fit_dictionary
from vision_plugin.lens._pixels import pixel_batches
from vision_plugin.lens._texts import unit
from vision_plugin.metrics import neuron_dictionary
from vision_plugin.models.dictionary import Dictionary, encode_and_decode
from vision_plugin.models.site import Site, hook_width

LEAST = 10
"""Fewest images of the class: half of them are fitted to, importance is of others."""
MOST_ROWS = 20_000
"""Most activations that a dictionary is fitted to; of more, as many are drawn."""
MOST_PROBED = 1000
"""Most images of other classes that a probe is fitted to; of more, as many are drawn."""
RANDOM_ORDERS = 5


@dataclass(frozen=True, kw_only=True)
class ClassConceptsSettings:
    """How a class is taken apart into concepts.

    Examples:
        >>> vp.lens.ClassConceptsSettings(method="ica").n_features
        12
    """

    labels: str | None = None
    """Classes of the images, as ``column:NAME``; by default the labels of the images."""
    method: str = "semi_nmf"
    """Dictionary that is fitted where no SAE is given: ``nmf``, ``semi_nmf``, ``ica`` or
    ``kmeans``."""
    n_features: int = 12
    """Concepts of the dictionary that is fitted."""
    hook_name: str | None = None
    """Hook of the dictionary that is fitted; by default behind the last block but one."""
    tokens: str = "patch"
    """Kind of token that it is fitted to."""
    n_images: int = 8
    """Images that importance is measured on, none of which the dictionary was fitted to."""
    design: int = 32
    """Points of Sobol's sequence, a power of 2; an image takes ``design * (concepts + 2)``
    passes."""
    template: str = "a photo of a {}."
    """Sentence about a class, for a model with a text tower; other models are read by a linear
    probe that is fitted to the other images."""
    top: int = 6
    """Images that are shown of each concept."""
    batch_size: int = 64
    """Images per forward pass."""
    seed: int = 0
    """Seed of the split, of the fit and of the sequence."""

    def __post_init__(self) -> None:
        check_template(self.template, argument="template")
        check_design(self.design)
        for name in ("n_features", "n_images", "top", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


@torch.no_grad()
def class_concepts(
    model: Any,
    images: Any,
    class_name: str,
    *,
    sae: Dictionary | None = None,
    settings: ClassConceptsSettings | None = None,
    progress: bool = True,
) -> ClassConcepts:
    """Take a class apart into concepts, and say how much its answer depends on each.

    The answer is the zero-shot logit of the class, or that of a linear probe for a model without a
    text tower. An index has no sign, so what taking a concept out alone does to the answer stands
    beside it. A deletion curve checks the indices: how far the answer moves while concepts are
    taken out, the most important first, the least important first, and in random orders.

    Examples:
        >>> settings = vp.lens.ClassConceptsSettings(
        ...     labels="column:shape", n_features=2, n_images=1, design=2
        ... )
        >>> found = vp.lens.class_concepts(
        ...     model, "demo:120", "star", settings=settings, progress=False
        ... )
        >>> sorted(found.importance.ranked()), found.read_by
        ([0, 1], 'zero-shot')

    Args:
        model: A VisionBridge.
        images: Whatever ``vp.open_images`` takes, with labels.
        class_name: The class.
        sae: An SAE, or any dictionary at a hook, in place of one that is fitted here.
        settings: How the class is taken apart.
        progress: Show how far the images are.

    Raises:
        ValueError: there is no such class, or it has too few images.
        ImportError: scikit-learn is missing.
    """
    cfg = settings or ClassConceptsSettings()
    source = open_images(images)
    of_image = class_of_images(source, cfg.labels)
    fitted, held = _split(of_image, class_name, cfg)
    pixels = _pixels(model, source, held, cfg, progress)
    own = _pixels(model, source, fitted, cfg, progress)
    dictionary = _fit(model, own, cfg) if sae is None else sae
    answer, read_by = _answer(model, source, of_image, class_name, fitted, cfg, progress)
    site = Site.of(model, dictionary)
    scaled = Scaled(site, dictionary, pixels, answer, cfg.batch_size)
    importance = importance_of(scaled, None, cfg.design, cfg.seed)
    strongest, shares = _strongest(site, dictionary, own, importance.latents, cfg)
    deletion, alone = _deletion(scaled, importance.latents, importance.ranked(), cfg.seed)
    return ClassConcepts(
        model=str(model.cfg.model_name),
        class_name=class_name,
        hook_name=str(dictionary.cfg.metadata.get("hook_name")),
        settings=cfg,
        read_by=read_by,
        n_fitted=len(fitted) if sae is None else 0,
        explained_variance=_explained(dictionary, scaled.activations),
        importance=importance,
        fires_on=shares,
        strongest=[[fitted[row] for row in rows] for rows in strongest],
        alone=alone,
        deletion=deletion,
        dictionary=dictionary,
        images=source,
    )


def _split(
    of_image: Sequence[str], class_name: str, cfg: ClassConceptsSettings
) -> tuple[list[int], list[int]]:
    """Return the images of the class to fit to, and those that importance is measured on."""
    own = torch.tensor([row for row, name in enumerate(of_image) if name == class_name])
    if not len(own):
        known = ", ".join(sorted({name for name in of_image if name})[:8])
        raise ValueError(f"no image is of class {class_name!r}: there are {known}")
    if len(own) < LEAST:
        raise ValueError(
            f"{len(own)} images are of class {class_name!r}, and to find its concepts takes "
            f"{LEAST}: give more images, or another class"
        )
    generator = torch.Generator().manual_seed(cfg.seed)
    mixed = own[torch.randperm(len(own), generator=generator)].tolist()
    n_held = min(cfg.n_images, len(own) // 2)
    return sorted(mixed[n_held:]), sorted(mixed[:n_held])


def _pixels(
    model: Any, source: Any, places: list[int], cfg: ClassConceptsSettings, progress: bool
) -> Float[Tensor, "n channels height width"]:
    found = pixel_batches(
        model, source, batch_size=cfg.batch_size, title="images", places=places, progress=progress
    )
    return torch.cat([pixels for _, pixels in found])


def _fit(model: Any, pixels: Tensor, cfg: ClassConceptsSettings) -> Dictionary:
    """Return a dictionary fitted to the activations of images."""
    layers = int(model.cfg.n_layers)
    hook_name = cfg.hook_name or f"blocks.{max(0, layers - 2)}.hook_resid_post"
    neurons: Any = neuron_dictionary(hook_width(model, hook_name) or int(model.cfg.d_model))
    site = Site.of(model, neurons.at(hook_name, tokens=cfg.tokens))
    rows = _rows(site, pixels, cfg.batch_size)
    if len(rows) > MOST_ROWS:
        generator = torch.Generator().manual_seed(cfg.seed)
        rows = rows[torch.randperm(len(rows), generator=generator)[:MOST_ROWS]]
    made = fit_dictionary(rows, cfg.n_features, cfg.method, seed=cfg.seed)
    return made.at(hook_name, tokens=cfg.tokens)


def _rows(site: Site, pixels: Tensor, batch_size: int) -> Float[Tensor, "rows d"]:
    """Return the activations of all tokens of images."""
    harvest = site.harvester()
    parts = [site.read(harvest(batch)).source.flatten(0, 1) for batch in pixels.split(batch_size)]
    return torch.cat(parts).float()


def _answer(
    model: Any,
    source: Any,
    of_image: Sequence[str],
    class_name: str,
    fitted: list[int],
    cfg: ClassConceptsSettings,
    progress: bool,
) -> tuple[Score, str]:
    """Return the answer for the class, and what gives it.

    A probe is fitted to the images in ``fitted``, and to images of other classes.
    """
    classes = sorted({name for name in of_image if name})
    if len(classes) < 2:
        raise ValueError(
            f"every image is of class {class_name!r}, so there is no answer to take apart: give "
            "images of other classes, too"
        )
    number = classes.index(class_name)
    if model.tokenizer is not None and model.adapter.has_joint_space:
        texts = model.encode_text(sentences(cfg.template, classes, argument="template"))

        def logit(embedding: Tensor) -> Tensor:
            found: Tensor = model.zero_shot_logits(unit(embedding), texts.to(embedding))
            return found[:, number]

        return logit, "zero-shot"
    require_sklearn("a probe for a model without text")
    from sklearn.linear_model import LogisticRegression

    others = torch.tensor([at for at, name in enumerate(of_image) if name not in ("", class_name)])
    generator = torch.Generator().manual_seed(cfg.seed)
    drawn = others[torch.randperm(len(others), generator=generator)[:MOST_PROBED]].tolist()
    places = sorted([*drawn, *fitted])
    batches = pixel_batches(
        model, source, batch_size=cfg.batch_size, title="probe", places=places, progress=progress
    )
    seen: list[int] = []
    parts = []
    for some, pixels in batches:
        seen += some
        parts.append(unit(model.image_features(pixels).float()).cpu())
    truth = [of_image[place] == class_name for place in seen]
    probe = LogisticRegression(C=10.0, max_iter=1000, class_weight="balanced")
    probe.fit(torch.cat(parts).numpy(), truth)
    weight, bias = torch.from_numpy(probe.coef_[0]), float(probe.intercept_[0])

    def decision(embedding: Tensor) -> Tensor:
        return unit(embedding) @ weight.to(embedding) + bias

    return decision, "a linear probe"


def _strongest(
    site: Site,
    dictionary: Dictionary,
    pixels: Tensor,
    latents: Sequence[int],
    cfg: ClassConceptsSettings,
) -> tuple[list[list[int]], list[float]]:
    """Return each latent's strongest images and on which share of the images it is above 0."""
    harvest = site.harvester()
    parts = []
    for batch in pixels.split(cfg.batch_size):
        dense = dense_latents(dictionary, site.read(harvest(batch)).source)
        parts.append(dense[:, :, list(latents)].amax(1).cpu())
    most = torch.cat(parts)
    best = most.topk(min(cfg.top, len(most)), dim=0).indices.T.tolist()
    return best, (most > 0).double().mean(0).tolist()


def _explained(dictionary: Dictionary, activations: Float[Tensor, "n tokens d"]) -> float:
    """Return the explained variance on images that the dictionary was not fitted to."""
    rows = activations.flatten(0, 1)
    _, decoded = encode_and_decode(dictionary, rows)
    missed = (rows - decoded).double().square().sum()
    total = (rows - rows.mean(0)).double().square().sum()
    return float(1 - missed / total)


def _deletion(
    scaled: Scaled, latents: Sequence[int], ranked: Sequence[int], seed: int
) -> tuple[Deletion, list[float]]:
    """Return how far the answer moves while latents are taken out, and what each does alone."""
    place = {latent: at for at, latent in enumerate(latents)}
    best = torch.tensor([place[latent] for latent in ranked])
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randperm(len(best), generator=generator) for _ in range(RANDOM_ORDERS)]
    orders = [best, best.flip(0), *drawn]
    steps = len(best) + 1
    factors = torch.ones(len(orders), steps, len(best))
    for number, order in enumerate(orders):
        for step in range(1, steps):
            factors[number, step:, order[step - 1]] = 0
    every = torch.cat([factors.flatten(0, 1), 1 - torch.eye(len(best))])
    answers = torch.stack(
        [scaled.answers(image, latents, every) for image in range(len(scaled.pixels))]
    )
    moved = answers - answers[:, :1]
    curves = moved[:, : -len(best)].abs().mean(0).view(len(orders), steps)
    found = Deletion(
        tuple(curves[0].tolist()), tuple(curves[1].tolist()), tuple(curves[2:].mean(0).tolist())
    )
    return found, moved[:, -len(best) :].mean(0).tolist()
