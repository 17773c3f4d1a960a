"""Small copies of images, many on one sheet, so that a report has few files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup, escape
from PIL import Image

LOSSLESS_BELOW = 128
"""Largest side, in pixels, of images kept without loss, since JPEG would show on them."""
THUMB, THUMBS_ACROSS = 64, 16
_MOST_ACROSS = 8
_FILES_PER_FEATURE = 0.7


@dataclass(frozen=True)
class Tile:
    """The place of an image on a sheet, in pixels."""

    source: str
    """Path of the sheet inside the report."""
    x: int
    y: int
    width: int
    height: int
    sheet: int
    """Width and height of the sheet."""

    def svg(self, root: str, label: str, kind: str = "image") -> Markup:
        """Return the image as markup.

        Args:
            root: Way from the page to the report's folder.
            label: What it shows, for those who do not see it; empty where it is told beside it.
            kind: Class, for the style sheet.
        """
        # A page has a hundred of these, and Markup.format takes ten times as long. The label alone
        # is not ours.
        told = f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true"'
        return Markup(
            f'<svg class="{kind}" viewBox="0 0 {self.width} {self.height}" {told}>'
            f'<image href="{root}{self.source}" x="-{self.x}" y="-{self.y}" '
            f'width="{self.sheet}" height="{self.sheet}"/></svg>'
        )


class Sheets:
    """Sheets of square tiles, filled in the order of the images' numbers."""

    def __init__(self, folder: Path, order: Sequence[int], *, tile: int, across: int) -> None:
        """Make the folder.

        Args:
            folder: Folder of the sheets.
            order: Numbers of the images, ascending; an image's place here is its slot.
            tile: Side of a tile in pixels.
            across: Tiles in a row, and rows.
        """
        self.folder, self.tile, self.across = folder, tile, across
        self.slots = {number: slot for slot, number in enumerate(order)}
        self.sizes: dict[int, tuple[int, int]] = {}
        self.suffix = "png" if tile <= LOSSLESS_BELOW and tile != THUMB else "jpg"
        self._sheet: Image.Image | None = None
        self._number = -1
        folder.mkdir(exist_ok=True)

    def write(self, number: int, image: Image.Image) -> None:
        """Shrink an image into its tile. Images come in ascending order."""
        sheet, place = divmod(self.slots[number], self.across**2)
        if sheet != self._number:
            self.finish()
            side = self.tile * self.across
            self._number, self._sheet = sheet, Image.new("RGB", (side, side), "white")
        assert self._sheet is not None
        small = image.copy()
        small.thumbnail((self.tile, self.tile), Image.Resampling.LANCZOS)
        self.sizes[number] = small.size
        row, column = divmod(place, self.across)
        self._sheet.paste(small, (column * self.tile, row * self.tile))

    def finish(self) -> None:
        """Save the sheet that is being filled."""
        if self._sheet is None:
            return
        path = self.folder / f"{self._number}.{self.suffix}"
        if self.suffix == "png":
            self._sheet.save(path, format="PNG", compress_level=6)
        else:
            self._sheet.save(path, format="JPEG", quality=88, subsampling=0)
        self._sheet = None

    def tile_of(self, number: int) -> Tile | None:
        """Return the place of an image; None if it was not written."""
        if number not in self.sizes:
            return None
        sheet, place = divmod(self.slots[number], self.across**2)
        row, column = divmod(place, self.across)
        return Tile(
            f"{self.folder.name}/{sheet}.{self.suffix}",
            column * self.tile,
            row * self.tile,
            *self.sizes[number],
            self.tile * self.across,
        )


class ImageWriter:
    """Write two copies of every image shown: one for the pages, one for the lists."""

    def __init__(self, folder: Path, order: Sequence[int], *, size: int, n_features: int) -> None:
        """Choose how many images a sheet holds, so that files stay in proportion to features.

        Args:
            folder: Folder of the report.
            order: Numbers of all images shown, ascending.
            size: Longest side of the copies on the pages.
            n_features: Number of feature pages.
        """
        per_sheet = len(order) / max(80.0, _FILES_PER_FEATURE * n_features)
        # A power of two, so that every sheet of thumbnails ends where a large sheet ends.
        across = min(2 ** max(0, math.ceil(math.log2(max(per_sheet, 1)) / 2)), _MOST_ACROSS)
        self.large = Sheets(folder / "images", order, tile=size, across=across)
        self.small = Sheets(folder / "thumbs", order, tile=THUMB, across=THUMBS_ACROSS)
        self.order = list(order)

    @property
    def written(self) -> dict[int, tuple[int, int]]:
        """Size of every image written, by number."""
        return self.small.sizes

    def write(self, number: int, image: Image.Image) -> None:
        """Write both copies of an image."""
        self.large.write(number, image)
        self.small.write(number, image)

    def finish(self) -> None:
        """Save the last sheets."""
        self.large.finish()
        self.small.finish()
