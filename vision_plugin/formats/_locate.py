"""Finding the weights: a file, a folder, or a repository on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

import huggingface_hub

from vision_plugin.formats._errors import RefusedCheckpointError, UnknownFormatError

NATIVE_CONFIG, NATIVE_WEIGHTS = "cfg.json", "sae_weights.safetensors"
_WEIGHT_NAMES = (
    "sae.pt",
    "ae.pt",
    "weights.pt",
    "model.safetensors",
    "model.pt",
    "state_dict.pth",
    "model.pth",
    "sae.pkl.gz",
)
_NUMBERED = "n_images_*.pt"  # Prisma's checkpoints
_NOT_WEIGHTS = "_log_feature_sparsity"
_CONFIG_NAMES = ("config.json", "config.yaml", "config.yml", NATIVE_CONFIG)
_WEIGHT_SUFFIXES = (".pt", ".pth", ".safetensors", ".gz")
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# A release's table may name another repository for an SAE.
_REPOSITORY_PREFIX = "hf://"


def is_native(path: Path) -> bool:
    """Return whether `path` is a folder with the files that SAELens writes, of whatever kind."""
    return all(os.path.lexists(path / name) for name in (NATIVE_CONFIG, NATIVE_WEIGHTS))


def native_folder(path: Path) -> Path | None:
    """Return the folder that SAELens wrote, for that folder or its weights file; else None."""
    folder = path.parent if path.name == NATIVE_WEIGHTS else path
    return folder if is_native(folder) else None


def weights_in(path: Path) -> Path:
    """Return the one weights file that `path` names or holds.

    Raises:
        FileNotFoundError: There is none.
        UnknownFormatError: There are several.
    """
    if not path.is_dir():
        if not os.path.lexists(path):
            raise FileNotFoundError(
                f"There is no checkpoint at {path}: name its folder or its weights file."
            )
        return path
    # What has the name of a weights file and is no regular file is refused when it is opened.
    known = [path / name for name in _WEIGHT_NAMES if os.path.lexists(path / name)]
    known += [file for file in sorted(path.glob(_NUMBERED)) if _NOT_WEIGHTS not in file.name]
    found = known or [
        file
        for file in sorted(path.iterdir())
        if file.name.endswith(_WEIGHT_SUFFIXES) and _NOT_WEIGHTS not in file.name
    ]
    if len(found) == 1:
        return found[0]
    if not found:
        raise FileNotFoundError(
            f"{path} holds no weights file. Looked for {NATIVE_WEIGHTS} with {NATIVE_CONFIG}, "
            f"{', '.join(_WEIGHT_NAMES)}, {_NUMBERED}, and any {', '.join(_WEIGHT_SUFFIXES)}."
        )
    raise UnknownFormatError(
        f"{path} holds several weights files, {[file.name for file in found[:10]]}. "
        "Give the path of the one you mean."
    )


def is_repository(text: str) -> bool:
    """Return whether `text` has the form of a repository id, `owner/name`."""
    return _REPOSITORY.fullmatch(text) is not None


def inside(folder: Path, relative: str) -> Path:
    """Return `folder / relative`, which may not leave `folder`.

    Raises:
        RefusedCheckpointError: It leaves `folder`.
    """
    parts = PurePosixPath(relative)
    if parts.is_absolute() or ".." in parts.parts or "\\" in relative:
        raise RefusedCheckpointError(f"{relative!r} leads out of {folder}.")
    return folder / parts


def download(
    repo_id: str, path: str = "", *, revision: str | None = None, force_download: bool = False
) -> Path:
    """Return the local copy of a checkpoint on the hub; only its own files are downloaded.

    Args:
        repo_id: `owner/name`.
        path: Folder or weights file inside it; `hf://owner/name[/path]` names another repository.
        revision: Branch, tag or commit.
        force_download: Whether to download again what is cached.

    Raises:
        FileNotFoundError: The repository is neither reachable nor cached, or lacks the file.
    """
    if path.startswith(_REPOSITORY_PREFIX):
        owner, name, *rest = path.removeprefix(_REPOSITORY_PREFIX).split("/")
        repo_id, path = f"{owner}/{name}", "/".join(rest)
    path = path.strip("/").removeprefix(".")
    inside(Path(), path)
    if path.endswith(_WEIGHT_SUFFIXES):
        file = PurePosixPath(path)
        folders = [file.parent]
        if file.parent.name == "checkpoints":
            folders.append(file.parent.parent)
        wanted = [path, *(str(folder / name) for folder in folders for name in _CONFIG_NAMES)]
    else:
        names = (*_WEIGHT_NAMES, _NUMBERED, NATIVE_WEIGHTS, *_CONFIG_NAMES)
        wanted = [str(PurePosixPath(path) / name) for name in names]
    try:
        snapshot = huggingface_hub.snapshot_download(
            repo_id, revision=revision, allow_patterns=wanted, force_download=force_download
        )
    except Exception as error:
        raise FileNotFoundError(
            f"Cannot get {path or 'the checkpoint'} of {repo_id} from the hub or its cache "
            f"({type(error).__name__}: {error})."
        ) from error
    local = inside(Path(snapshot), path)
    if not local.exists():
        raise FileNotFoundError(f"{repo_id} has no {path}.")
    return local
