"""Training through SAELens's own trainer, and saving in SAELens's own format."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from sae_lens.constants import RUNNER_CFG_FILENAME, SPARSITY_FILENAME
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import save_file
from torch import Tensor

from vision_plugin.activations import ActivationStream, open_images
from vision_plugin.models import VisionBridge, load_model
from vision_plugin.models._fit import hook_width, signature
from vision_plugin.sae._config import D_IN_OF_MODEL, VisionSAERunnerConfig

logger = logging.getLogger(__name__)


class VisionSAETrainingRunner:
    """Trains one SAE, as SAELens's ``LanguageModelSAETrainingRunner`` does for language models.

    Everything that can be wrong with a configuration is found when the runner is made, before
    anything is computed or written.
    """

    def __init__(
        self,
        cfg: VisionSAERunnerConfig,
        *,
        override_model: VisionBridge | None = None,
        override_images: Any = None,
        override_sae: TrainingSAE[Any] | None = None,
    ) -> None:
        """Load the model, open the images and make the SAE.

        Args:
            cfg: The run.
            override_model: A model in hand, instead of ``cfg.model_name``.
            override_images: An image source in hand, instead of ``cfg.images``.
            override_sae: An SAE in hand, to train further.

        Raises:
            ValueError: the model, images, hook or widths are unknown or do not fit.
        """
        check_output_path(cfg.output_path, overwrite=cfg.overwrite)
        torch.manual_seed(cfg.seed)
        self.model = override_model or load_model(
            cfg.model_name, device=cfg.device, dtype=getattr(torch, cfg.dtype)
        )
        self.cfg = with_model_width(cfg, self.model)
        self.images = (
            override_images
            if override_images is not None
            else open_images(cfg.images, column=cfg.image_column, split=cfg.split)
        )
        self.sae = override_sae or TrainingSAE.from_dict(self.cfg.sae.to_dict())
        self.sae.to(cfg.device)
        self.stream = ActivationStream(
            self.model,
            self.images,
            hook_names=[cfg.hook_name],
            tokens=cfg.tokens,
            batch_size=cfg.train_batch_size_tokens,
            images_per_forward=cfg.store_batch_size_images,
            n_batches_in_buffer=cfg.n_batches_in_buffer,
            seed=cfg.seed,
        )

    def run(self) -> SAE[Any]:
        """Train, save, and return the trained SAE as its stock inference class."""
        record_origin(self.sae, self.cfg, self.model, self.images)
        self.stream.fill()
        with _wandb_run(self.cfg):
            trainer = SAETrainer(
                cfg=self.cfg.to_sae_trainer_config(), sae=self.sae, data_provider=self.stream
            )
            trainer.fit()
        return self._finish(trainer.log_feature_sparsity)

    def _finish(self, log_sparsity: Tensor) -> SAE[Any]:
        if self.cfg.output_path is not None:
            out = Path(self.cfg.output_path)
            save(self.sae, self.cfg, out, log_sparsity)
            return SAE.load_from_disk(out, device=self.cfg.device)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "sae"
            save(self.sae, self.cfg, out, log_sparsity)
            return SAE.load_from_disk(out, device=self.cfg.device)


def train(cfg: VisionSAERunnerConfig, **overrides: Any) -> SAE[Any]:
    """Train an SAE: ``VisionSAETrainingRunner(cfg).run()``."""
    return VisionSAETrainingRunner(cfg, **overrides).run()


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


def with_model_width(cfg: VisionSAERunnerConfig, model: VisionBridge) -> VisionSAERunnerConfig:
    """The configuration with ``sae.d_in`` checked against the model, or filled in from it.

    Raises:
        UnknownHookError: the model has no such hook.
        ValueError: the SAE is of another width than the model at the hook.
    """
    model.check_hook_names([cfg.hook_name, cfg.hook_name_out or cfg.hook_name])
    width = hook_width(model, cfg.hook_name)
    if cfg.sae.d_in == D_IN_OF_MODEL:
        if width is None:
            raise ValueError(f"say the width of {cfg.hook_name} with d_in: its name does not tell")
        return dataclasses.replace(cfg, sae=dataclasses.replace(cfg.sae, d_in=width))
    if width is not None and cfg.sae.d_in != width:
        raise ValueError(
            f"the SAE has d_in={cfg.sae.d_in}, but {cfg.hook_name} of {cfg.model_name} has "
            f"{width} dimensions"
        )
    return cfg


def record_origin(
    sae: TrainingSAE[Any], cfg: VisionSAERunnerConfig, model: VisionBridge, images: Any
) -> None:
    """Write into the SAE's metadata what it is trained on."""
    metadata = sae.cfg.metadata
    metadata.model_name = cfg.model_name
    metadata.model_revision = model.revision
    metadata.model_signature = signature(model.native)
    metadata.hook_name = cfg.hook_name
    if cfg.hook_name_out:
        metadata.hook_name_out = cfg.hook_name_out
    metadata.tokens = cfg.tokens
    metadata.dataset_path = cfg.images
    metadata.n_images = len(images)
    metadata.preprocessing = None if model.images is None else model.images.fingerprint()
    metadata.context_size = model.token_layout().n_tokens


def save(
    sae: TrainingSAE[Any], cfg: VisionSAERunnerConfig, out: Path, log_sparsity: Tensor
) -> None:
    """Write the SAE in SAELens's format, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        sae.save_inference_model(str(unfinished))
        save_file({"sparsity": log_sparsity}, unfinished / SPARSITY_FILENAME)
        cfg.save(unfinished / RUNNER_CFG_FILENAME)
        unfinished.chmod(0o755)
        if out.exists():
            shutil.rmtree(out)
        unfinished.replace(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


class _wandb_run:
    """A wandb run for the length of a ``with`` block, where one is asked for."""

    def __init__(self, cfg: VisionSAERunnerConfig) -> None:
        self.cfg = cfg

    def __enter__(self) -> None:
        if self.cfg.logger.log_to_wandb:
            import wandb

            log = self.cfg.logger
            wandb.init(
                project=log.wandb_project,
                entity=log.wandb_entity,
                config=self.cfg.to_dict(),
                name=log.run_name,
                id=log.wandb_id,
            )

    def __exit__(self, *error: object) -> None:
        if self.cfg.logger.log_to_wandb:
            import wandb

            wandb.finish(exit_code=0 if error[0] is None else 1)
