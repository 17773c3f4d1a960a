"""``open_images`` opens every kind of image collection."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from PIL import Image

from vision_plugin._paths import local_path
from vision_plugin.images._collection import ImageCollection, hash_ids, no_column
from vision_plugin.images._folder import FolderImages
from vision_plugin.images._image import SUFFIXES, BadImageError, Raw, decode_image

DEMO_SEED = 1
"""Seed of ``demo:N``. The packaged checkpoint was trained on images of another seed."""


class ImageSource:
    """Images that are decoded when they are asked for, with ids, labels and columns.

    :func:`open_images` makes it. It can be sent to other processes.
    """

    def __init__(
        self,
        images: ImageCollection,
        *,
        label_column: str | None = None,
        n_images: int | None = None,
    ) -> None:
        if n_images is not None and n_images < 1:
            raise ValueError(f"n_images={n_images}: use a whole number from 1 up, or leave it out")
        if label_column is not None and label_column not in images.column_names:
            raise ValueError(no_column(label_column, images.column_names, images.where))
        self._images = images
        self._n = len(images) if n_images is None else min(n_images, len(images))
        self.label_column = label_column or images.default_label

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> Image.Image:
        """Return image ``index`` in RGB.

        Raises:
            BadImageError: the image is broken, truncated, too large, or in no known format.
            IndexError: there is no such image.
        """
        if not -self._n <= index < self._n:
            raise IndexError(f"image {index} of {self._n}")
        index %= self._n
        return decode_image(self._images.raw(index), self._images.ids[index])

    def __iter__(self) -> Iterator[Image.Image]:
        return (self[index] for index in range(self._n))

    @cached_property
    def ids(self) -> list[str]:
        """A name per image that is the same in every run: relative path, row number, key."""
        return list(self._images.ids[: self._n])

    @cached_property
    def labels(self) -> list[str] | None:
        """Label of each image as text, or None where the collection has no labels.

        An image without a label has the empty text. This reads a whole stream.
        """
        if self.label_column is None:
            return None
        return [_text(value) for value in self.column(self.label_column)]

    def label(self, index: int) -> str | None:
        """Return the label of one image; in a stream it is quick right after reading that image."""
        if self.label_column is None:
            return None
        if self.sequential:
            return _text(self._images.value(self.label_column, index))
        return None if self.labels is None else self.labels[index]

    def column(self, name: str) -> list[Any]:
        """Return all values of another column, in the order of the images.

        Raises:
            ValueError: there is no such column.
        """
        return self._images.column(name)[: self._n]

    @property
    def column_names(self) -> list[str]:
        """Columns beside the image."""
        return list(self._images.column_names)

    @property
    def sequential(self) -> bool:
        """Whether the images come as a stream, where only reading in order is quick."""
        return self._images.sequential

    @property
    def description(self) -> dict[str, Any]:
        """Kind, path, column, number and hash of the ids, as a manifest records them."""
        return {
            "kind": self._images.kind,
            **{name: value for name, value in self._images.details.items() if value is not None},
            "n_images": self._n,
            "ids_sha256": hash_ids(self.ids),
            "label_column": self.label_column,
        }

    def __repr__(self) -> str:
        return f"ImageSource({self._images.where}, {self._n:,} images)"


class MemoryImages(ImageCollection):
    """Images in a list; an image's id is its place."""

    kind = "memory"

    def __init__(self, images: Sequence[Image.Image]) -> None:
        self._held = list(images)
        self.ids = [str(index) for index in range(len(self._held))]

    def raw(self, index: int) -> Raw:
        """Return the image."""
        return self._held[index]


class DemoImages(ImageCollection):
    """Images of the demo world, drawn when they are asked for, with every factor as a column."""

    kind = "demo"

    def __init__(self, n: int, seed: int) -> None:
        self._world = import_module("vision_plugin.demo").draw(n, seed=seed)
        self._seed = seed
        self.ids = [str(index) for index in range(n)]

    def raw(self, index: int) -> Raw:
        """Draw the image."""
        drawn: Image.Image = self._world.images[index]
        return drawn

    @property
    def column_names(self) -> list[str]:
        """The caption, and the factors."""
        return ["caption", *import_module("vision_plugin.demo").FACTORS]

    @property
    def default_label(self) -> str:
        """The shape."""
        return "shape"

    def column(self, name: str) -> list[Any]:
        """Return the captions, or the values of a factor."""
        if name not in self.column_names:
            raise ValueError(no_column(name, self.column_names, "the demo world"))
        if name == "caption":
            return list(self._world.captions)
        return [scene.value(name) for scene in self._world.scenes]

    @property
    def details(self) -> dict[str, Any]:
        """The seed."""
        return {"path": f"demo:{len(self)}@{self._seed}"}


