"""`load_sae`: load any published checkpoint as a stock SAELens SAE."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from torch import Tensor

from vision_plugin._device import usable_device
from vision_plugin._paths import local_path
from vision_plugin.formats._checkpoint import Activation, NegativeLatents, RowNormalization
from vision_plugin.formats._errors import CorruptCheckpointError
from vision_plugin.formats._files import reason_of
from vision_plugin.formats._formats import FORMATS
from vision_plugin.formats._loaders import disk_converter, hub_converter
from vision_plugin.formats._locate import download, inside, is_repository
from vision_plugin.formats._releases import read_releases, register


def load_sae(
    path_or_repo: str | Path,
    sae_id: str = "",
    *,
    format: str = "auto",
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    fold_W_dec_norm: bool = False,
    activation: Activation | None = None,
    k: int | None = None,
    threshold: float | None = None,
    row_normalization: RowNormalization | None = None,
    negative_latents: NegativeLatents = "refuse",
    input_mean: Tensor | None = None,
    input_std: Tensor | float | None = None,
    revision: str | None = None,
    force_download: bool = False,
) -> SAE[Any]:
    """Load an SAE of any supported format as one of SAELens's own classes.

    Formats: SAELens's folder, Prisma, dictionary_learning (sae-for-vlm), PatchSAE, saev,
    overcomplete, VISAEBench, recognised by content. The result computes what the writing project's
    code computes, or the file is refused with the reason. No class of another project is built, and
    no code of the file is run.

    Args:
        path_or_repo: A file, a folder, a release that SAELens knows, or a hub id `owner/name`.
        sae_id: The release's SAE id, or the folder or weights file inside the folder or repository.
        format: "auto", "sae_lens", or one of "saev", "prisma", "patchsae", "dictionary_learning",
            "visaebench", "overcomplete".
        device: Device of the SAE.
        dtype: "float32", torch.bfloat16 and so on; None keeps the file's type. In half precision
            the weights take half the memory and time; sums are added up in float32.
        fold_W_dec_norm: Whether to scale the decoder's rows to norm 1 and the latents to match.
        activation: The sparsifier, if the file does not say (overcomplete, a bare `ae.pt`).
        k: Latents kept per sample, if the file does not say.
        threshold: BatchTopK's scalar threshold, if the file does not hold it.
        row_normalization: overcomplete's dictionary normalisation, if not its default.
        negative_latents: "clip" accepts a saev TopK SAE with its negative latents set to zero.
        input_mean: Mean [d_in] of the activations, for an SAE that expects `(x - mean) / std`.
        input_std: Std of the activations, one number or [d_in]; folded in exactly, like the mean.
        revision: Branch, tag or commit on the hub.
        force_download: Whether to download again what is cached.

    Returns:
        A `StandardSAE`, `TopKSAE`, `JumpReLUSAE`, `GatedSAE`, ...; `cfg.metadata` records `source`,
        `input_normalization` and, where the file says, `model_name`, `hook_name` and `tokens`.

    Raises:
        FileNotFoundError: There is no such file, folder, release or repository.
        CheckpointError: `UnknownFormatError`, `CorruptCheckpointError`, `UnsafeCheckpointError` or
            `RefusedCheckpointError`; it names the file and what to do.

    Examples:
        >>> sae = vp.load_sae("runs/sae")
        >>> type(sae).__name__, sae.cfg.d_in, sae.cfg.d_sae
        ('TopKSAE', 128, 256)
        >>> sae.cfg.metadata.hook_name
        'blocks.2.hook_resid_post'
    """
    if format not in ("auto", "sae_lens", *FORMATS):
        raise ValueError(f"format is {format!r}; expected 'auto', 'sae_lens' or {list(FORMATS)}.")
    options: dict[str, Any] = {
        "format": format,
        "activation": activation,
        "k": k,
        "threshold": threshold,
        "row_normalization": row_normalization,
        "negative_latents": negative_latents,
        "input_mean": input_mean,
        "input_std": input_std,
    }
    usable_device(device)
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    register()
    text = str(path_or_repo)
    path = local_path(path_or_repo)
    if not os.path.lexists(path) and text in get_pretrained_saes_directory():
        return SAE.from_pretrained(
            text,
            sae_id,
            device=device,
            dtype=dtype or "float32",
            force_download=force_download,
            converter=hub_converter(**options) if _is_ours(text) else None,
            fold_W_dec_norm=fold_W_dec_norm,
        )
    if os.path.lexists(path):
        path = inside(path, sae_id) if sae_id else path
    elif is_repository(text):
        path = download(text, sae_id, revision=revision, force_download=force_download)
    else:
        raise FileNotFoundError(
            f"{text!r} is neither a file, a folder, a release that SAELens knows, nor a hub id "
            "of the form owner/name."
        )
    return _from_disk(path, device, dtype, fold_W_dec_norm, options)


def _is_ours(release: str) -> bool:
    return release in read_releases()


def _from_disk(
    path: Path, device: str, dtype: str | None, fold_W_dec_norm: bool, options: dict[str, Any]
) -> SAE[Any]:
    overrides = None if dtype is None else {"dtype": dtype}
    loaded = disk_converter(**options)(path, device, overrides)
    try:
        built = SAE.load_from_disk(
            path,
            device=device,
            dtype=dtype,
            converter=lambda *_, **__: loaded,
            fold_W_dec_norm=fold_W_dec_norm,
        )
    except (OSError, NotImplementedError):
        raise
    # SAELens does not name the file when its own config and tensors disagree.
    except Exception as error:
        raise CorruptCheckpointError(
            f"Cannot load {path}: SAELens cannot build an SAE from it ({reason_of(error)})."
        ) from error
    k = getattr(built.cfg, "k", 1)  # SAELens has a default for a config that does not say
    if not 1 <= k <= built.cfg.d_sae:
        raise CorruptCheckpointError(
            f"Cannot load {path}: k is {k}; expected 1 to d_sae={built.cfg.d_sae}. Say it in the "
            "config."
        )
    return built
