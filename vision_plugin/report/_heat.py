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


def heat_uris(
    values: Float[np.ndarray, "maps patches"], grid: tuple[int, int], scale: float
) -> list[str]:
    """Return data URIs with one grey pixel per patch: black at 0, white at ``scale``.

    Values are rounded to 128 levels. The file is put together here, since a report has dozens for
    each feature, and an imaging library takes several times as long to write 64 pixels.

    Args:
        values: Activations of the patches, row by row, one map per data URI.
        grid: Rows and columns of patches.
        scale: Activation that is shown white.
    """
    share = np.clip(values.astype(np.float32) / max(scale, 1e-30), 0, 1)
    levels = np.round(np.round(share * (LEVELS - 1)) * (255 / (LEVELS - 1)))
    rows, columns = grid
    # Each line begins with its filter: none.
    lines = np.zeros((len(values), rows, columns + 1), dtype=np.uint8)
    lines[:, :, 1:] = levels.reshape(len(values), *grid)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 0, 0, 0, 0)  # 8 bits, grey
    head, tail = _SIGNATURE + _chunk(b"IHDR", header), _chunk(b"IEND", b"")
    files = (head + _chunk(b"IDAT", zlib.compress(each.tobytes())) + tail for each in lines)
    return ["data:image/png;base64," + base64.b64encode(file).decode("ascii") for file in files]


def _chunk(kind: bytes, data: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + check
