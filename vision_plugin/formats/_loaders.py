"""Loaders for SAELens's `SAE.load_from_disk` and `SAE.from_pretrained`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from vision_plugin._paths import local_path
from vision_plugin.formats._checkpoint import ReadOptions
from vision_plugin.formats._formats import read_stock
from vision_plugin.formats._locate import download, native_folder, weights_in
from vision_plugin.formats._native import read_native

State = dict[str, Tensor]


@runtime_checkable
class DiskConverter(Protocol):
    """The signature of `SAE.load_from_disk`'s `converter`."""

    def __call__(
        self,
        path: str | Path,
        device: str = "cpu",
        cfg_overrides: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], State]:
        """Read the checkpoint at `path`."""


@runtime_checkable
class HubConverter(Protocol):
    """The signature of `SAE.from_pretrained`'s `converter`."""

    def __call__(
        self,
        repo_id: str,
        folder_name: str,
        device: str = "cpu",
        force_download: bool = False,
        cfg_overrides: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], State, Tensor | None]:
        """Read the checkpoint in a repository."""


def disk_converter(*, format: str = "auto", **options: Any) -> DiskConverter:
    """Return a converter for `SAE.load_from_disk(path, converter=...)`.

    Args:
        format: The project that wrote the file, or "auto".
        **options: The fields of `ReadOptions`, for what the file leaves out.

    Examples:
        >>> sae = SAE.load_from_disk("runs/sae", converter=vp.formats.disk_converter())
        >>> sae.cfg.d_sae
        256
    """
    chosen = ReadOptions(**options)

    def convert(
        path: str | Path, device: str = "cpu", cfg_overrides: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], State]:
        return _read(local_path(path), device, cfg_overrides, format, chosen)

    return convert


def hub_converter(*, format: str = "auto", **options: Any) -> HubConverter:
    """Return a converter for `SAE.from_pretrained("owner/name", "folder", converter=...)`.

    Args:
        format: The project that wrote the file, or "auto".
        **options: The fields of `ReadOptions`, for what the file leaves out.

    Examples:
        >>> converter = vp.formats.hub_converter(format="saev")
        >>> callable(converter)  # SAE.from_pretrained("owner/name", "folder", converter=converter)
        True
    """
    chosen = ReadOptions(**options)

    def convert(
        repo_id: str,
        folder_name: str,
        device: str = "cpu",
        force_download: bool = False,
        cfg_overrides: dict[str, Any] | None = None,
    ) -> tuple[dict[str, Any], State, Tensor | None]:
        local = download(repo_id, folder_name, force_download=force_download)
        return (*_read(local, device, cfg_overrides, format, chosen), None)

    return convert


def hub_config(
    repo_id: str,
    folder_name: str,
    device: str | None = None,
    force_download: bool = False,
    cfg_overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the config alone, for SAELens's `load_sae_config_from_huggingface`."""
    local = download(repo_id, folder_name, force_download=force_download)
    return _read(local, device or "cpu", cfg_overrides, "auto", ReadOptions())[0]


def _read(
    path: Path,
    device: str,
    overrides: dict[str, Any] | None,
    format: str,
    options: ReadOptions,
) -> tuple[dict[str, Any], State]:
    overrides = dict(overrides or {})
    native = native_folder(path)
    if format in ("auto", "sae_lens") and native is not None:
        return read_native(native, device, overrides)
    stock = read_stock(weights_in(path), format=format, options=options)
    config, state = stock.to_sae_lens(device=device, dtype=overrides.pop("dtype", None))
    config["metadata"] |= overrides.pop("metadata", {})
    return {**config, **overrides}, state
