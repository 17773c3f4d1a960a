"""The data of the image page: a script per few images, loaded when one is opened."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np

from vision_plugin.report._content import Content
from vision_plugin.report._numbers import plain
from vision_plugin.report._patches import ImageRecord
from vision_plugin.report._scripts import write_call

IMAGES_PER_SCRIPT = 8


def write_patches(folder: Path, content: Content, records: dict[int, ImageRecord]) -> list[int]:
    """Write ``patches/<n>.js``, and return the numbers of the images in order."""
    numbers = [number for number in records if number in content.writer.written]
    (folder / "patches").mkdir()
    for start in range(0, len(numbers), IMAGES_PER_SCRIPT):
        part = numbers[start : start + IMAGES_PER_SCRIPT]
        data = {str(number): _image(content, number, records[number]) for number in part}
        path = folder / "patches" / f"{start // IMAGES_PER_SCRIPT}.js"
        write_call(path, "receivePatches", data)
    return numbers


def _image(content: Content, number: int, record: ImageRecord) -> dict[str, Any]:
    tile = content.tile(number)
    assert tile is not None
    return {
        "id": content.id(number),
        "texts": list(content.reader.texts(number).items()),
        "tile": [tile.source, tile.x, tile.y, tile.width, tile.height, tile.sheet],
        "latents": record.latents,
        "values": [[plain(v, 3) for v in row] for row in record.values],
        "summed": [[n, plain(total, 4), plain(high, 4)] for n, total, high in record.summed],
        "maps": [
            base64.b64encode(np.array(levels, dtype=np.uint8).tobytes()).decode("ascii")
            for levels in record.maps
        ],
    }


def images_data(content: Content, numbers: list[int]) -> dict[str, Any]:
    """Return what the image page needs before an image is opened."""
    assert content.heat is not None
    return {
        "numbers": numbers,
        "per_script": IMAGES_PER_SCRIPT,
        "grid": list(content.heat.grid),
    }
