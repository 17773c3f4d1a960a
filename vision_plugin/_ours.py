"""What may be replaced or removed: what this package wrote itself, and nothing else.

Every folder and file that a command writes has a kind. A marker in it says which, and the kind
says what else it may hold. Whatever is not of the kind belongs to somebody, and is refused by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vision_plugin._paths import local_path
from vision_plugin._untrusted import open_regular, read_json

MAX_MARKER_BYTES = 16 * 2**20
_BEGINNING = 4096
"""Bytes of a file within which its schema stands."""


@dataclass(frozen=True)
class Kind:
    """A kind of folder that this package writes."""

    noun: str
    """What it is, as in ``a report``."""
    marker: str
    """File that says so, as a JSON object."""
    is_marked: Callable[[dict[str, Any]], bool] | None = field(repr=False)
    """Whether the marker's content says so; None where it is enough that the marker is there."""
    contents: re.Pattern[str] = field(repr=False)
    """Names, with their folders, of all that it may hold."""

    def stranger(self, folder: Path) -> str | None:
        """Return the name of something in a folder of this kind that somebody else wrote."""
        for parent, folders, files in os.walk(folder):
            links = [name for name in folders if os.path.islink(os.path.join(parent, name))]  # noqa: PTH114, PTH118
            for name in [*files, *links, *([] if files or folders else [""])]:
                place = Path(parent, name).relative_to(folder).as_posix()
                if place != "." and not self.contents.fullmatch(place):
                    return place
        return None

    def is_one(self, folder: Path) -> bool:
        """Whether a folder has the marker of this kind."""
        if self.is_marked is None:
            return (folder / self.marker).is_file()
        try:
            content = read_json(folder / self.marker, limit=MAX_MARKER_BYTES)
        except (OSError, ValueError):
            return False
        return isinstance(content, dict) and self.is_marked(content)


SAE_FOLDER = Kind(
    noun="an SAE of vision_plugin",
    marker="cfg.json",
    is_marked=lambda content: (
        isinstance(content.get("sha256"), dict)  # the seal of whatever is saved here
        or (
            isinstance(metadata := content.get("metadata"), dict)
            and not {"model_signature", "input_normalization"}.isdisjoint(metadata)
        )
    ),
    contents=re.compile(
        r"cfg\.json|runner_cfg\.json"
        r"|(\.unfinished-([0-9A-Za-z]+-)?[0-9]+-([0-9a-f]{8}-)?)?(evaluation|names)\.json"
        r"|validation\.jsonl|sae_weights\.safetensors|sparsity\.safetensors"
    ),
)
"""What training and ``convert`` write, in SAELens's format."""
CHECKPOINT = Kind(
    noun="a checkpoint",
    marker="state.json",
    is_marked=None,
    contents=re.compile(r"state\.json|tensors\.safetensors"),
)
REPORT = Kind(
    noun="a report of vision_plugin",
    marker="report.json",
    is_marked=lambda content: content.get("kind") == "vision_plugin.report",
    contents=re.compile(  # reports of version 0.1.0 keep their images in ``pictures``
        r"report\.json|checksums\.json|\.building|(data|map|compare)\.js|assets(/[\w.-]+)?"
        r"|(index|map|images|compare|summary)\.html|patches(/[0-9]+\.js)?"
        r"|features(/[0-9]+\.html)?|(images|pictures|thumbs)(/[0-9]+\.(png|jpg))?"
    ),
)
REPORT_WORK = Kind(
    noun="what a killed report left",
    marker="work.json",
    is_marked=lambda content: content.get("kind") == "vision_plugin.report-work",
    contents=re.compile(
        r"work\.json|heat\.part|(\.unfinished-[0-9]+-)?(counts|maps)\.safetensors"
        r"|(images|thumbs)(/[0-9]+\.(png|jpg))?"
    ),
)
STUDY = Kind(
    noun="a sparsity study",
    marker="sparsity.json",
    is_marked=lambda content: str(content.get("schema")).startswith("vision_plugin.sparsity/"),
    contents=re.compile(r"sparsity\.(json|png|txt)"),
)
TASK = Kind(
    noun="the results of a task",
    marker="results.json",
    is_marked=lambda content: isinstance(content.get("task"), str) and "rows" in content,
    contents=re.compile(
        r"results\.json|edit\.json|table\.txt|[\w-]+\.png|edits(/[\w-]+\.json)?"
        r"|sae(/\d+)?(/(cfg|runner_cfg)\.json|/(sae_weights|sparsity)\.safetensors)?"
    ),
)

