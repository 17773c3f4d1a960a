"""Turn a training SAE into SAELens's inference class, in memory and in a folder."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SPARSITY_FILENAME
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

from vision_plugin._disk import whole_folder, write_tensors
from vision_plugin._ours import SAE_FOLDER, check_replaceable
from vision_plugin._paths import local_path
from vision_plugin.formats import seal
from vision_plugin.sae._config import VisionSAERunnerConfig


def check_output_path(output_path: str | None, *, overwrite: bool) -> None:
    """Raise if the output folder is not free.

    Args:
        output_path: Folder of the result; None saves nothing.
        overwrite: Whether the run may replace an SAE of this package that is there.

    Raises:
        FileExistsError: the folder has something in it, or is a file.
    """
    if output_path is None:
        return
    path = local_path(output_path)
    if not overwrite and SAE_FOLDER.is_one(path):
        raise FileExistsError(
            f"{output_path} exists already: name another output_path=, or set overwrite= to "
            "replace it"
        )
    check_replaceable(path, SAE_FOLDER if overwrite else None)


def save(
    sae: TrainingSAE[Any],
    cfg: VisionSAERunnerConfig,
    out: Path,
    log_sparsity: Tensor,
    *,
    overwrite: bool = False,
    more: dict[str, str] | None = None,
) -> None:
    """Write a trained SAE in SAELens's format, whole or not at all.

    Args:
        sae: SAE after its last step.
        cfg: Configuration of the run.
        out: Folder to write.
        log_sparsity: Base-10 logarithm of the share of vectors each latent fires on, [d_sae].
        overwrite: Whether an SAE of this package is replaced once the new one is complete.
        more: Further text files by name.

    Raises:
        FileExistsError: something else is there.
        OSError: the disk has no room.
    """
    with whole_folder(out, replaces=SAE_FOLDER if overwrite else None) as folder:
        sae.save_inference_model(str(folder))
        with (folder / SPARSITY_FILENAME).open("wb") as stream:
            write_tensors(stream, {"sparsity": log_sparsity})
        cfg.save(folder / RUNNER_CFG_FILENAME)
        for name, text in (more or {}).items():
            (folder / name).write_text(text, encoding="utf-8")
        seal(folder)


@torch.no_grad()
def inference_sae(sae: TrainingSAE[Any], scaler: ActivationScaler | None = None) -> SAE[Any]:
    """Return a copy of a training SAE as SAELens's inference class, as it would be saved now.

    Args:
        sae: SAE in training; it stays as it is.
        scaler: Scaler that training applies to activations. It is folded into the weights of the
            copy, which then takes activations as the model gives them.
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
