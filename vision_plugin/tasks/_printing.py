"""Print words on images: fonts, sizes, places and colours are drawn by a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONTS = ("DejaVuSans.ttf", "DejaVuSerif.ttf", "STIXGeneral.ttf")
"""Fonts that come with matplotlib: without serifs, with serifs, and one like Times."""
COLOURS = (
    (0, 0, 0), (255, 255, 255), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0),
    (0, 255, 255), (255, 0, 255),
)  # fmt: skip
SMALLEST = 7
"""Smallest letters, in pixels."""


@dataclass(frozen=True, kw_only=True)
class PrintStyle:
    """What printed words look like; each word draws one of each.

    Attributes:
        fonts: TrueType files; by default three that come with matplotlib.
        sizes: Smallest and largest height of the letters, as shares of the image's height. A word
            that does not fit is printed smaller.
        colours: Colours of letters and of the line around them, which differ.
        stroke: Width in pixels of the line around the letters.

    Examples:
        >>> import numpy as np
        >>> style = vp.tasks.PrintStyle(stroke=2)
        >>> style.print_on(world.images[0], "star", np.random.default_rng(0)).size
        (128, 128)
    """

    fonts: tuple[str | Path, ...] = ()
    sizes: tuple[float, float] = (0.12, 0.2)
    colours: tuple[tuple[int, int, int], ...] = COLOURS
    stroke: int = 1

    def __post_init__(self) -> None:
        low, high = self.sizes
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"sizes={self.sizes} are shares of an image's height, the smaller first: 0 to 1"
            )
        if len(set(self.colours)) < 2:
            raise ValueError("colours= needs two colours: letters have a line of another around")
        for font in self.fonts:
            _font(str(font), SMALLEST)

    def print_on(self, image: Image.Image, word: str, random: np.random.Generator) -> Image.Image:
        """Return a copy of an image with a word on it.

        Args:
            image: An RGB image.
            word: What is printed.
            random: Draws font, size, place and colours.

        Raises:
            ValueError: the word does not fit even in the smallest letters.
        """
        fonts = [str(font) for font in self.fonts] or _installed()
        name = fonts[int(random.integers(len(fonts)))]
        letters, around = random.choice(len(self.colours), size=2, replace=False).tolist()
        size = round(float(random.uniform(*self.sizes)) * image.height)
        printed = image.copy()
        draw = ImageDraw.Draw(printed)
        for height in range(max(size, SMALLEST), SMALLEST - 1, -1):
            font = _font(name, height)
            box = draw.textbbox((0, 0), word, font=font, stroke_width=self.stroke)
            free = image.width - (box[2] - box[0]), image.height - (box[3] - box[1])
            if min(free) >= 0:
                break
        else:
            raise ValueError(
                f"the word {word!r} does not fit on an image of {image.width} x {image.height} "
                f"pixels, in letters of {SMALLEST} pixels: use shorter names of the classes, or a "
                "model with larger images"
            )
        left, top = (int(random.integers(int(room) + 1)) for room in free)
        draw.text(
            (left - box[0], top - box[1]), word, font=font, fill=self.colours[letters],
            stroke_width=self.stroke, stroke_fill=self.colours[around],
        )  # fmt: skip
        return printed


def _installed() -> Sequence[str]:
    import matplotlib as mpl

    folder = Path(mpl.get_data_path()) / "fonts" / "ttf"
    return [str(folder / name) for name in FONTS]


@cache
def _font(path: str, size: int) -> ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(path, size)
    except OSError as error:
        raise ValueError(f"{path} is not a font that Pillow reads ({error}): name a .ttf") from None
