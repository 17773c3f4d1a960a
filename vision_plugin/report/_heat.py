"""Patch heat maps as tiny grey PNGs inside the page; the style sheet lays them over images.

The page's script reads the value under the pointer from the same pixels.
"""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
from jaxtyping import Float

LEVELS = 128
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def heat_uri(values: Float[np.ndarray, " patches"], grid: tuple[int, int], scale: float) -> str:
    """Return a data URI with one grey pixel per patch: black at 0, white at ``scale``.

    Values are rounded to 128 levels. The file is put together here, since a report has dozens for
    each feature, and an imaging library takes several times as long to write 64 pixels.

    Args:
        values: Activations of the patches, row by row.
        grid: Rows and columns of patches.
        scale: Activation that is shown white.
    """
    share = np.clip(values.astype(np.float32) / max(scale, 1e-30), 0, 1)
    levels = np.round(np.round(share * (LEVELS - 1)) * (255 / (LEVELS - 1)))
    rows, columns = grid
    lines = np.zeros((rows, columns + 1), dtype=np.uint8)  # each begins with its filter: none
    lines[:, 1:] = levels.reshape(grid)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0)  # 8 bits, grey
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b""))
    png = _SIGNATURE + b"".join(_chunk(kind, data) for kind, data in parts)
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check
