"""Detection of the project that wrote a checkpoint, and its translation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from vision_plugin._shown import listed, shown
from vision_plugin.formats import (
    _dictionary_learning,
    _overcomplete,
    _patchsae,
    _prisma,
    _saev,
    _visaebench,
)
from vision_plugin.formats._checkpoint import RawCheckpoint, ReadOptions, read_checkpoint
from vision_plugin.formats._errors import (
    CheckpointError,
    CorruptCheckpointError,
    UnknownFormatError,
)
from vision_plugin.formats._files import damage_is_named
from vision_plugin.formats._stock import StockCheckpoint


class _Format(NamedTuple):
    describes: Callable[[RawCheckpoint], bool]
    to_stock: Callable[[RawCheckpoint, ReadOptions], StockCheckpoint]


# The order matters: the earlier formats are recognised by marks that the later ones lack.
FORMATS: dict[str, _Format] = {
    "saev": _Format(_saev.describes, _saev.to_stock),
    "prisma": _Format(_prisma.describes, _prisma.to_stock),
    "patchsae": _Format(_patchsae.describes, _patchsae.to_stock),
    "dictionary_learning": _Format(_dictionary_learning.describes, _dictionary_learning.to_stock),
    "visaebench": _Format(_visaebench.describes, _visaebench.to_stock),
    "overcomplete": _Format(_overcomplete.describes, _overcomplete.to_stock),
}


def read_stock(path: Path, *, format: str = "auto", options: ReadOptions) -> StockCheckpoint:
    """Read a foreign weights file as a stock SAELens SAE.

    Args:
        path: The weights file.
        format: A name in `FORMATS`, or "auto".
        options: Facts that the file leaves out.

    Raises:
        CheckpointError: A subclass of it names the file and the reason.
    """
    raw = read_checkpoint(path)
    with damage_is_named(path):
        name = _detected(raw) if format == "auto" else format
        stock = FORMATS[name].to_stock(raw, options).checked()
        _compare_with_announced_shape(stock, raw)
    if options.input_mean is not None and options.input_std is not None:
        stock = _standardized(stock, path, options.input_mean, options.input_std)
    source = {"format": name, "file": path.name}
    known = {key: value for key, value in stock.metadata.items() if value is not None}
    return replace(stock, metadata={**known, "source": source})


def _standardized(
    stock: StockCheckpoint, path: Path, mean: Tensor, std: Tensor | float
) -> StockCheckpoint:
    try:
        return stock.standardized(mean, std).checked()
    except CheckpointError as error:
        raise type(error)(f"Cannot load {path}: {error}") from error


def _detected(raw: RawCheckpoint) -> str:
    for name, candidate in FORMATS.items():
        if candidate.describes(raw):
            return name
    raise UnknownFormatError(
        f"nothing tells which project wrote it. It holds the tensors {listed(raw.tensors, 12)} "
        f"and the settings {listed(raw.settings, 12)}. If it is one of {list(FORMATS)}, "
        "put its config beside it, or pass format=."
    )


def _compare_with_announced_shape(stock: StockCheckpoint, raw: RawCheckpoint) -> None:
    pairs = zip(("d_in", "d_sae"), raw.announced_shape(), (stock.d_in, stock.d_sae), strict=True)
    for name, announced, actual in pairs:
        if announced is not None and announced != actual:
            raise CorruptCheckpointError(
                f"its config says {name}={shown(announced)}, but its tensors {actual}. The config "
                "is of another checkpoint, or the file is damaged."
            )
