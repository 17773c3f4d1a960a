"""Facts about images beside their pixels: classes, concepts, taxonomy, masks, domains."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from PIL import Image
from torch import Tensor

from vision_plugin._paths import local_path
from vision_plugin._untrusted import read_regular
from vision_plugin.images import label_text, open_images
from vision_plugin.metrics import (
    TaxonomyPaths,
    read_taxonomy,
    sibling_groups,
    taxonomy_from_columns,
)

logger = logging.getLogger(__name__)

MAX_MASK_BYTES = 64 * 1024 * 1024
"""Larger files with masks are refused."""
MAX_MASK_PIXELS = 100_000_000
"""Masks with more pixels are refused before they are decoded."""
DEMO = re.compile(r"demo:(\d+)@(\d+)")
MAX_TEXT_BYTES = 16 * 1024 * 1024
"""Larger lists of concepts or names are refused."""


class Facts:
    """Facts about images by their place in the source, each read on first use.

    Args:
        images: An image source.
        labels: Column of the classes as ``column:NAME``; None takes the labels of the images.
        concepts: Concepts for steerability, one text each.
        taxonomy: ``column:BROAD,NARROW,NAME``, a JSON or CSV file by image id, or ``demo``.
        group_widths: Cumulative widths of a Matryoshka dictionary's groups.
        masks: A folder of masks, or ``demo``.
        domain_images: Labelled images of other domains, as ``open_images`` takes them.
        domain_split: Split of each of them.

    Examples:
        >>> facts = vp.evaluation.Facts(vp.open_images("demo:8"), labels="column:shape")
        >>> facts.labels.shape
        torch.Size([8])
    """

    def __init__(
        self,
        images: Any,
        *,
        labels: str | None = None,
        concepts: Sequence[str] = (),
        taxonomy: str | None = None,
        group_widths: Sequence[int] = (),
        masks: str | None = None,
        domain_images: Sequence[str] = (),
        domain_split: str | None = None,
    ) -> None:
        self.images, self.label_column, self.concepts = images, labels, list(concepts)
        self.taxonomy, self.group_widths = taxonomy, tuple(group_widths)
        self.masks_named, self.domain_images = masks, tuple(domain_images)
        self.domain_split = domain_split
        self.paths_read: list[Sequence[str]] = []
        """Taxonomy paths of the images read so far, shared by the metrics."""

    @property
    def has_labels(self) -> bool:
        """Return whether images have classes."""
        if self.label_column is not None:
            return True
        if getattr(self.images, "sequential", False):
            # Asking a stream for its labels reads all of it.
            return getattr(self.images, "label_column", None) is not None
        return getattr(self.images, "labels", None) is not None and any(self.label_names)

    def note_read(self, indices: Sequence[int]) -> None:
        """Add the taxonomy paths of images that were read, where there is a taxonomy."""
        if self.taxonomy_paths is not None:
            self.paths_read += [self.taxonomy_paths[index] for index in indices]

    @cached_property
    def label_names(self) -> list[str]:
        """Return the class of each image; an empty text where it has none."""
        return class_of_images(self.images, self.label_column)

    @cached_property
    def class_names(self) -> list[str]:
        """Return the classes; a class's number is its place here."""
        found = sorted(set(self.label_names) - {""})
        if not found:
            raise ValueError("no image has a label: name a column of classes with labels=")
        return found

    @cached_property
    def labels(self) -> Tensor:
        """Return the number of each image's class, -1 for images without one."""
        number = {"": -1} | {name: index for index, name in enumerate(self.class_names)}
        labels = torch.tensor([number[name] for name in self.label_names])
        without = int((labels < 0).sum())
        if without:
            logger.warning(
                "%d of %d images have no label: what is about classes leaves them out",
                *(without, len(labels)),
            )
        return labels

    @cached_property
    def taxonomy_paths(self) -> TaxonomyPaths | None:
        """Return a path per image, broadest step first; None without a taxonomy."""
        named = self.taxonomy
        if named is None:
            return None
        if named == "demo":
            drawn: TaxonomyPaths = demo_world(self.images, "taxonomy='demo'").taxonomy_paths
            return drawn
        kind, _, columns = named.partition(":")
        if kind == "column":
            names = columns.split(",")
            table = {name: self.images.column(name) for name in names}
            return taxonomy_from_columns(table, names)
        path = local_path(named)
        if not path.is_file():
            raise FileNotFoundError(
                f"taxonomy={named!r}: there is no such file; write columns of the images as "
                "column:BROAD,NARROW"
            )
        return read_taxonomy(path, image_ids=self.images.ids)

    @cached_property
    def sibling_groups(self) -> dict[str, list[int]]:
        """Return the classes that share a parent in the taxonomy, by parent."""
        paths = self.taxonomy_paths
        assert paths is not None
        place: dict[str, tuple[str, ...]] = {}
        for name, path in zip(self.label_names, paths, strict=True):
            if not name:
                continue
            steps = tuple(path)
            own = steps[: steps.index(name) + 1] if name in steps else (*steps, name)
            place.setdefault(name, own)
        return sibling_groups([place[name] for name in self.class_names])

    @cached_property
    def masks(self) -> Masks | None:
        """Return the masks of the concepts; None where no masks were named."""
        named = self.masks_named
        if named is None:
            return None
        return _demo_masks(self.images) if named == "demo" else _folder_masks(named, self.images)

    @cached_property
    def domains(self) -> dict[str, Any]:
        """Return the labelled images of other domains, by their names in ``domain_images``."""
        found = {name: open_images(name, split=self.domain_split) for name in self.domain_images}
        for name, images in found.items():
            if images.label_column is None:
                raise ValueError(f"domain_images={name!r}: these images need labels")
        return found


