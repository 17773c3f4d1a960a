"""Checkpoints of a training run: each is written whole, and a run finds the last good one.

A checkpoint is a folder ``step-000001200`` with two files. ``tensors.safetensors`` holds every
tensor of the run's state. ``state.json`` holds the rest, with ``{"tensor": NAME}`` in place of a
tensor, the size and SHA-256 of the tensors' file, and its own SHA-256. Neither file holds code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vision_plugin._checksums import sha256_of
from vision_plugin._disk import NO_ROOM, locked, remove_unfinished, whole_folder, write_tensors
from vision_plugin._ours import CHECKPOINT

logger = logging.getLogger(__name__)

SCHEMA = "vision_plugin.checkpoint/1"
TENSORS, STATE, LOCK = "tensors.safetensors", "state.json", ".lock"
VALIDATION_FILE = "validation.jsonl"
KEPT = 2
"""Checkpoints to keep: the newest, and the one before it in case the newest is damaged."""
MAX_STATE_BYTES = 256 * 1024 * 1024
_STEP = "step-"


class CheckpointError(ValueError):
    """A checkpoint is damaged, or another run wrote it."""


class CheckpointFullError(OSError):
    """The disk has no room for a checkpoint; the earlier ones stay."""


class CheckpointLockedError(ValueError):
    """Another process is training into the same folder."""


class CheckpointFolder:
    """The checkpoints of one run. Until it is done, a run writes nowhere else."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder's lock during a ``with`` block; make the folder if it does not exist.

        The system releases the lock when the process ends for any reason. Entering the block
        removes what a killed process left unfinished. Leaving it removes a folder without
        checkpoints.

        Raises:
            CheckpointLockedError: another process holds the lock.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        busy = CheckpointLockedError(
            f"another run is writing its checkpoints to {self.path}. Wait for it, or "
            "name another output_path="
        )
        with locked(self.path / LOCK, busy):
            remove_unfinished(self.path)
            try:
                yield
            finally:
                if not self.steps():
                    for name in (LOCK, VALIDATION_FILE):
                        (self.path / name).unlink(missing_ok=True)
                    with contextlib.suppress(OSError):  # somebody has put something there
                        self.path.rmdir()

    def steps(self) -> list[int]:
        """Return the steps that have a checkpoint, ascending.

        A folder of such a name with anything else in it is somebody's own.
        """
        found = (path for path in self.path.glob(f"{_STEP}*") if path.is_dir())
        ours = [
            path.name.removeprefix(_STEP) for path in found if CHECKPOINT.stranger(path) is None
        ]
        return sorted(int(step) for step in ours if re.fullmatch(r"[0-9]{9,}", step))

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write a checkpoint that is seen complete or not at all, and that outlasts a power cut.

        Args:
            step: Number of the training step; a checkpoint of the same step is replaced.
            state: Dictionaries and lists of tensors and JSON values, nested to any depth.

        Raises:
            CheckpointFullError: the disk has no room. The earlier checkpoints stay.
        """
        tensors: dict[str, Tensor] = {}
        document = _without_tensors(state, "", tensors)
        try:
            with whole_folder(self._folder(step), replaces=CHECKPOINT) as folder:
                with (folder / TENSORS).open("wb") as stream:
                    written = asdict(write_tensors(stream, tensors))
                content = {"schema": SCHEMA, "step": step, "tensors": written, "state": document}
                sealed = {"sha256": _seal(content), **content}
                (folder / STATE).write_text(json.dumps(sealed) + "\n", encoding="utf-8")
        except OSError as error:
            if error.errno in NO_ROOM:
                raise self._no_room(step, error) from error
            raise
        for old in self.steps()[:-KEPT]:
            self._remove(old)

    def last(self) -> tuple[int, dict[str, Any]] | None:
        """Return step and state of the newest good checkpoint, or None if there is none.

        A damaged checkpoint is skipped with a warning.
        """
        for step in reversed(self.steps()):
            try:
                return step, self.load(step)
            except (CheckpointError, OSError) as error:
                logger.warning("skipping checkpoint %s: %s", self._folder(step), error)
        return None

    def load(self, step: int) -> dict[str, Any]:
        """Return the state that :meth:`save` wrote.

        Raises:
            CheckpointError: a file differs from the one that :meth:`save` wrote.
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
            raise CheckpointError(
                f"{STATE} has schema {schema!r}, but this version reads {SCHEMA!r}"
            )
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

    def shared(self, step: int) -> dict[str, Any]:
        """Return the state of a checkpoint that another process, of the same run, found.

        Raises:
            CheckpointError: this machine does not see the folder, or the checkpoint is damaged.
        """
        try:
            return self.load(step)
        except FileNotFoundError:
            raise CheckpointError(
                f"another process of this run continues from {self._folder(step)}, which this "
                f"machine ({socket.gethostname()}) does not see: put output_path= on a disk that "
                "all of them share"
            ) from None

    def clear(self) -> None:
        """Remove every checkpoint, after the run has finished or before it begins anew."""
        for step in self.steps():
            self._remove(step)

    def _remove(self, step: int) -> None:
        folder = self._folder(step)
        (folder / TENSORS).unlink(missing_ok=True)  # the marker last, so that the rest stays ours
        shutil.rmtree(folder, ignore_errors=True)

    def _folder(self, step: int) -> Path:
        return self.path / f"{_STEP}{step:09d}"

    def _no_room(self, step: int, error: OSError) -> CheckpointFullError:
        steps = self.steps()
        kept = f"The checkpoint of step {steps[-1]} is safe: free" if steps else "Free"
        return CheckpointFullError(
            error.errno,
            f"no room to write the checkpoint of step {step} "
            f"({os.strerror(error.errno or 0)}). {kept} some room and run the same command again",
            str(self.path),
        )


def _seal(content: dict[str, Any]) -> str:
    """Return the SHA-256 of JSON content; the order of its keys and its spaces do not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _without_tensors(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Return the value with names in place of its tensors, and add these to ``tensors``."""
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
