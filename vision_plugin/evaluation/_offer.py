"""What a metric can ask for by the name of a parameter: how it is made, when, and the hint if not.

``OF_A_BATCH`` holds what a metric's ``update`` may name, and ``OF_A_SUBJECT`` what its constructor
may name. The loop, the choice of metrics and their error messages all read these two tables.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from vision_plugin.evaluation._facts import Facts
from vision_plugin.evaluation._lazy_batch import LazyBatch
from vision_plugin.metrics import matryoshka_groups
from vision_plugin.models import TokenLatents
from vision_plugin.models.dictionary import Dictionary, d_out
from vision_plugin.models.site import Reading, Site, in_eval_mode

NO_HINT = "nothing that an evaluation has"


@dataclass(frozen=True)
class Place:
    """A dictionary at its site, and what is known of the images.

    Attributes:
        site: Hook and tokens.
        dictionary: What encodes there.
        facts: Labels, masks and taxonomy of the images.

    Examples:
        >>> site = vp.steering.Latents(sae).site(model, "all")
        >>> place = vp.evaluation.Place(site, sae, vp.evaluation.Facts(vp.open_images("demo:8")))
        >>> place.reads_text
        True
    """

    site: Site
    dictionary: Dictionary
    facts: Facts

    @property
    def reads_text(self) -> bool:
        """Whether the model compares images with texts."""
        model = self.site.model
        return model.tokenizer is not None and bool(model.adapter.has_joint_space)


@dataclass(frozen=True)
class ImageBatch:
    """A batch of images on its way through the loop.

    Attributes:
        indices: places of the images in their source.
        pixels: as the model wants them.
        embeddings: unit embeddings ``[n, d_embed]`` by the name of the embedder.
        given: entries that are at hand already, in place of those that the table makes.

    Examples:
        >>> batch = vp.evaluation.ImageBatch(list(range(8)), pixels, {"model": embeddings})
        >>> batch.pixels.shape
        torch.Size([8, 3, 64, 64])
    """

    indices: list[int]
    pixels: Tensor
    embeddings: Mapping[str, Tensor] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Offer:
    """What one batch of images gives one dictionary.

    Attributes:
        place: The dictionary at its site.
        batch: The images.
        reading: What the site reads for them.
        pooling: How tokens become images: ``"max"`` or ``"mean"``.
        class_texts: Text embeddings of the classes, ``[classes, d_embed]``; None without classes.

    Examples:
        >>> site = vp.steering.Latents(sae).site(model, "all")
        >>> place = vp.evaluation.Place(site, sae, vp.evaluation.Facts(vp.open_images("demo:8")))
        >>> subject = vp.evaluation.Subject("sae", place)
        >>> subject.add(["sparsity"], widths={})
        >>> loop = vp.evaluation.Loop([subject])
        >>> offer = loop.feed(vp.evaluation.ImageBatch(list(range(8)), pixels))
        >>> offer["latents"].shape
        torch.Size([8, 256])
    """

    place: Place
    batch: ImageBatch
    reading: Reading
    pooling: str
    class_texts: Tensor | None = None

    @cached_property
    def latents(self) -> TokenLatents:
        """Latents and reconstruction of the tokens."""
        return self.reading.encode(self.place.dictionary)

    @cached_property
    def entries(self) -> LazyBatch:
        """Every entry of the table that is there, made when it is first asked for."""
        itself = weakref.ref(self)  # a batch must go when its last reader lets go of it

        def made(make: Callable[[Offer], Any]) -> Any:
            offer = itself()
            assert offer is not None
            return make(offer)

        makers: dict[str, Callable[[], Any]] = {
            name: partial(made, entry.make)
            for name, entry in OF_A_BATCH.items()
            if entry.make is not None and entry.is_there(self.place)
        }
        makers |= self.latents.entries(self.pooling, self.place.site.patch_rows)
        return LazyBatch(makers).plus(**self.batch.given)

    def only(self, tokens: Int[Tensor, " chosen"]) -> LazyBatch:
        """Return the entries that are there for some of the selected tokens."""
        latents, reading = self.latents, self.reading
        rows = tokens.to(reading.target.device)
        makers: dict[str, Callable[[], Any]] = {
            "token_latents": lambda: latents.dense[:, rows],
            "activations": lambda: reading.target[:, rows],
            "reconstruction": lambda: latents.reconstruction[:, rows],
        }
        if latents.is_sparse:
            makers["sparse_token_latents"] = lambda: latents.flat(tokens)
        return LazyBatch(makers)

    def __getitem__(self, name: str) -> Any:
        return self.entries[name]

    @torch.no_grad()
    def logits(self, values: Tensor | None = None) -> Tensor:
        """Return zero-shot logits, with ``values`` in place of the activations where given."""
        site = self.place.site
        model = site.model
        assert self.class_texts is not None
        edited = nullcontext() if values is None else site.replaced(self.reading.rows, values)
        with in_eval_mode(model), edited:
            embedding = model.encode_image(self.batch.pixels)
        logits: Tensor = model.zero_shot_logits(embedding, self.class_texts)
        return logits


@dataclass(frozen=True)
class BatchEntry:
    """An entry of a batch."""

    make: Callable[[Offer], Any] | None
    """None where :meth:`TokenLatents.entries` makes it, with a sparse form beside it."""
    is_there: Callable[[Place], bool] = lambda place: True
    hint: str = NO_HINT


@dataclass(frozen=True)
class SubjectEntry:
    """A constructor argument."""

    make: Callable[[Place], Any]
    is_there: Callable[[Place], bool] = lambda place: True
    hint: str = NO_HINT


def _has_labels(place: Place) -> bool:
    return place.facts.has_labels


def _classifies(place: Place) -> bool:
    return place.facts.has_labels and place.reads_text


def _has_masks(place: Place) -> bool:
    return place.facts.masks_named is not None


def _has_domains(place: Place) -> bool:
    return bool(place.facts.domain_images)


def _has_taxonomy(place: Place) -> bool:
    return place.facts.taxonomy is not None


def _has_patches(place: Place) -> bool:
    return place.site.patch_rows is not None


def _is_steered(place: Place) -> bool:
    return bool(place.facts.concepts) and bool(place.site.model.adapter.has_joint_space)


def _masks(offer: Offer) -> Any:
    masks = offer.place.facts.masks
    assert masks is not None
    return masks.batch(offer.place.site.model, offer.batch.indices)


def _n_concepts(place: Place) -> int:
    assert place.facts.masks is not None
    return len(place.facts.masks.names)


def _groups(place: Place) -> Tensor:
    return matryoshka_groups(list(_widths(place)))


def _widths(place: Place) -> Sequence[int]:
    """Cumulative widths of a Matryoshka dictionary's groups; none where they do not fit."""
    cfg = place.dictionary.cfg
    widths = list(place.facts.group_widths or cfg.metadata.get("matryoshka_widths") or ())
    return widths if widths and widths[-1] == int(cfg.d_sae) else ()


