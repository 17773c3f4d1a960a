"""Trained SAEs as SAELens's own: in memory, and in a folder that appears whole."""

from __future__ import annotations

import copy
import errno
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SPARSITY_FILENAME
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from vision_plugin._disk import put_in_place, sync_files
from vision_plugin.formats import seal
from vision_plugin.sae._config import VisionSAERunnerConfig


def check_output_path(output_path: str | None, *, overwrite: bool) -> None:
    """Raise where an output folder is taken already.

    Raises:
        FileExistsError: the folder has something in it, or is a file.
    """
    if output_path is None or overwrite:
        return
    path = Path(output_path)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(
            f"{output_path} exists already. Choose another --output-path, or say --overwrite to "
            "replace it."
        )


def save(
    sae: TrainingSAE[Any],
    cfg: VisionSAERunnerConfig,
    out: Path,
    log_sparsity: Tensor,
    *,
    more: dict[str, str] | None = None,
) -> None:
    """Write the SAE in SAELens's format, whole or not at all.

    Args:
        sae: What was trained.
        cfg: How.
        out: The folder; what has its name is replaced once the new one is complete.
        log_sparsity: Logarithm of how often each latent fires, [d_sae].
        more: Further text files by name.

    Raises:
        OSError: there is no room.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        sae.save_inference_model(str(unfinished))
        save_file({"sparsity": log_sparsity}, unfinished / SPARSITY_FILENAME)
        cfg.save(unfinished / RUNNER_CFG_FILENAME)
        for name, text in (more or {}).items():
            (unfinished / name).write_text(text, encoding="utf-8")
        seal(unfinished)
        sync_files(unfinished)
        unfinished.chmod(0o755)
        put_in_place(unfinished, out)
    except SafetensorError as error:
        if shutil.disk_usage(out.parent).free > _bytes_of(sae):
            raise
        raise OSError(
            errno.ENOSPC, f"no room to write the SAE ({os.strerror(errno.ENOSPC)})", str(out)
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _bytes_of(sae: TrainingSAE[Any]) -> int:
    return sum(tensor.nbytes for tensor in sae.state_dict().values())


@torch.no_grad()
def inference_sae(sae: TrainingSAE[Any], scaler: ActivationScaler | None = None) -> SAE[Any]:
    """The SAE that would be saved now, as a copy in memory; the training SAE stays as it is.

    Args:
        sae: In training.
        scaler: What training scales activations with; it is folded into the copy's weights, which
            then takes activations as the model gives them.
    """
    state = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}
    sae.process_state_dict_for_saving_inference(state)
    stock: SAE[Any] = SAE.from_dict(copy.deepcopy(sae.cfg.get_inference_sae_cfg_dict()))
    stock.process_state_dict_for_loading(state)
    stock.load_state_dict(state)
    stock.to(sae.device)
    if scaler is not None and scaler.scaling_factor is not None:
        stock.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if scaler is not None and scaler.whitening is not None:
        whitening = scaler.whitening
        stock.fold_activation_whitening(
            mean=whitening.mean,
            whitening_matrix=whitening.matrix,
            unwhitening_matrix=whitening.inverse_matrix,
        )
    stock.eval()
    return stock