@dataclass(frozen=True)
class Masks:
    """Concepts and the pixels that show them.

    Attributes:
        names: names of the concepts.
        of_image: function from an image's number to the concepts it shows, each with a mask
            ``[H, W]``.
    """

    names: tuple[str, ...]
    of_image: Callable[[int], dict[int, Bool[np.ndarray, "height width"]]]

    def batch(self, model: Any, images: Sequence[int]) -> Bool[Tensor, "n c height width"]:
        """Return the masks, resized and cropped by the model's own preprocessing."""
        shown = [self.of_image(image) for image in images]
        drawn = [_image(mask) for masks in shown for mask in masks.values()]
        black, white = _pixels(model, [_image(np.full((64, 64), v, dtype=bool)) for v in (0, 1)])
        found = torch.zeros(len(images), len(self.names), *black.shape[1:], dtype=torch.bool)
        if not drawn:
            return found
        middle = (black + white) / 2
        inside = ((_pixels(model, drawn) - middle) * (white - black)).sum(1) > 0
        places = [(row, concept) for row, masks in enumerate(shown) for concept in masks]
        rows, concepts = torch.tensor(places).unbind(1)
        found[rows, concepts] = inside
        return found


def class_of_images(images: Any, column: str | None) -> list[str]:
    """Return the class of each image, as text that is empty for images without one.

    Args:
        images: an image source.
        column: column of the classes as ``column:NAME``; None takes the labels of the images.

    Raises:
        ValueError: there are no labels, or no such column.

    Examples:
        >>> vp.evaluation.class_of_images(vp.open_images("demo:3"), "column:texture")
        ['dotted', 'striped', 'plain']
    """
    if column is None:
        if images.labels is None:
            raise ValueError("these images have no labels: name a column with labels=column:NAME")
        return [label_text(value) for value in images.labels]
    kind, _, name = column.partition(":")
    if kind != "column" or not name:
        raise ValueError(f"labels={column!r}: write column:NAME")
    return [label_text(value) for value in images.column(name)]


def read_concepts(concepts: str | None, images: Any) -> list[str]:
    """Return distinct concepts, from a column of the images or a text file.

    Args:
        concepts: ``labels``, ``column:NAME``, ``demo``, or a text file with one concept a line;
            None gives none.
        images: An image source.

    Raises:
        ValueError: there is no such column, the file is empty or no text, or ``demo`` is named for
            images that are not drawn.
        FileNotFoundError: there is no such file.

    Examples:
        >>> len(vp.evaluation.read_concepts("column:colour", vp.open_images("demo:100")))
        8
    """
    if concepts is None:
        return []
    kind, _, column = concepts.partition(":")
    if concepts == "labels":
        if images.labels is None:
            raise ValueError("concepts='labels': these images have no labels")
        if getattr(images, "description", {}).get("kind") == "demo":
            logger.info(
                "concepts=labels are the %s of drawn images alone: concepts=demo has every factor",
                images.label_column,
            )
        return _distinct(images.labels, "the labels of the images")
    if kind == "column":
        return _distinct(images.column(column), f"the column {column!r} of the images")
    if concepts == "demo":
        demo_world(images, "concepts='demo'")
        vocabulary = import_module("vision_plugin.demo").concept_vocabulary()
        return [concept.text for concept in vocabulary]
    path = local_path(concepts)
    if not path.is_file():
        raise FileNotFoundError(
            f"concepts={concepts!r}: there is no such file; write a column of the images as "
            "column:NAME, their labels as labels"
        )
    return _distinct([line.strip() for line in _lines(path)], concepts)