def open_images(
    source: Any,
    *,
    column: str | None = None,
    split: str | None = None,
    label_column: str | None = None,
    n_images: int | None = None,
    streaming: bool = False,
) -> ImageSource:
    """Open a collection of images.

    Args:
        source: A folder (labels from sub-folders; ``"imagefolder:photos/"`` insists on them), a
            Parquet file or a folder of them, WebDataset tars (``"shards-{000..003}.tar"``, a glob,
            a folder of tars), a Hugging Face dataset by name or saved folder, a
            ``datasets.Dataset`` or ``IterableDataset``, ``"demo:N"`` or ``"demo:N@seed"``, a list
            of PIL images, or an ImageSource, which is handed back.
        column: Column that holds the images, needed where several do; for WebDataset tars the
            suffix of the images.
        split: Split of a Hugging Face dataset; by default its only one, or ``train``.
        label_column: Column that holds the labels; by default sub-folders, ``label`` or ``cls``.
        n_images: How many images to take from the front; None takes all.
        streaming: Read a dataset of the hub without storing it.

    Raises:
        FileNotFoundError: the path does not exist, and no dataset has that name.
        ValueError: the source holds no images, or a column or split is missing or must be named.
    """
    if isinstance(source, ImageSource):
        return source
    if isinstance(source, Path):
        source = str(source)
    images = (
        _open_text(source, column, split, n_images, streaming)
        if isinstance(source, str)
        else _open_object(source, column, split, n_images)
    )
    return ImageSource(images, label_column=label_column, n_images=n_images)


def _open_text(
    source: str, column: str | None, split: str | None, n_images: int | None, streaming: bool
) -> ImageCollection:
    prefix, _, rest = source.partition(":")
    if prefix == "demo":
        return _open_demo(source)
    if prefix == "imagefolder" and rest:
        return FolderImages(_existing_folder(rest), labelled=True)
    path = local_path(source)
    if path.is_dir():
        return _open_folder(path, column, split)
    if source.endswith((".tar", ".parquet")):
        return _open_files(source, column)
    if path.is_file():
        raise ValueError(
            f"{source} is one file and neither Parquet nor a tar: give the folder that it is in"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or source.startswith("."):
        raise FileNotFoundError(f"{source} does not exist")
    from vision_plugin.images import _datasets

    loaded, split = _datasets.load_named(source, split, streaming=streaming)
    return _open_dataset(loaded, source, split, column, n_images)


def _open_demo(source: str) -> ImageCollection:
    match = re.fullmatch(r"demo:([0-9]+)(?:@([0-9]+))?", source)
    if match is None or int(match.group(1)) == 0:
        raise ValueError(
            f"{source!r}: write 'demo:N' or 'demo:N@seed' with a number of images N, as in "
            "'demo:2000'"
        )
    return DemoImages(int(match.group(1)), int(match.group(2) or DEMO_SEED))


def _existing_folder(text: str) -> Path:
    folder = local_path(text)
    if not folder.is_dir():
        raise FileNotFoundError(f"{text} is not a folder that exists")
    return folder


def _open_folder(folder: Path, column: str | None, split: str | None) -> ImageCollection:
    """Open a folder of images, a saved dataset, or a folder of Parquet or tar files."""
    from vision_plugin.images import _datasets

    if _datasets.is_saved(folder):
        loaded, split = _datasets.load_saved(folder, split)
        return _open_dataset(loaded, str(folder), split, column, None)
    for suffix in (".parquet", ".tar"):
        files = sorted(folder.rglob(f"*{suffix}"))
        if files and not _has_image(folder):
            if split is not None:
                files = [file for file in files if file.name.startswith(split)]
            if not files:
                raise ValueError(f"no {suffix} file in {folder} starts with {split!r}")
            return _open_kind(suffix, files, str(folder), column)
    if split is not None:
        return FolderImages(_existing_folder(str(folder / split)))
    return FolderImages(folder)


def _has_image(folder: Path) -> bool:
    return any(path.suffix.lower() in SUFFIXES for path in folder.rglob("*"))


def _open_files(source: str, column: str | None) -> ImageCollection:
    from vision_plugin.images._webdataset import expand

    return _open_kind(Path(source).suffix, expand(str(local_path(source))), source, column)


def _open_kind(suffix: str, files: list[Path], where: str, column: str | None) -> ImageCollection:
    if suffix == ".parquet":
        from vision_plugin.images._parquet import ParquetImages

        return ParquetImages(files, where=where, column=column)
    from vision_plugin.images._webdataset import WebDatasetImages

    return WebDatasetImages(files, where=where, column=column)


def _open_object(
    source: Any, column: str | None, split: str | None, n_images: int | None
) -> ImageCollection:
    if type(source).__module__.partition(".")[0] == "datasets":
        from vision_plugin.images import _datasets

        name = type(source).__name__
        loaded, split = _datasets.pick_split(source, name, split)
        return _open_dataset(loaded, name, split, column, n_images)
    if isinstance(source, Sequence) and all(isinstance(item, Image.Image) for item in source):
        if not source:
            raise ValueError("the list of images is empty")
        return MemoryImages(source)
    raise ValueError(
        f"images cannot be read from a {type(source).__name__}: give a path, the name of a "
        "dataset, a datasets.Dataset, 'demo:N', or a list of PIL images"
    )


def _open_dataset(
    loaded: Any, name: str, split: str | None, column: str | None, n_images: int | None
) -> ImageCollection:
    import datasets

    from vision_plugin.images._datasets import DatasetImages, StreamedImages

    if isinstance(loaded, datasets.IterableDataset):
        return StreamedImages(loaded, name=name, split=split, column=column, n_images=n_images)
    return DatasetImages(loaded, name=name, split=split, column=column)


def _text(value: Any) -> str:
    return "" if value is None else str(value)


__all__ = ["BadImageError", "ImageSource", "open_images"]
