"""Sequences of drawn images, with their scenes, captions and masks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Generic, Literal, TypeVar, overload

import numpy as np
from jaxtyping import Bool
from PIL import Image

from vision_plugin._paths import local_path
from vision_plugin.demo._captions import caption
from vision_plugin.demo._factors import Combinations, Scene, SceneRule, sample_scene, taxonomy
from vision_plugin.demo._render import IMAGE_SIZE, object_mask, render

T = TypeVar("T")


class Drawn(Sequence[T], Generic[T]):
    """A sequence whose items are made on request and not kept.

    Args:
        scenes: The scenes.
        make: Makes the item of a scene.

    Examples:
        >>> images = vp.demo.draw(100, seed=0).images
        >>> len(images), len(images[:10]), images[0].size
        (100, 10, (128, 128))
    """

    def __init__(self, scenes: tuple[Scene, ...], make: Callable[[Scene], T]) -> None:
        self._scenes = scenes
        self._make = make

    def __len__(self) -> int:
        return len(self._scenes)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Drawn[T]: ...
    def __getitem__(self, index: int | slice) -> T | Drawn[T]:
        if isinstance(index, slice):
            return Drawn(self._scenes[index], self._make)
        return self._make(self._scenes[index])

    def __iter__(self) -> Iterator[T]:
        return map(self._make, self._scenes)


@dataclass(frozen=True)
class DemoWorld:
    """Images of known scenes; see `draw`.

    Examples:
        >>> two = vp.demo.DemoWorld(world.scenes[:2])
        >>> vp.open_images(two.write("two-drawn")).ids
        ['000000.png', '000001.png']
    """

    scenes: tuple[Scene, ...]
    """The scene of each image."""
    image_size: int = IMAGE_SIZE
    """The side of the square images in pixels."""

    def __len__(self) -> int:
        return len(self.scenes)

    @property
    def images(self) -> Drawn[Image.Image]:
        """Return the images (RGB), each drawn on request."""
        return Drawn(self.scenes, lambda scene: render(scene, image_size=self.image_size))

    @property
    def masks(self) -> Drawn[Bool[np.ndarray, "size size"]]:
        """Return the pixels of the object, one boolean array per image."""
        return Drawn(self.scenes, lambda scene: object_mask(scene, image_size=self.image_size))

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """Return a full and true caption of each image."""
        return tuple(caption(scene) for scene in self.scenes)

    @cached_property
    def taxonomy_paths(self) -> list[tuple[str, str, str, str]]:
        """Return each image's path in the tree of shapes; see `taxonomy`."""
        return taxonomy(self.scenes)

    def write(self, folder: str | Path) -> Path:
        """Write the images as an image folder that Hugging Face datasets can read too.

        Args:
            folder: folder to write to, made if missing. It gets `000000.png`, ..., and
                `metadata.jsonl` with one line per image: file_name, caption and every factor.

        Returns:
            The folder.

        Raises:
            FileExistsError: the folder is not empty.
        """
        folder = local_path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FileExistsError(
                f"{folder} is not empty. Name a new folder, so that no other image is mixed in."
            )
        lines = []
        for index, (scene, image) in enumerate(zip(self.scenes, self.images, strict=True)):
            name = f"{index:06d}.png"
            image.save(folder / name)
            record = {"file_name": name, "caption": self.captions[index], **asdict(scene)}
            lines.append(json.dumps(record) + "\n")
        (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
        return folder


def draw(
    n: int,
    *,
    seed: int,
    words: float | int = 0.0,
    naming: Literal["shape", "colour", "either"] = "either",
    conflicting: bool = False,
    combinations: Combinations = "all",
    image_size: int = IMAGE_SIZE,
) -> DemoWorld:
    """Draw images with known factors.

    Image `i` of a seed does not depend on `n`, and only its label depends on `words`.

    Args:
        n: number of images.
        seed: seed of the sequence. The packaged checkpoint was trained on `TRAINING_SEED` alone, so
            any other seed gives images that it never saw.
        words: share of images with a printed word, from 0 to 1 (or False and True).
        naming: whether printed words name shapes, colours, or either.
        conflicting: whether a printed word must differ from the object's own shape and colour.
        combinations: pairs of shape and colour that may appear: "all", "training", or "held out"
            (the pairs in `HELD_OUT`, which the packaged checkpoint never saw).
        image_size: the side of the square images in pixels, at least 32.

    Raises:
        ValueError: an argument is out of its range.

    Examples:
        >>> drawn = vp.demo.draw(3, seed=7)
        >>> drawn.captions[0]
        'a picture of a large blue checked moon at night in the top left'
        >>> drawn.images[0].size
        (128, 128)
    """
    if n < 0 or seed < 0:
        raise ValueError(f"draw({n}, seed={seed}): use whole numbers from 0 up.")
    rule = SceneRule(
        words=float(words), naming=naming, conflicting=conflicting, combinations=combinations
    )
    return DemoWorld(
        scenes=tuple(sample_scene(seed, index, rule) for index in range(n)), image_size=image_size
    )