def _distinct(values: Sequence[Any], where: str) -> list[str]:
    found = list(dict.fromkeys(text for value in values if (text := label_text(value))))
    if not found:
        raise ValueError(f"concepts=: {where} has no concepts; write one per line of a text file")
    return found


def _lines(path: Path) -> list[str]:
    try:
        return read_regular(path, MAX_TEXT_BYTES).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}): convert it") from error


def demo_world(images: Any, argument: str) -> Any:
    """Return the drawn world behind ``demo:N``.

    Raises:
        ValueError: the images are not drawn.
    """
    draw = import_module("vision_plugin.demo").draw
    described = getattr(images, "description", {})
    match = DEMO.fullmatch(str(described.get("path")))
    if described.get("kind") != "demo" or match is None:
        raise ValueError(f"{argument} needs the drawn images of images=demo:N")
    return draw(int(match.group(1)), seed=int(match.group(2)))


def _demo_masks(images: Any) -> Masks:
    """Return masks of the drawn object, as its shape and as its colour."""
    factors = import_module("vision_plugin.demo").FACTORS
    world = demo_world(images, "masks='demo'")
    names = tuple(
        f"{factor}: {value}" for factor in ("shape", "colour") for value in factors[factor]
    )
    number = {name: index for index, name in enumerate(names)}

    def of_image(image: int) -> dict[int, Any]:
        scene, mask = world.scenes[image], world.masks[image]
        return {number[f"{name}: {scene.value(name)}"]: mask for name in ("shape", "colour")}

    return Masks(names, of_image)


def _folder_masks(folder: str, images: Any) -> Masks:
    root = local_path(folder)
    listed = root / "names.txt"
    if not listed.is_file():
        raise FileNotFoundError(
            f"masks={folder!r}: there is no {listed}; write the names of the concepts there, one a "
            "line, and beside it a file ID.png per image whose pixel values are line numbers"
        )
    names = tuple(line.strip() for line in _lines(listed) if line.strip())

    def of_image(image: int) -> dict[int, Any]:
        path = local_path(root / f"{Path(images.ids[image]).with_suffix('')}.png")
        if not path.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"image {images.ids[image]!r} names a mask outside {folder}")
        if not path.is_file():
            raise FileNotFoundError(f"masks={folder!r}: there is no {path}")
        numbers = _read_mask(path)
        shown = np.unique(numbers)
        if numbers.ndim != 2 or int(shown.max()) > len(names):
            raise ValueError(
                f"{path} must have one channel with values from 0 to {len(names)}, the number of "
                f"names in {listed}; it has shape {numbers.shape} and values up to {shown.max()}"
            )
        return {int(value) - 1: numbers == value for value in shown if value > 0}

    return Masks(names, of_image)


def _read_mask(path: Path) -> Any:
    try:
        with Image.open(io.BytesIO(read_regular(path, MAX_MASK_BYTES)), formats=("PNG",)) as mask:
            if mask.width * mask.height > MAX_MASK_PIXELS:
                raise ValueError(f"it has more than {MAX_MASK_PIXELS:,} pixels")
            return np.asarray(mask)
    except Exception as error:  # decoders raise nearly every type on malformed bytes
        raise ValueError(f"{path} cannot be read as a mask in PNG ({error})") from error


def _image(mask: Bool[np.ndarray, "height width"]) -> Image.Image:
    return Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB")


def _pixels(model: Any, images: list[Image.Image]) -> Tensor:
    pixels: Tensor = model.preprocess(images).float().cpu()
    return pixels
