"""What the heads of a model write for many images: nearest images and texts, and TEXTSPAN.

With :mod:`vision_plugin.lens._segmentation` these are the five analyses of CLIP-InterpreT (Madasu,
Gandelsman, Lal and Howard 2024, arXiv 2409.06579): nearest images by a property, topic segmentation
of a head, contrastive segmentation, nearest images of a head, nearest texts of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision_plugin.images import open_images
from vision_plugin.lens._pixels import pixel_batches
from vision_plugin.lens._texts import centred, check_head, embed_texts, unit
from vision_plugin.lens._textspan import TextSpan, textspan

Head = tuple[int, int]


@dataclass(frozen=True)
class Neighbours:
    """The nearest images or texts.

    Attributes:
        places: Places in the images or texts, nearest first.
        names: Ids of the images, or the texts.
        scores: Cosines.

    Examples:
        >>> outputs = vp.lens.head_outputs(model, pixels, layers=1, progress=False)
        >>> near = outputs.nearest_images(0, (3, 1), k=3)
        >>> len(near.places), 0 in near.places
        (3, False)
    """

    places: tuple[int, ...]
    names: tuple[str, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class HeadOutputs:
    """Direct contributions of heads to the embeddings of images.

    Attributes:
        values: Contributions, heads in the order of ``heads``.
        heads: Layer and number of each head.
        ids: Ids of the images.
        model: The VisionBridge, for texts.

    Examples:
        >>> outputs = vp.lens.head_outputs(model, pixels, layers=1, progress=False)
        >>> outputs.values.shape, outputs.heads
        (torch.Size([8, 4, 64]), ((3, 0), (3, 1), (3, 2), (3, 3)))
    """

    values: Float[Tensor, "n k d"]
    heads: tuple[Head, ...]
    ids: tuple[str, ...]
    model: Any

    def of(self, *heads: Head) -> Float[Tensor, "n d"]:
        """Return the sum of some heads' contributions.

        Raises:
            ValueError: one of the heads was not read.
        """
        places = {head: place for place, head in enumerate(self.heads)}
        missing = [head for head in heads if head not in places]
        if missing or not heads:
            layer, number = missing[0] if missing else (None, None)
            what = "no head is named" if layer is None else f"head {layer}.{number} was not read"
            raise ValueError(
                f"{what}: there are {', '.join(f'{a}.{b}' for a, b in self.heads[:8])}"
                f"{', ...' if len(self.heads) > 8 else ''}"
            )
        return self.values[:, [places[head] for head in heads]].sum(1)

    def nearest_images(self, image: int, *heads: Head, k: int = 8) -> Neighbours:
        """Return the images that are nearest in what some heads write, the image itself left out.

        One head is the search of a head; all heads of a property (see :func:`head_properties`) are
        the search by a property. Contributions are compared less their mean over the images, which
        is most of their length and says nothing about any of them.

        Args:
            image: Place of the image.
            *heads: Heads, as (layer, number).
            k: Number of neighbours.

        Raises:
            ValueError: there is no such image, or a head was not read.
        """
        self._check(image)
        values = unit(centred(self.of(*heads).double()))
        scores = values @ values[image]
        scores[image] = -torch.inf
        best = torch.sort(scores, descending=True, stable=True).indices[: min(k, len(scores) - 1)]
        return self._named(best, scores, self.ids)

    def nearest_texts(
        self, image: int, *heads: Head, texts: Sequence[str], k: int = 8
    ) -> Neighbours:
        """Return the texts that are nearest to what some heads write for an image.

        Contributions and texts are compared less their means, over the images and over the texts:
        images and texts lie in two far parts of the space (Liang et al. 2022), and each head writes
        a constant.

        Raises:
            ValueError: there is no such image, no text, or a head was not read.
        """
        self._check(image)
        embedded = embed_texts(self.model, texts).double()
        embedded = centred(embedded) if len(embedded) > 1 else embedded
        value = unit(centred(self.of(*heads).double()))[image]
        scores = unit(embedded) @ value
        best = torch.sort(scores, descending=True, stable=True).indices[:k]
        return self._named(best, scores, [str(text) for text in texts])

    def textspan(
        self,
        texts: Sequence[str],
        *,
        n_texts: int = 5,
        embeddings: Float[Tensor, "v d"] | None = None,
    ) -> dict[Head, TextSpan]:
        """Return the TEXTSPAN of each head.

        The subspace of a head has as many dimensions as the head is wide, and one for its constant.

        Args:
            texts: Texts to choose from.
            n_texts: Texts per head.
            embeddings: Embeddings of the texts, if they are there already.
        """
        embedded = embed_texts(self.model, texts) if embeddings is None else embeddings
        rank = int(self.model.cfg.d_head) + 1
        return {
            head: textspan(self.of(head), embedded, texts, n_texts=n_texts, rank=rank)
            for head in self.heads
        }

    def _check(self, image: int) -> None:
        if not 0 <= image < len(self.ids):
            raise ValueError(
                f"image={image} is not one of the {len(self.ids)} images that were read"
            )

    @staticmethod
    def _named(best: Int[Tensor, " k"], scores: Tensor, names: Sequence[str]) -> Neighbours:
        places = best.tolist()
        return Neighbours(
            tuple(places), tuple(names[place] for place in places), tuple(scores[best].tolist())
        )


def head_outputs(
    model: Any,
    images: Any,
    *,
    layers: int | None = 4,
    heads: Sequence[Head] | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> HeadOutputs:
    """Read what heads write into the embeddings of images.

    Args:
        model: A VisionBridge.
        images: Whatever ``open_images`` takes, or pixels.
        layers: Number of last layers whose heads are read (4 in Gandelsman et al.); None for all.
        heads: Heads to read, in place of ``layers``.
        batch_size: Images at once.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: the model has no such head, or no image can be read.

    Examples:
        >>> outputs = vp.lens.head_outputs(model, pixels, heads=[(3, 1)], progress=False)
        >>> outputs.of((3, 1)).shape
        torch.Size([8, 64])
    """
    n_layers, n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
    if heads is None:
        first = 0 if layers is None else max(0, n_layers - layers)
        heads = [(layer, head) for layer in range(first, n_layers) for head in range(n_heads)]
    for layer, head in heads:
        check_head(model, layer, head)
    if not heads:
        raise ValueError("no head is named: give layers= of 1 or more, or heads=[(layer, head)]")
    source = images if isinstance(images, Tensor) else open_images(images)
    rows = [layer * n_heads + head for layer, head in heads]
    values, places = [], []
    for batch, pixels in pixel_batches(
        model, source, batch_size=batch_size, title="reading heads", progress=progress
    ):
        found = model.decompose(pixels, tokens=False).by_head().flatten(1, 2)
        values.append(found[:, rows])
        places += batch
    ids = [str(place) if isinstance(source, Tensor) else source.ids[place] for place in places]
    return HeadOutputs(torch.cat(values), tuple(heads), tuple(ids), model)