_LABELS = "images with labels, or labels=column:NAME"
_CLASSES = "images with labels, and a model with a text tower"
_STEERING = "concepts=, steering_images= above 0 and a model with a text tower"

OF_A_BATCH: dict[str, BatchEntry] = {
    "latents": BatchEntry(None),
    "token_latents": BatchEntry(None),
    "patch_latents": BatchEntry(
        None,
        _has_patches,
        "tokens=patch or all, and an SAE at a hook with patches",
    ),
    "activations": BatchEntry(lambda o: o.reading.target),
    "reconstruction": BatchEntry(None),
    "embeddings": BatchEntry(lambda o: next(iter(o.batch.embeddings.values()))),
    "pixels": BatchEntry(lambda o: o.batch.pixels),
    "image_indices": BatchEntry(lambda o: torch.tensor(o.batch.indices)),
    "image_ids": BatchEntry(lambda o: [o.place.facts.images.ids[i] for i in o.batch.indices]),
    "labels": BatchEntry(lambda o: o.place.facts.labels[o.batch.indices], _has_labels, _LABELS),
    "logits": BatchEntry(lambda o: o.logits(), _classifies, _CLASSES),
    "spliced_logits": BatchEntry(
        lambda o: o.logits(o.latents.reconstruction), _classifies, _CLASSES
    ),
    "ablated_logits": BatchEntry(
        lambda o: o.logits(torch.zeros_like(o.reading.target)), _classifies, _CLASSES
    ),
    "masks": BatchEntry(_masks, _has_masks, "masks="),
    "domain": BatchEntry(lambda o: "home", _has_domains, "domain_images="),
}
"""What ``update`` may name. ``sparse_latents`` and the like stand beside the dense ones."""

OF_A_SUBJECT: dict[str, SubjectEntry] = {
    "n_features": SubjectEntry(lambda p: int(p.dictionary.cfg.d_sae)),
    "d_in": SubjectEntry(lambda p: d_out(p.dictionary)),
    "model": SubjectEntry(lambda p: p.site.model),
    "sae": SubjectEntry(lambda p: p.dictionary),
    "tokens": SubjectEntry(lambda p: p.site.tokens),
    "token_kinds": SubjectEntry(lambda p: p.site.token_kinds),
    "grid_size": SubjectEntry(lambda p: p.site.model.token_layout().grid, _has_patches),
    "text_embeddings": SubjectEntry(lambda p: None, _is_steered, _STEERING),
    "concepts": SubjectEntry(lambda p: p.facts.concepts, _is_steered, _STEERING),
    "class_names": SubjectEntry(lambda p: p.facts.class_names, _has_labels, _LABELS),
    "taxonomy_paths": SubjectEntry(lambda p: p.facts.paths_read, _has_taxonomy, "taxonomy="),
    "groups": SubjectEntry(_groups, lambda p: _has_taxonomy(p) and bool(_widths(p))),
    "sibling_groups": SubjectEntry(
        lambda p: p.facts.sibling_groups,
        lambda p: _has_taxonomy(p) and _has_labels(p),
        "images with labels, and taxonomy=",
    ),
    "domains": SubjectEntry(lambda p: list(p.facts.domain_images), _has_domains, "domain_images="),
    "n_concepts": SubjectEntry(_n_concepts, _has_masks, "masks="),
}
"""What a constructor may name. ``d_embed`` follows from the embedder."""

OF_WEIGHTS = {"decoder": "other_saes=", "other": "other_saes="}
"""What a metric takes that compares dictionaries without any image, with the hint for each."""


def known_of(place: Place) -> dict[str, Any]:
    """Return the constructor arguments that are there for a dictionary."""
    return {n: entry.make(place) for n, entry in OF_A_SUBJECT.items() if entry.is_there(place)}


def offered_to(place: Place) -> set[str]:
    """Return the names of what a batch will hold."""
    return {name for name, entry in OF_A_BATCH.items() if entry.is_there(place)}


def hint_for(name: str) -> str:
    """Return what to give, so that a metric gets what it asks for by this name."""
    if name in OF_WEIGHTS:
        return OF_WEIGHTS[name]
    entry = OF_A_BATCH.get(name) or OF_A_SUBJECT.get(name)
    return entry.hint if entry else NO_HINT
