"""Readers of files as plain data: torch archives, pickles, gzip, safetensors, saev, JSON, YAML.

Every reader checks sizes before it allocates, and turns any error that a damaged file causes in a
library into a `CorruptCheckpointError` that names the file.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
from torch import Tensor

from vision_plugin._shown import shown
from vision_plugin._untrusted import open_regular, parse_json, read_regular
from vision_plugin.formats._archive import read_pickled
from vision_plugin.formats._errors import CheckpointError, CorruptCheckpointError
from vision_plugin.formats._unpickle import Stream
from vision_plugin.formats._yaml import parse_yaml

MAX_CONFIG_BYTES = 1 << 20
# gzip saves some ten per cent of float weights; a ratio of twenty is a bomb.
MAX_GZIP_RATIO = 20
MAX_GZIP_FLOOR_BYTES = 64 << 20
_MAX_SAFETENSORS_HEADER = 1 << 20
_CHUNK = 1 << 20
_MAX_REASON = 300


@dataclass(frozen=True)
class WeightsFile:
    """Content of one weights file.

    Attributes:
        content: Tensors, plain containers and inert objects, nested as the file nests them.
        header: The JSON object that precedes the weights (saev), or None.
    """

    content: Any
    header: dict[str, Any] | None = field(default=None)


def read_weights(path: Path) -> WeightsFile:
    """Read a weights file of any supported container.

    Args:
        path: A `.pt`, `.pth`, `.pkl.gz`, `.safetensors` or saev file; recognised by content.

    Raises:
        CorruptCheckpointError: The file is truncated or damaged, or no regular file.
        UnsafeCheckpointError: The file asks for code to be run.
    """
    with damage_is_named(path), _weights(path) as (file, size):
        start = file.read(64)
        file.seek(0)
        if start.startswith(b"version https://git-lfs"):
            raise CorruptCheckpointError(
                "it is a Git LFS pointer, not the weights. Fetch them with `git lfs pull`."
            )
        if start[8:9] == b"{" and not start.startswith(b"{"):
            return WeightsFile(_safetensors(path, file, size))
        if start.startswith(b"\x1f\x8b"):
            file = io.BytesIO(_gunzip(file))
            size = len(file.getbuffer())
            start = file.read(1)
            file.seek(0)
        header = _saev_header(file) if start.startswith(b"{") else None
        return WeightsFile(read_pickled(file, size - file.tell()), header)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CorruptCheckpointError: It is anything else, or damaged.
    """
    with damage_is_named(path), _weights(path) as (file, size):
        return _safetensors(path, file, size)


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON or YAML object of at most `MAX_CONFIG_BYTES` bytes.

    Raises:
        CorruptCheckpointError: Too large, not JSON or YAML, not an object, or no regular file.
    """
    with damage_is_named(path):
        with _refusal_is_corrupt(path):
            content = read_regular(path, MAX_CONFIG_BYTES)
        if path.suffix in {".yaml", ".yml"}:
            config = parse_yaml(content.decode("utf-8"))
        else:
            config = _json(content, path)
        if not isinstance(config, dict):
            raise CorruptCheckpointError(f"it holds a {type(config).__name__}, not an object.")
        return config


@contextmanager
def damage_is_named(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file makes a library raise into an error that names the file."""
    try:
        yield
    except CheckpointError as error:
        raise type(error)(f"Cannot load {path}: {error}") from error.__cause__
    # Damaged data can make the zip, zlib, pickle, JSON and safetensors readers raise nearly
    # anything: EOFError, KeyError, IndexError, struct.error, zlib.error, UnicodeDecodeError, ...
    except Exception as error:
        if isinstance(error, OSError) and error.filename is not None:  # it cannot be opened
            raise
        raise CorruptCheckpointError(
            f"Cannot load {path}: it is truncated or damaged ({reason_of(error)}). "
            "Download or copy it again and compare its size and checksum with the source."
        ) from error


def reason_of(error: Exception) -> str:
    """Return a library's error as one short line that is fit to print."""
    text = " ".join(str(error).split())[:_MAX_REASON]
    plain = "".join(letter if letter.isprintable() else "?" for letter in text)
    return f"{type(error).__name__}: {plain}" if plain else type(error).__name__


@contextmanager
def _refusal_is_corrupt(where: Path | str) -> Iterator[None]:
    """Turn the refusal of a file that is not a regular one, or of endless JSON, into our error."""
    try:
        yield
    except ValueError as error:
        subject = where if isinstance(where, str) else "it"  # a part of the file has a name
        reason = str(error).removeprefix(f"{where} ")
        raise CorruptCheckpointError(f"{subject} {reason}.") from error


@contextmanager
def _weights(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Yield an open regular file and its size."""
    with _refusal_is_corrupt(path):
        file = open_regular(path)
    with file:
        size = os.fstat(file.fileno()).st_size
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if size > memory:
            raise CorruptCheckpointError(
                f"it has {size:,} bytes, and this machine has {memory:,} bytes of memory. If it "
                "should be smaller, download or copy it again."
            )
        yield file, size


def _safetensors(path: Path, file: Stream, size: int) -> dict[str, Tensor]:
    """Return the tensors, once the header agrees with the size of the file."""
    (n_header,) = struct.unpack("<Q", file.read(8))
    if not 2 <= n_header <= min(_MAX_SAFETENSORS_HEADER, size - 8):
        raise CorruptCheckpointError(
            f"its header announces {n_header:,} bytes; that of an SAE has a few hundred."
        )
    header = _json(file.read(n_header), "its header")
    tensors = {name: at for name, at in header.items() if name != "__metadata__"}
    n_bytes = max((at["data_offsets"][1] for at in tensors.values()), default=0)
    if n_bytes != size - 8 - n_header:
        raise CorruptCheckpointError(
            f"its header announces {shown(n_bytes)} bytes of numbers, but there are "
            f"{size - 8 - n_header}. It is truncated or damaged: download or copy it again."
        )
    return safetensors.torch.load_file(path, device="cpu")


def _json(content: bytes, where: Path | str) -> Any:
    """Return the value of JSON of bounded size and depth, without repeated keys."""
    with _refusal_is_corrupt(where):
        return parse_json(content, where, unique=True)


def _gunzip(file: Stream) -> bytes:
    """Return the content of one gzip member, which ends the file."""
    inflate = zlib.decompressobj(wbits=31)
    content = bytearray()
    n_read = 0
    while not inflate.eof:
        piece = inflate.unconsumed_tail
        if not piece:
            piece = file.read(_CHUNK)
            n_read += len(piece)
        if not piece:
            raise EOFError("it ends too early")
        content += inflate.decompress(piece, _CHUNK)
        if len(content) > max(MAX_GZIP_FLOOR_BYTES, MAX_GZIP_RATIO * n_read):
            raise CorruptCheckpointError(
                f"{n_read} compressed bytes expand past {len(content)}; weights do not compress so "
                "well."
            )
    if inflate.unused_data or file.read(1):
        raise CorruptCheckpointError("something follows the end of its compressed content.")
    return bytes(content)


def _saev_header(file: Stream) -> dict[str, Any]:
    line = file.readline(MAX_CONFIG_BYTES)
    if not line.endswith(b"\n"):
        raise CorruptCheckpointError("its JSON header line has no end.")
    header = _json(line, "the first line")
    if not isinstance(header, dict):
        raise CorruptCheckpointError("its header line is not a JSON object.")
    return header
