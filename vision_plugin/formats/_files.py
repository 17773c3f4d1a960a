"""Readers of files as plain data: torch archives, pickles, gzip, safetensors, saev, JSON, YAML.

Every reader checks sizes before it allocates, and turns any error that a damaged file causes in a
library into a `CorruptCheckpointError` that names the file.
"""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml

from vision_plugin.formats._errors import (
    CheckpointError,
    CorruptCheckpointError,
    RefusedCheckpointError,
)
from vision_plugin.formats._unpickle import InertUnpickler

MAX_CONFIG_BYTES = 1 << 20
MAX_PICKLE_BYTES = 16 << 20
# gzip saves some ten per cent of float weights; a ratio of twenty is a bomb.
MAX_GZIP_RATIO = 20
MAX_GZIP_FLOOR_BYTES = 64 << 20
_LEGACY_TORCH_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")


@dataclass(frozen=True)
class WeightsFile:
    """Content of one weights file.

    Attributes:
        path: The file.
        content: Tensors, plain containers and inert objects, nested as the file nests them.
        header: The JSON object that precedes the weights (saev), or None.
    """

    path: Path
    content: Any
    header: dict[str, Any] | None = field(default=None)


def read_weights(path: Path) -> WeightsFile:
    """Read a weights file of any supported container.

    Args:
        path: A `.pt`, `.pth`, `.pkl.gz`, `.safetensors` or saev file; recognised by content.

    Raises:
        CorruptCheckpointError: The file is truncated or damaged.
        UnsafeCheckpointError: The file asks for code to be run.
    """
    with _damage_is_named(path):
        with path.open("rb") as file:
            start = file.read(64)
        if start.startswith(b"version https://git-lfs"):
            raise CorruptCheckpointError(
                "it is a Git LFS pointer, not the weights. Fetch them with `git lfs pull`."
            )
        if start[8:9] == b"{" and not start.startswith(b"{"):
            return WeightsFile(path, safetensors.torch.load_file(path, device="cpu"))
        data = path.read_bytes()
        if start.startswith(b"\x1f\x8b"):
            data = _gunzip(data)
        if data.startswith(b"{"):
            header, archive = _split_header(data)
            return WeightsFile(path, _torch_archive(archive), header)
        return WeightsFile(path, _pickled(data))


def read_config(path: Path) -> dict[str, Any]:
    """Read a JSON or YAML object of at most `MAX_CONFIG_BYTES` bytes.

    Raises:
        CorruptCheckpointError: Too large, not JSON or YAML, or not an object.
    """
    with _damage_is_named(path):
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CorruptCheckpointError(
                f"it is {path.stat().st_size} bytes long; a config has at most {MAX_CONFIG_BYTES}."
            )
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text) if path.suffix in {".yaml", ".yml"} else _strict_json(text)
        if not isinstance(content, dict):
            raise CorruptCheckpointError(f"it holds a {type(content).__name__}, not an object.")
        return content


def _strict_json(text: str) -> Any:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            raise CorruptCheckpointError("a key appears twice in one of its objects.")
        return content

    return json.loads(text, object_pairs_hook=no_duplicates)


def _gunzip(data: bytes) -> bytes:
    limit = max(MAX_GZIP_FLOOR_BYTES, MAX_GZIP_RATIO * len(data))
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise CorruptCheckpointError(
            f"{len(data)} compressed bytes expand past {limit}; weights do not compress so well."
        )
    return content


def _split_header(data: bytes) -> tuple[dict[str, Any], bytes]:
    end = data.find(b"\n", 0, MAX_CONFIG_BYTES)
    if end < 0:
        raise CorruptCheckpointError("its JSON header line has no end.")
    header = _strict_json(data[:end].decode("utf-8"))
    if not isinstance(header, dict):
        raise CorruptCheckpointError("its header line is not a JSON object.")
    return header, data[end + 1 :]


def _pickled(data: bytes) -> Any:
    if data.startswith(b"PK\x03\x04"):
        return _torch_archive(data)
    if not data.startswith(b"\x80"):
        raise CorruptCheckpointError(
            f"it starts with {data[:8]!r}: neither a torch file, a pickle, gzip nor safetensors."
        )
    if _LEGACY_TORCH_MAGIC in data[:32]:
        try:
            return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        except Exception as error:
            raise RefusedCheckpointError(
                "it is in torch's format before version 1.6 and holds more than tensors. Load "
                "it where it was written and save it again with "
                "`torch.save({'cfg': vars(cfg), 'state_dict': sae.state_dict()}, path)`."
            ) from error
    return InertUnpickler(io.BytesIO(data)).load()


def _torch_archive(data: bytes) -> Any:
    """Return the content of a zip that `torch.save` wrote, after checks of each entry."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise CorruptCheckpointError("its archive holds two entries of one name.")
        if sum(entry.file_size for entry in entries.values()) > len(data):
            raise CorruptCheckpointError("its archive announces more bytes than it has.")
        pickles = [name for name in entries if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CorruptCheckpointError("its archive was not written by torch.save.")
        folder = pickles[0].removesuffix("data.pkl")
        order = entries.get(f"{folder}byteorder")
        if order is not None and archive.read(order).strip() != b"little":
            raise RefusedCheckpointError("it was written on a big-endian machine.")
        if entries[pickles[0]].file_size > MAX_PICKLE_BYTES:
            raise CorruptCheckpointError("its data.pkl is too large for a checkpoint.")
        cache: dict[str, torch.Tensor] = {}

        def storage(key: str, dtype: torch.dtype, n_elements: int) -> torch.Tensor:
            entry = entries.get(f"{folder}data/{key}")
            if entry is None or entry.file_size != n_elements * dtype.itemsize:
                raise CorruptCheckpointError(
                    f"its storage {key!r} does not hold the expected {n_elements} {dtype} values."
                )
            if n_elements == 0:
                return torch.empty(0, dtype=dtype)
            if key not in cache:
                cache[key] = torch.frombuffer(bytearray(archive.read(entry)), dtype=torch.uint8)
            return cache[key].view(dtype)

        return InertUnpickler(io.BytesIO(archive.read(pickles[0])), storage).load()


@contextmanager
def _damage_is_named(path: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise type(error)(f"Cannot load {path}: {error}") from error.__cause__
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise CorruptCheckpointError(_damaged(path, error)) from error
        raise
    # Damaged data can make the zip, gzip, pickle, JSON and safetensors readers raise nearly
    # anything: EOFError, KeyError, IndexError, struct.error, zlib.error, UnicodeDecodeError, ...
    except Exception as error:
        raise CorruptCheckpointError(_damaged(path, error)) from error


def _damaged(path: Path, error: Exception) -> str:
    return (
        f"Cannot load {path}: it is truncated or damaged ({type(error).__name__}: {error}). "
        "Download or copy it again and compare its size and checksum with the source."
    )
