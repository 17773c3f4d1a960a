"""What a killed build leaves beside its place, so that the next one goes on from there."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vision_plugin._disk import whole_file, write_json, write_tensors
from vision_plugin._ours import REPORT_WORK
from vision_plugin._untrusted import read_json
from vision_plugin._version import __version__
from vision_plugin.models.site import signature

logger = logging.getLogger(__name__)

SAVE_EVERY_S = 20.0
KIND = "vision_plugin.report-work"


@dataclass
class Checkpoint:
    """A folder beside the report with the state of its passes; None keeps nothing."""

    folder: Path | None
    key: str = ""
    saved: float = field(default_factory=time.monotonic)

    @property
    def due(self) -> bool:
        """Whether enough time has passed for another state to be saved."""
        return self.folder is not None and time.monotonic() - self.saved >= SAVE_EVERY_S

    @property
    def place(self) -> Path | None:
        """Folder for files that outlast a kill."""
        if self.folder is not None:
            self._make()
        return self.folder

    def save(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Save a state under a name, whole or not at all."""
        if self.folder is None:
            return
        self._make()
        plain = {key: value.detach().cpu().contiguous() for key, value in state.items()}
        with whole_file(self.folder / f"{name}.safetensors") as stream:
            write_tensors(stream, plain)
        self.saved = time.monotonic()

    def load(self, name: str) -> dict[str, Tensor] | None:
        """Return the state that a killed build of the same report saved, if there is one."""
        if self.folder is None or not (self.folder / f"{name}.safetensors").is_file():
            return None
        try:
            state = load_file(self.folder / f"{name}.safetensors")
        except (OSError, SafetensorError) as error:
            logger.warning("the report begins anew: %s", error)
            return None
        logger.info("the report goes on where a killed build was at its %s", name)
        return state

    def _make(self) -> None:
        assert self.folder is not None
        if not self.folder.is_dir():
            self.folder.mkdir()
            write_json({"kind": KIND, "key": self.key}, self.folder / REPORT_WORK.marker)


def no_checkpoint() -> Checkpoint:
    """Return a checkpoint that keeps nothing."""
    return Checkpoint(None)


@contextmanager
def checkpoint_for(place: Path, key: str | None) -> Iterator[Checkpoint]:
    """Yield the checkpoint of the report at a place, and remove it when the block ends.

    It outlasts a kill and a stop by hand. What a build of another report left there is removed.

    Args:
        place: Folder of the report.
        key: Says which report it is; None keeps nothing.
    """
    folder = place.with_name(f".{place.name}.going-on")
    if folder.exists() and (key is None or _key_of(folder) != key):
        _remove(folder)
    if key is None or (folder.exists() and not REPORT_WORK.is_one(folder)):
        yield no_checkpoint()
        return
    try:
        yield Checkpoint(folder, key)
    except Exception:
        _remove(folder)
        raise
    _remove(folder)


def key_of(parts: Mapping[str, Any]) -> str:
    """Return a text that tells reports apart: of tensors, settings and the images' ids."""
    digest = hashlib.sha256(__version__.encode())
    for name, part in sorted(parts.items()):
        digest.update(f"\0{name}\0".encode())
        if isinstance(part, Mapping):
            for key, value in sorted(part.items()):
                digest.update(f"{key}\0".encode())
                digest.update(_bytes_of(value))
        else:
            digest.update(repr(part).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def parts_of(sae: Any, encoder: Any, reader: Any, sizes: Any, features: list[int]) -> Any:
    """Return what tells a report's passes apart; None where images have no ids to be known by."""
    ids = getattr(reader.images, "ids", None)
    if ids is None or encoder is None or reader.sequential:
        return None
    return {
        "sae": sae.state_dict(),
        "model": signature(encoder.model),
        "site": (encoder.site.hook_name, encoder.tokens),
        "images": (len(reader), [str(each) for each in ids]),
        "sizes": asdict(sizes),
        "features": features,
    }


def _bytes_of(value: Any) -> bytes:
    if not isinstance(value, Tensor):
        return repr(value).encode()
    flat: Any = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy()).digest()


def _key_of(folder: Path) -> str | None:
    if not REPORT_WORK.is_one(folder):
        return None
    content = read_json(folder / REPORT_WORK.marker)
    return str(content.get("key"))


def _remove(folder: Path) -> None:
    """Remove a folder if a build left it and nothing of anybody else is in it."""
    if folder.is_dir() and REPORT_WORK.is_one(folder) and REPORT_WORK.stranger(folder) is None:
        shutil.rmtree(folder)
