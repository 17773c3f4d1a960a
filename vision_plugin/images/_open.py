"""``open_images`` opens every kind of image collection."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from vision_plugin._paths import local_path
from vision_plugin.images._collection import ImageCollection, hash_ids, label_text, no_column
from vision_plugin.images._folder import FolderImages
from vision_plugin.images._image import BadImageError, decode_image
from vision_plugin.images._memory import DemoImages, MemoryImages
from vision_plugin.images._splits import choose_split, splits_of_files
from vision_plugin.images._survey import Contents, survey

logger = logging.getLogger(__name__)

DEMO_SEED = 1
"""Seed of ``demo:N``. The packaged checkpoint was trained on images of another seed."""
MAX_DEMO = 1_000_000
"""Largest number of images in ``demo:N``."""
MAX_BESIDE = 16
"""So many image files, such as a logo, may lie beside a data set; more may be data themselves."""


class ImageSource:
    """Images that are decoded when they are asked for, with ids, labels and columns.

    :func:`open_images` makes it. It can be sent to other processes.

    Examples:
        >>> images = vp.open_images("demo:8")
        >>> len(images), images[0].size
        (8, (128, 128))
        >>> images.column_names[:3]
        ['caption', 'shape', 'colour']
    """

    def __init__(
        self,
        images: ImageCollection,
        *,
        label_column: str | None = None,
        n_images: int | None = None,
        asked: Mapping[str, str | None] | None = None,
    ) -> None:
        if n_images is not None and n_images < 1:
            raise ValueError(f"n_images={n_images}: use a whole number from 1 up, or leave it out")
        if label_column is not None and label_column not in images.column_names:
            raise ValueError(no_column(label_column, images.column_names, images.where))
        self._images = images
        self._asked = dict(asked or {})
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

        An image without a label has the empty text, see :func:`label_text`. This reads a whole
        stream.
        """
        if self.label_column is None:
            return None
        return [label_text(value) for value in self.column(self.label_column)]

    def label(self, index: int) -> str | None:
        """Return the label of one image; in a stream it is quick right after reading that image."""
        if self.label_column is None:
            return None
        if self.sequential:
            return label_text(self._images.value(self.label_column, index))
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
            of PIL images, or an ImageSource, of which ``n_images`` may take a part.
        column: Column that holds the images, needed where several do; for WebDataset tars the
            suffix of the images.
        split: Split of a data set, as the names of its files or folders say it; by default its
            only one.
        label_column: Column that holds the labels; by default sub-folders, ``label`` or ``cls``.
        n_images: How many images to take from the front; None takes all.
        streaming: Read a dataset of the hub without storing it.

    Raises:
        FileNotFoundError: the path does not exist, and no dataset has that name.
        ValueError: the source holds no images, or a column or split is missing, must be named, or
            is named where the source has no such thing.

    Examples:
        >>> images = vp.open_images("demo:100", n_images=4)
        >>> len(images), images[0].mode, len(images.ids)
        (4, 'RGB', 4)
    """
    if isinstance(source, ImageSource):
        return _again(source, column, split, label_column, n_images)
    if isinstance(source, Path):
        source = str(source)
    images = (
        _open_text(source, column, split, n_images, streaming)
        if isinstance(source, str)
        else _open_object(source, column, split, n_images)
    )
    asked = {"column": column, "split": split}
    return ImageSource(images, label_column=label_column, n_images=n_images, asked=asked)


def _again(
    source: ImageSource,
    column: str | None,
    split: str | None,
    label_column: str | None,
    n_images: int | None,
) -> ImageSource:
    """Return a source that is open already, or a part of it, or with other labels."""
    for name, wanted in (("column", column), ("split", split)):
        opened = (None, source._images.details.get(name), source._asked.get(name))
        if wanted not in opened:
            if name == "column" and set(opened) == {None}:
                _refuse(f"{source._images.where} is open already", column=column)
            raise ValueError(
                f"{source._images.where} is open already: leave out {name}={wanted!r}, or give it "
                "where the images are opened"
            )
    if label_column is None and n_images is None:
        return source
    n_images = len(source) if n_images is None else min(n_images, len(source))
    labels = label_column or source.label_column
    return ImageSource(source._images, label_column=labels, n_images=n_images, asked=source._asked)


def _refuse(what: str, *, column: str | None = None, split: str | None = None) -> None:
    """Raise if a column or a split is asked for, of a source that has no such thing."""
    if split is not None:
        raise ValueError(f"{what} and has no splits: leave out split={split!r}")
    if column is not None:
        raise ValueError(
            f"{what} and has no columns with images: leave out column={column!r} (image_column= in "
            "a configuration)"
        )


def _open_text(
    source: str, column: str | None, split: str | None, n_images: int | None, streaming: bool
) -> ImageCollection:
    prefix, _, rest = source.partition(":")
    if prefix == "demo":
        _refuse(f"{source} is drawn", column=column, split=split)
        return _open_demo(source)
    if prefix == "imagefolder" and rest:
        _refuse(f"{source} is a folder of image files", column=column)
        return FolderImages(_existing_folder(rest), split=split, labelled=True)
    path = local_path(source)
    if path.is_dir():
        return _open_folder(path, column, split)
    if source.endswith((".tar", ".parquet")):
        return _open_files(source, column, split)
    if path.exists():
        raise ValueError(
            f"{source} is one file and neither Parquet nor a tar: give the folder that it is in"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) or source.startswith("."):
        raise FileNotFoundError(f"{source} does not exist")
    from vision_plugin.images import _datasets

    loaded, split = _datasets.load_named(source, split, streaming=streaming)
    return _open_dataset(loaded, source, split, column, n_images)


def _open_demo(source: str) -> ImageCollection:
    match = re.fullmatch(r"demo:([0-9]+)(?:@([0-9]{1,18}))?", source)
    if match is None or not 0 < int(match.group(1)[:12]) <= MAX_DEMO:
        raise ValueError(
            f"{source!r}: write 'demo:N' or 'demo:N@seed' with a number of images N, as in "
            f"'demo:2000', up to {MAX_DEMO:,}"
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
    contents = survey(folder)
    suffix, names = _archives(folder, contents, column)
    if suffix:
        names, split = _files_of_split(names, split, str(folder))
        files = [folder / name for name in names]
        return _open_kind(suffix, files, str(folder), column, split)
    _refuse(f"{folder} is a folder of image files", column=column)
    return FolderImages(folder, contents=contents, split=split)


def _archives(folder: Path, contents: Contents, column: str | None) -> tuple[str, list[str]]:
    """Return the suffix and the names of the Parquet files or tars to read; none for image files.

    Raises:
        ValueError: it is not clear what to read.
    """
    tables, tars = contents.parquet, contents.tars
    if tables:
        from vision_plugin.images._parquet import holds_images

        with_images = [name for name in tables if holds_images(folder / name, column)]
        # With nothing else to read, the error says what their columns are.
        tables = with_images or ([] if contents.images or tars else tables)
    if tars and contents.images:
        from vision_plugin.images import _webdataset

        tars = tars if _webdataset.holds_images(folder / tars[0]) else []
    n_images = len(contents.images)
    if (tables and tars) or ((tables or tars) and n_images > MAX_BESIDE):
        raise ValueError(
            f"{folder} holds {len(tables)} Parquet files, {len(tars)} tars and {n_images:,} image "
            f"files, all with images: name what to read, as '{folder}/*.tar', or a folder that "
            "has one kind alone"
        )
    names = tables or tars
    if names and n_images:
        logger.warning(
            "%s: %d image files beside the %d files with the data set are not read, as %s",
            *(folder, n_images, len(names), contents.images[0]),
        )
    return (".parquet" if tables else ".tar" if tars else ""), names


def _files_of_split(
    names: list[str], split: str | None, where: str
) -> tuple[list[str], str | None]:
    """Return the files that belong to the split asked for, or to the only one, and its name."""
    of_files = splits_of_files(names)
    splits = sorted({found for found in of_files if found is not None})
    chosen = choose_split(splits, split, where)
    return [name for name, of in zip(names, of_files, strict=True) if of == chosen], chosen


def _open_files(source: str, column: str | None, split: str | None) -> ImageCollection:
    from vision_plugin.images._webdataset import expand

    files = expand(str(local_path(source)))
    # The folder that the files are in may be named for the split; those above say nothing.
    above = Path(os.path.commonpath([file.absolute().parent for file in files])).parent
    names = {os.path.relpath(file.absolute(), above): file for file in files}
    chosen, split = _files_of_split(list(names), split, source)
    files = [names[name] for name in chosen]
    return _open_kind(Path(source).suffix, files, source, column, split)


def _open_kind(
    suffix: str, files: list[Path], where: str, column: str | None, split: str | None
) -> ImageCollection:
    if suffix == ".parquet":
        from vision_plugin.images._parquet import ParquetImages

        return ParquetImages(files, where=where, column=column, split=split)
    from vision_plugin.images._webdataset import WebDatasetImages

    return WebDatasetImages(files, where=where, column=column, split=split)


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
        _refuse("this source is a list of images", column=column, split=split)
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


__all__ = ["BadImageError", "ImageSource", "open_images"]
