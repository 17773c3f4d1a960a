"""What names are made from and checked on: one pass over images, split in two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin._progress import Progress
from vision_plugin.evaluation import (
    Facts,
    ImageBatch,
    Keeper,
    Loop,
    Place,
    Subject,
    class_of_images,
    embed,
)
from vision_plugin.images import read_batches
from vision_plugin.lens._firing import Firing
from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.site import Site

FEWEST_IMAGES = 20
_JUDGE = "judge"


@dataclass(frozen=True, eq=False)
class Evidence:
    """Latents, embeddings and labels of images, of which one part makes names.

    Attributes:
        images: The image source.
        site: Where the dictionary reads and writes.
        firing: Where latents fire, on all images that could be read.
        places: Places of these images in the source.
        embeddings: Unit embeddings of these images by the judge; None without one.
        labels: Labels of these images, a list for each column.
        made_on: Rows of the images that names are made from.
        checked_on: Rows of the images that names are checked on.
        bad_images: Reasons by id of the images that could not be read.
    """

    images: Any
    site: Site
    firing: Firing
    places: list[int]
    embeddings: Float[Tensor, "n d_embed"] | None
    labels: list[list[str]]
    made_on: Int[Tensor, " made"]
    checked_on: Int[Tensor, " checked"]
    bad_images: dict[str, str] = field(default_factory=dict)

    @cached_property
    def making(self) -> Firing:
        """Where latents fire on the images that names are made from."""
        return self.firing.on(self.made_on)

    @cached_property
    def thresholds(self) -> Float[Tensor, " d_sae"]:
        """Value above which a latent counts as firing, from the images that names are made from."""
        return self.making.thresholds()

    def fired(self, rows: Int[Tensor, " n"]) -> Firing:
        """Return where latents count as firing, on some of the images."""
        return self.firing.above(self.thresholds).on(rows)

    def embedded(self, rows: Int[Tensor, " n"]) -> Float[Tensor, "n d_embed"] | None:
        """Return the judge's embeddings of some of the images."""
        return None if self.embeddings is None else self.embeddings[rows]

    def labelled(self, rows: Int[Tensor, " n"]) -> list[list[str]]:
        """Return the labels of some of the images, a list for each column."""
        chosen = rows.tolist()
        return [[column[row] for row in chosen] for column in self.labels]

    def top_images(self, latent: int, n: int) -> list[Any]:
        """Return a latent's top images among those that names are made from."""
        start, end = self.making.starts[latent : latent + 2].tolist()
        rows = self.making.images[start : min(end, start + n)]
        return [self.images[self.places[row]] for row in self.made_on[rows].tolist()]


@torch.no_grad()
def gather(
    site: Site,
    dictionary: Dictionary,
    images: Any,
    *,
    judge: Any,
    labels: Sequence[str] | None,
    pooling: str,
    check_share: float,
    batch_size: int,
    seed: int,
    progress: bool,
) -> Evidence:
    """Run the images once, and keep what names are made from and checked on.

    Args:
        site: Where the dictionary reads.
        dictionary: The dictionary.
        images: An image source.
        judge: A model that embeds images beside texts; None for none.
        labels: Columns of labels as ``column:NAME``; None takes the labels of the images where
            they have some; empty for none.
        pooling: How tokens become images, ``"max"`` or ``"mean"``.
        check_share: Share of the images that names are checked on.
        batch_size: Images that run at once.
        seed: Seed of the split.
        progress: Whether to show progress.

    Raises:
        ValueError: too few images could be read, or there is no such column.
    """
    columns = _columns(images, labels)
    subject = Subject("sae", Place(site, dictionary, Facts(images)))
    loop, keep = Loop([subject], pooling=pooling), Keeper()
    bad: dict[str, str] = {}
    with Progress(len(images), "looking", shown=progress) as shown:
        for found in read_batches(images, loop.images_at_once(batch_size), bad):
            read = list(found.values())
            pixels = site.model.preprocess(read)
            embedded = {} if judge is None else {_JUDGE: embed(judge, site.model, read, pixels)}
            offer = loop.feed(ImageBatch(list(found), pixels, embedded))
            pooled = offer["sparse_latents" if offer.latents.is_sparse else "latents"]
            keep.add(list(found), pooled, None, embedded)
            shown.advance(len(found))
    if len(keep.indices) < FEWEST_IMAGES:
        raise ValueError(
            f"{len(keep.indices)} of {len(images)} images could be read, and names need "
            f"{FEWEST_IMAGES}, to be made from some and checked on others: give more images"
        )
    encoded = keep.finish(images, bad, site.tokens, pooling)
    made_on, checked_on = _split(len(encoded.indices), check_share, seed)
    return Evidence(
        images=images,
        site=site,
        firing=Firing.of(encoded.latents),
        places=encoded.indices,
        embeddings=encoded.embeddings.get(_JUDGE),
        labels=[[column[place] for place in encoded.indices] for column in columns],
        made_on=made_on,
        checked_on=checked_on,
        bad_images=bad,
    )


def _columns(images: Any, labels: Sequence[str] | None) -> list[list[str]]:
    if labels is None:
        return [class_of_images(images, None)] if Facts(images).has_labels else []
    return [class_of_images(images, None if name == "labels" else name) for name in labels]


def _split(n: int, check_share: float, seed: int) -> tuple[Tensor, Tensor]:
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    n_checked = min(n - 1, max(1, round(n * check_share)))
    return order[n_checked:].sort().values, order[:n_checked].sort().values