DECOMPOSITION = Kind(
    noun="a decomposition",
    marker="decomposition.json",
    is_marked=lambda content: str(content.get("schema")).startswith("vision_plugin.decompose/"),
    contents=re.compile(r"decomposition\.json|table\.txt|(shares|ablation|maps|second_order)\.png"),
)
"""What ``decompose`` writes."""
LENS = Kind(
    noun="the results of a lens",
    marker="results.json",
    is_marked=lambda content: str(content.get("schema")).startswith("vision_plugin.lens/"),
    contents=re.compile(r"results\.json|table\.txt|[\w-]+\.(png|html)|edits(/[\w-]+\.json)?"),
)


def check_replaceable(folder: Path, kind: Kind | None, *, name: str = "output_path") -> None:
    """Raise unless a folder may be put in a place: nothing is there, or an empty folder, or ours.

    Args:
        folder: The place.
        kind: Kind of folder that may be replaced there; None allows none.
        name: Argument that names the place, for errors.

    Raises:
        FileExistsError: something else is there; the message names it.
        NotADirectoryError: a parent is a file.
        ValueError: links lead round in a circle.
    """
    folder = local_path(folder)
    while True:
        before = _identity(folder)
        try:
            _check_replaceable(folder, kind, name)
        except OSError:
            if _identity(folder) == before:
                raise
            continue  # another process put its own folder there while this one was looking
        return


def _identity(path: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        found = path.stat()
        return found.st_dev, found.st_ino
    return None


def _check_replaceable(folder: Path, kind: Kind | None, name: str) -> None:
    if not os.path.lexists(folder):
        check_parent(folder, name=name)
        return
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "is a link to nothing"
        raise FileExistsError(f"{folder} {what}, where a folder is needed: name another {name}=")
    inside = sorted(path.name for path in folder.iterdir())
    if not inside:
        return
    if kind is None or not kind.is_one(folder):
        wanted = "" if kind is None else f" and is not {kind.noun}"
        raise FileExistsError(
            f"{folder} holds {inside[0]!r}{wanted}, so it is left alone: name another {name}=, or "
            "empty that folder yourself"
        )
    stranger = kind.stranger(folder)
    if stranger is not None:
        raise FileExistsError(
            f"{folder} is {kind.noun}, but {stranger!r} in it was not written by vision_plugin and "
            f"would be lost: move it elsewhere, or name another {name}="
        )


def check_replaceable_file(path: Path, schema: str, *, name: str = "output_path") -> None:
    """Raise unless a JSON file may be put in a place: nothing is there, or one of this schema.

    Args:
        path: The place.
        schema: How the schema of a file begins that may be replaced, as in
            ``vision_plugin.evaluation/``.
        name: Argument that names the place, for errors.

    Raises:
        FileExistsError: something else is there.
        NotADirectoryError: a parent is a file.
    """
    if not os.path.lexists(path):
        check_parent(path, name=name)
        return
    if path.is_dir():
        raise FileExistsError(f"{path} is a folder, where a file is needed: name another {name}=")
    try:
        with open_regular(path) as stream:
            beginning = stream.read(_BEGINNING)
    except (OSError, ValueError):
        beginning = b""
    if not re.match(rb'\s*\{\s*"schema":\s*"' + re.escape(schema).encode(), beginning):
        raise FileExistsError(
            f"{path} was not written by this command, so it is left alone: name another {name}="
        )


def check_parent(path: Path, *, name: str) -> None:
    """Raise unless the folder of a path is there to be written to, or can be made.

    Raises:
        NotADirectoryError: a parent is a file.
        PermissionError: a parent cannot be written to.
    """
    parent = next(above for above in path.absolute().parents if os.path.lexists(above))
    if not parent.is_dir():
        raise NotADirectoryError(f"{parent} is no folder, so {path} cannot be: mend {name}=")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{parent} cannot be written to: name another {name}=")
