"""Several SAEs from one pass of the images through the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens import SAE, TrainingSAE

from vision_plugin.models import VisionBridge
from vision_plugin.sae._checkpoint import CheckpointFolder
from vision_plugin.sae._config import VisionSAERunnerConfig
from vision_plugin.sae._runner import (
    fitted,
    make_sae,
    make_validator,
    open_inputs,
    record_origin,
    run_identity,
)
from vision_plugin.sae._saving import check_output_path, inference_sae, save
from vision_plugin.sae._session import VALIDATION_FILE, TrainingSession
from vision_plugin.sae._sources import SplitBatches, all_hooks, open_batches, origin
from vision_plugin.sae._top_features import log_top_features
from vision_plugin.sae._validation import Validator

MAY_DIFFER = frozenset(
    {
        *("sae", "hook_name", "hook_name_out", "output_path", "dense"),
        *("lr", "lr_end", "lr_scheduler_name", "lr_warm_up_steps", "lr_decay_steps"),
        *("n_restart_cycles", "adam_beta1", "adam_beta2", "dead_feature_window"),
        *("feature_sampling_window", "b_dec_init_method", "decoder_init_method", "defaults"),
        *("explicit", "encoder_lr_ratio", "target_l0", "fit_threshold", "mono_coefficient"),
    }
)
"""Fields in which runs that share a pass may differ: the SAE, its hook, and how it learns."""


class VisionMultiSAETrainingRunner:
    """Trains SAEs of several layers, widths and architectures with SAELens's `MultiSAETrainer`.

    Each SAE ends as it would if its configuration were run alone, bit for bit on the same device.

    Example:
        >>> runner = VisionMultiSAETrainingRunner(  # doctest: +SKIP
        ...     {
        ...         f"blocks.{layer}": dataclasses.replace(
        ...             cfg, hook_name=f"blocks.{layer}.hook_resid_post"
        ...         )
        ...         for layer in range(12)
        ...     },
        ...     output_path="runs/every-layer",
        ... )
        >>> saes = runner.run()  # doctest: +SKIP
    """

    def __init__(
        self,
        cfgs: Mapping[str, VisionSAERunnerConfig],
        *,
        output_path: str | None,
        override_model: VisionBridge | None = None,
        override_images: Any = None,
        override_validation_images: Any = None,
    ) -> None:
        """Load the model, open the images or the store, and make the SAEs.

        Args:
            cfgs: Runs by the name of the SAE, which is also that of its folder. They may differ
                in the fields of ``MAY_DIFFER``; their own ``output_path`` is not used.
            output_path: Folder of the folders; None saves nothing. Checkpoints go beside it.
            override_model: A model in hand, instead of ``model_name``.
            override_images: An image source or an ActivationStore in hand, instead of ``images``.
            override_validation_images: Held-out images, instead of ``validation_images``.

        Raises:
            ValueError: the runs cannot share a pass, or one of them could not be run alone.
        """
        first = check_together(cfgs)
        check_output_path(output_path, overwrite=first.overwrite)
        self.output_path = output_path
        model, self.images = open_inputs(first, override_model, override_images)
        self.cfgs = {
            name: fitted(
                dataclasses.replace(cfg, output_path=_inside(output_path, name)), model, self.images
            )
            for name, cfg in cfgs.items()
        }
        self.saes: dict[str, TrainingSAE[Any]] = {n: make_sae(c) for n, c in self.cfgs.items()}
        for sae in self.saes.values():
            sae.to(first.device)
        validator, self.model = make_validator(first, model, override_validation_images)
        self.validators: dict[str, Validator] = {}
        if validator is not None:
            self.validators = {n: validator.at(cfg.hook_names) for n, cfg in self.cfgs.items()}
        runs = list(self.cfgs.values())
        batches = open_batches(runs[0], self.images, self.model, hook_names=all_hooks(runs))
        self.batches = SplitBatches(batches, {n: c.hook_names for n, c in self.cfgs.items()})

    def run(self) -> dict[str, SAE[Any]]:
        """Train, save, and return the trained SAEs as their stock inference classes."""
        made_of: dict[str, Any] = {}
        for name, cfg in self.cfgs.items():
            made_of = origin(cfg, self.model, self.images)
            record_origin(self.saes[name], made_of)
        session = TrainingSession(
            self.cfgs,
            self.saes,
            self.batches,
            checkpoints=self._checkpoints(),
            validators=self.validators,
            identity=run_identity(self.cfgs, made_of),
        )
        with session.opened():
            session.fit()
            for name, validator in self.validators.items():
                log_top_features(session.wandb, validator, prefix=f"{name}/")
            if self.output_path is not None:
                self._save(session)
            session.done()
        return {name: inference_sae(sae) for name, sae in self.saes.items()}

    def _checkpoints(self) -> CheckpointFolder | None:
        if self.output_path is None:
            return None
        out = Path(self.output_path)
        return CheckpointFolder(out.with_name(f"{out.name}.checkpoints"))

    def _save(self, session: TrainingSession) -> None:
        for name, cfg in self.cfgs.items():
            more = {VALIDATION_FILE: session.log.text()} if session.log.records else {}
            log_sparsity = session.trainers[name].log_feature_sparsity
            save(self.saes[name], cfg, Path(str(cfg.output_path)), log_sparsity, more=more)


def train_many(
    cfgs: Mapping[str, VisionSAERunnerConfig], *, output_path: str | None, **overrides: Any
) -> dict[str, SAE[Any]]:
    """Train SAEs in one pass: ``VisionMultiSAETrainingRunner(cfgs, ...).run()``."""
    return VisionMultiSAETrainingRunner(cfgs, output_path=output_path, **overrides).run()


def check_together(cfgs: Mapping[str, VisionSAERunnerConfig]) -> VisionSAERunnerConfig:
    """The first of several runs, once it is known that they can share a pass.

    Raises:
        ValueError: there is none, a name is no folder's, or they differ in what they share.
    """
    if not cfgs:
        raise ValueError("there are no SAEs to train: name at least one")
    for name in cfgs:
        if not name or "/" in name or "\\" in name or name.startswith("."):
            raise ValueError(f"{name!r} cannot be the name of an SAE: it becomes a folder's")
    (first_name, first), *others = cfgs.items()
    for name, cfg in others:
        for field in dataclasses.fields(cfg):
            here, there = getattr(first, field.name), getattr(cfg, field.name)
            if field.name not in MAY_DIFFER and here != there:
                raise ValueError(
                    f"{first_name} and {name} cannot be trained in one pass: {field.name} is "
                    f"{here!r} and {there!r}. They may differ in {', '.join(sorted(MAY_DIFFER))}"
                )
    return first


def _inside(output_path: str | None, name: str) -> str | None:
    return None if output_path is None else str(Path(output_path) / name)
