"""Checkpoints of a training run: written whole or not at all, and the last good one found again.

A checkpoint is a folder ``step-000001200`` with two files. ``tensors.safetensors`` holds every
tensor of the run's state. ``state.json`` holds the rest, with ``{"tensor": NAME}`` where a tensor
stood, the size and SHA-256 of the tensors' file, and its own SHA-256. Nothing in it is code.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vision_plugin._disk import NO_ROOM, put_in_place

logger = logging.getLogger(__name__)

SCHEMA = "vision_plugin.checkpoint/1"
TENSORS, STATE, LOCK = "tensors.safetensors", "state.json", ".lock"
KEPT = 2
"""Checkpoints that are kept: the newest, and the one before it, should the newest be damaged."""
MAX_STATE_BYTES = 256 * 1024 * 1024
_STEP, _PARTIAL = "step-", ".partial-"
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class CheckpointError(ValueError):
    """A checkpoint is damaged, or belongs to another run."""


class CheckpointFullError(OSError):
    """The disk has no room for a checkpoint; those before it are kept."""


class CheckpointLockedError(ValueError):
    """Another process is training into the same folder."""


class CheckpointFolder:
    """The checkpoints of one run, and the only place where it writes before it is done."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, made if need be, for the length of a ``with`` block.

        The system lets go of it when the process ends, however it ends. What a killed process
        was writing is removed. A folder without checkpoints is taken away at the end.

        Raises:
            CheckpointLockedError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK).open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise CheckpointLockedError(
                    f"another run is writing its checkpoints to {self.path}. Wait for it, or "
                    "name another --output-path"
                ) from error
            for leftover in self.path.glob(f"{_PARTIAL}*"):
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                yield
            finally:
                if not self.steps():
                    shutil.rmtree(self.path, ignore_errors=True)

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, ascending."""
        found = [path.name.removeprefix(_STEP) for path in self.path.glob(f"{_STEP}*")]
        return sorted(int(step) for step in found if step.isdigit())

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint so that it is seen complete or not at all, and outlasts a power cut.

        Args:
            step: Its number; the checkpoint of that step is replaced.
            state: Dictionaries and lists of tensors and JSON values, nested as needed.

        Raises:
            CheckpointFullError: there is no room. The checkpoints before it are kept.
        """
        partial = self.partial(f"{_STEP}{step}")
        try:
            partial.mkdir()
            tensors: dict[str, Tensor] = {}
            document = _without_tensors(state, "", tensors)
            digest = write_tensors(partial / TENSORS, tensors)
            content = {"schema": SCHEMA, "step": step, "tensors": digest, "state": document}
            sealed = {"sha256": _seal(content), **content}
            _write(partial / STATE, (json.dumps(sealed) + "\n").encode())
            put_in_place(partial, self._folder(step))
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if error.errno in NO_ROOM:
                raise self._no_room(step, error) from error
            raise
        for old in self.steps()[:-KEPT]:
            shutil.rmtree(self._folder(old), ignore_errors=True)

    def last(self) -> tuple[int, dict[str, Any]] | None:
        """Step and state of the newest checkpoint that is whole; None where there is none.

        A damaged one is reported in the log and passed over.
        """
        for step in reversed(self.steps()):
            try:
                return step, self.load(step)
            except (CheckpointError, OSError) as error:
                logger.warning("checkpoint %s is passed over: %s", self._folder(step), error)
        return None

    def load(self, step: int) -> dict[str, Any]:
        """State that :meth:`save` was given.

        Raises:
            CheckpointError: a file is not the one that was written.
        """
        folder = self._folder(step)
        if (folder / STATE).stat().st_size > MAX_STATE_BYTES:
            raise CheckpointError(f"{STATE} is larger than {MAX_STATE_BYTES:,} bytes")
        try:
            content = json.loads((folder / STATE).read_text(encoding="utf-8"))
            seal = content.pop("sha256")
            schema, document, expected = (content[key] for key in ("schema", "state", "tensors"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{STATE} is damaged ({error!r})") from error
        if schema != SCHEMA:
            raise CheckpointError(f"{STATE} has schema {schema!r}, this version reads {SCHEMA!r}")
        if seal != _seal(content):
            raise CheckpointError(f"{STATE} is damaged (its SHA-256 is not {seal})")
        found = _digest(folder / TENSORS)
        if found != expected:
            raise CheckpointError(f"{TENSORS} should be {expected}, but is {found}")
        try:
            tensors = load_file(folder / TENSORS)
            state: dict[str, Any] = _with_tensors(document, tensors)
        except (SafetensorError, KeyError) as error:
            raise CheckpointError(f"{TENSORS} is damaged ({error})") from error
        return state

    def partial(self, name: str) -> Path:
        """A place for something that is being written; cleared when a run starts."""
        return self.path / f"{_PARTIAL}{os.getpid()}-{name}"

    def clear(self) -> None:
        """Remove every checkpoint; the run is done, or begins anew."""
        for step in self.steps():
            shutil.rmtree(self._folder(step), ignore_errors=True)

    def _folder(self, step: int) -> Path:
        return self.path / f"{_STEP}{step:09d}"

    def _no_room(self, step: int, error: OSError) -> CheckpointFullError:
        steps = self.steps()
        kept = f"The one of step {steps[-1]} is kept: free" if steps else "Free"
        return CheckpointFullError(
            error.errno,
            f"no room to write the checkpoint of step {step} "
            f"({os.strerror(error.errno or 0)}). {kept} some room and run the same command again",
            str(self.path),
        )


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file, tensor by tensor, and return its bytes and SHA-256.

    The library's own writer hides the system's error number, by which a full disk is told.
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        shape = list(tensor.shape)
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": shape,
            "data_offsets": [begin, end],
        }
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as stream:
        n_bytes = _put(stream, digest, len(head).to_bytes(8, "little") + head)
        for tensor in tensors.values():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                n_bytes += _put(stream, digest, flat.view(torch.uint8).numpy())
        stream.flush()
        os.fsync(stream.fileno())
    return {"bytes": n_bytes, "sha256": digest.hexdigest()}


def _put(stream: BinaryIO, digest: Any, content: Any) -> int:
    stream.write(content)
    digest.update(content)
    return len(content)


def _seal(content: dict[str, Any]) -> str:
    """SHA-256 of JSON content, whatever the order of its keys and its spaces."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _without_tensors(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """The value with each tensor put into ``tensors`` and its name in its place."""
    if isinstance(value, Tensor):
        tensors[place] = value
        return {"tensor": place}
    if isinstance(value, dict):
        return {
            str(key): _without_tensors(part, f"{place}/{key}" if place else str(key), tensors)
            for key, part in value.items()
        }
    if isinstance(value, list | tuple):
        return [_without_tensors(p, f"{place}/{i}", tensors) for i, p in enumerate(value)]
    return value


def _with_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {"tensor"}:
            return tensors[value["tensor"]]
        return {key: _with_tensors(part, tensors) for key, part in value.items()}
    if isinstance(value, list):
        return [_with_tensors(part, tensors) for part in value]
    return value
