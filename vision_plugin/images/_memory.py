"""Images without files: in a list, or drawn when they are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from PIL import Image

from vision_plugin.images._collection import ImageCollection, no_column
from vision_plugin.images._image import Raw


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
