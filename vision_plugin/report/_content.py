"""The content of a report, gathered before any page is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from vision_plugin._private import name_of
from vision_plugin.report._columns import Column
from vision_plugin.report._heat_maps import HeatMaps
from vision_plugin.report._images import ImageReader
from vision_plugin.report._inputs import clean
from vision_plugin.report._names import Name
from vision_plugin.report._neighbours import Neighbours
from vision_plugin.report._passes import Counted
from vision_plugin.report._sprites import ImageWriter, Tile
from vision_plugin.report._statistics import LatentSummary
from vision_plugin.report._together import Partners


@dataclass(frozen=True)
class Content:
    """The data that the pages are made from."""

    title: str
    facts: tuple[str, ...]
    """Short statements about SAE, model and images."""
    tokens: str | None
    """Kind of token that was encoded; None where latents were given."""
    features: list[int]
    """Numbers of the latents in the report, ascending."""
    names: list[tuple[Name, ...]] | None
    """Names of every latent of the SAE, the best first."""
    answers: dict[int, list[dict[str, Any]]]
    """What a language model says, by latent."""
    columns: list[Column]
    states: np.ndarray[Any, np.dtype[np.int64]]
    """Place in ``STATES`` of every latent of the SAE."""
    counted: Counted
    shown: np.ndarray[Any, np.dtype[np.int64]]
    """[features, n_top + n_sample]: image numbers or -1."""
    n_top: int
    reader: ImageReader
    writer: ImageWriter
    heat: HeatMaps | None
    neighbours: Neighbours | None
    together: Partners | None
    pages: tuple[str, ...]
    """Addresses of the pages beside those of features."""
    image_pages: frozenset[int]
    """Images that are shown patch by patch."""

    @property
    def summary(self) -> LatentSummary:
        """Return the statistics of every latent."""
        return self.counted.summary

    @property
    def n_images(self) -> int:
        """Return the number of images that could be read."""
        return self.summary.n_images

    def name(self, latent: int) -> str:
        """Return a latent's best name, or an empty text."""
        return self.names[latent][0].text if self.names and self.names[latent] else ""

    def tile(self, number: int, *, small: bool = False) -> Tile | None:
        """Return the place of an image's copy; None if it was not read."""
        sheets = self.writer.small if small else self.writer.large
        return sheets.tile_of(number)

    def top_images(self, row: int, n: int) -> list[int]:
        """Return the numbers of the first ``n`` top images that can be shown."""
        numbers = self.shown[row, : self.n_top].tolist()
        return [number for number in numbers if number in self.writer.written][:n]

    def id(self, number: int) -> str:
        """Return an image's id as a page shows it."""
        return clean(name_of(self.reader.id(number)))

    def label(self, number: int) -> str:
        """Return an image's label as a page shows it, or an empty text."""
        return clean(self.reader.label(number))
