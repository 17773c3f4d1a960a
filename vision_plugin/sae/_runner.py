"""Training through SAELens's own trainer, and saving in SAELens's own format."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens import SAE, TrainingSAE

from vision_plugin.models import VisionBridge
from vision_plugin.sae._checkpoint import CheckpointFolder
from vision_plugin.sae._config import VisionSAERunnerConfig
from vision_plugin.sae._defaults import described
from vision_plugin.sae._preparing import (
    fitted,
    make_sae,
    make_validator,
    open_inputs,
    record_origin,
    run_identity,
)
from vision_plugin.sae._quality import Quality
from vision_plugin.sae._saving import check_output_path, inference_sae, save
from vision_plugin.sae._session import VALIDATION_FILE, TrainingSession
from vision_plugin.sae._sources import SplitBatches, all_hooks, open_batches, origin
from vision_plugin.sae._top_features import log_top_features
from vision_plugin.sae._trainer import apart, load_random_state, random_state
from vision_plugin.sae._validation import Validator

ALONE = ""
"""Name of an SAE that is trained alone: its folder is the output folder itself."""

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
    """Trains SAEs of several layers, widths and architectures from one pass of the images.

    Each SAE ends as it would if its configuration were run alone, bit for bit on the same device.
    Everything that can be wrong with a configuration is found when the runner is made, before
    anything is computed or written. A run that was killed goes on where its last checkpoint was
    made when the same configurations are run again, and ends with the same weights.

    Args:
        cfgs: Runs by the name of the SAE, which is also the name of its folder. They may differ in
            the fields of ``MAY_DIFFER``; their own ``output_path`` is not used.
        output_path: Folder of the folders; None saves nothing. Checkpoints go beside it.
        model: A model in hand, in place of ``model_name``.
        images: Images or an ActivationStore in hand, in place of ``images``.
        saes: SAEs in hand by name, to train further.
        validation_images: Held-out images in hand, in place of ``validation_images``.

    Raises:
        ValueError: the runs cannot share a pass, or the model, images, store, hooks or widths are
            unknown or do not fit.

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
        model: VisionBridge | None = None,
        images: Any = None,
        saes: Mapping[str, TrainingSAE[Any]] | None = None,
        validation_images: Any = None,
    ) -> None:
        with apart():
            self._open(cfgs, output_path, model, images, saes or {}, validation_images)
            self._random = random_state()
        self.quality: dict[str, Quality] = {}
        """What the finished SAEs are like on vectors of the stream; empty before the run."""

    def _open(
        self,
        cfgs: Mapping[str, VisionSAERunnerConfig],
        output_path: str | None,
        model: VisionBridge | None,
        images: Any,
        saes: Mapping[str, TrainingSAE[Any]],
        validation_images: Any,
    ) -> None:
        first = check_together(cfgs)
        check_output_path(output_path, overwrite=first.overwrite)
        self.output_path = None if output_path is None else Path(output_path)
        model, self.images = open_inputs(first, model, images)
        self.cfgs = {
            name: fitted(
                dataclasses.replace(cfg, output_path=self._folder(name)), model, self.images
            )
            for name, cfg in cfgs.items()
        }
        self.saes: dict[str, TrainingSAE[Any]] = {
            name: saes.get(name) or make_sae(cfg) for name, cfg in self.cfgs.items()
        }
        for sae in self.saes.values():
            sae.to(first.device)
        validator, self.model = make_validator(first, model, validation_images)
        self.validators: dict[str, Validator] = {}
        if validator is not None:
            self.validators = {n: validator.at(cfg.hook_names) for n, cfg in self.cfgs.items()}
        runs = list(self.cfgs.values())
        if list(cfgs) == [ALONE]:
            self.batches: Any = open_batches(runs[0], self.images, self.model)
        else:
            shared = open_batches(runs[0], self.images, self.model, hook_names=all_hooks(runs))
            self.batches = SplitBatches(shared, {n: c.hook_names for n, c in self.cfgs.items()})

    def run(self) -> dict[str, SAE[Any]]:
        """Train, save, and return the trained SAEs as their stock inference classes."""
        with apart():
            load_random_state(self._random)
            return self._run()

    def _run(self) -> dict[str, SAE[Any]]:
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
            self.quality = session.quality
            for name, validator in self.validators.items():
                log_top_features(session.wandb, validator, prefix=f"{name}/" if name else "")
            if self.output_path is not None:
                self._save(session)
            session.done()
        return {name: inference_sae(sae) for name, sae in self.saes.items()}

    def _folder(self, name: str) -> str | None:
        return None if self.output_path is None else str(self.output_path / name)

    def _checkpoints(self) -> CheckpointFolder | None:
        out = self.output_path
        return None if out is None else CheckpointFolder(out.with_name(f"{out.name}.checkpoints"))

    def _save(self, session: TrainingSession) -> None:
        for name, cfg in self.cfgs.items():
            more = {VALIDATION_FILE: session.log.text()} if session.log.records else {}
            log_sparsity = session.trainers[name].log_feature_sparsity
            save(self.saes[name], cfg, Path(str(cfg.output_path)), log_sparsity, more=more)


class VisionSAETrainingRunner:
    """Trains one SAE, as SAELens's ``LanguageModelSAETrainingRunner`` does for language models.

    This is :class:`VisionMultiSAETrainingRunner` with a single entry, whose folder is
    ``cfg.output_path`` itself.

    Args:
        cfg: The run.
        model: A model in hand, in place of ``cfg.model_name``.
        images: Images or an ActivationStore in hand, in place of ``cfg.images``.
        sae: An SAE in hand, to train further.
        validation_images: Held-out images in hand, in place of ``cfg.validation_images``.

    Raises:
        ValueError: the model, images, store, hook or widths are unknown or do not fit.
    """

    def __init__(
        self,
        cfg: VisionSAERunnerConfig,
        *,
        model: VisionBridge | None = None,
        images: Any = None,
        sae: TrainingSAE[Any] | None = None,
        validation_images: Any = None,
    ) -> None:
        self._runner = VisionMultiSAETrainingRunner(
            {ALONE: cfg},
            output_path=cfg.output_path,
            model=model,
            images=images,
            saes=None if sae is None else {ALONE: sae},
            validation_images=validation_images,
        )

    @property
    def cfg(self) -> VisionSAERunnerConfig:
        """The run, with everything decided that the configuration left open."""
        return self._runner.cfgs[ALONE]

    @property
    def sae(self) -> TrainingSAE[Any]:
        """The SAE in training."""
        return self._runner.saes[ALONE]

    @property
    def model(self) -> VisionBridge | None:
        """The model; None where a store makes do without one."""
        return self._runner.model

    @property
    def images(self) -> Any:
        """The images, or the store."""
        return self._runner.images

    @property
    def batches(self) -> Any:
        """The stream of training batches."""
        return self._runner.batches

    @property
    def validator(self) -> Validator | None:
        """What looks at held-out images; None where there are none."""
        return self._runner.validators.get(ALONE)

    @property
    def quality(self) -> Quality | None:
        """What the finished SAE is like on vectors of the stream; None before the run."""
        return self._runner.quality.get(ALONE)

    def decided(self) -> str:
        """Return what the configuration left open and was decided: ``lr 0.002, k 20, ...``."""
        return described(self.cfg.sae.metadata.to_dict().get("auto") or {})

    def run(self) -> SAE[Any]:
        """Train, save, and return the trained SAE as its stock inference class."""
        return self._runner.run()[ALONE]


def train(cfg: VisionSAERunnerConfig, **in_hand: Any) -> SAE[Any]:
    """Train an SAE: ``VisionSAETrainingRunner(cfg, **in_hand).run()``."""
    return VisionSAETrainingRunner(cfg, **in_hand).run()


def train_many(
    cfgs: Mapping[str, VisionSAERunnerConfig], *, output_path: str | None, **in_hand: Any
) -> dict[str, SAE[Any]]:
    """Train SAEs in one pass: ``VisionMultiSAETrainingRunner(cfgs, ...).run()``."""
    return VisionMultiSAETrainingRunner(cfgs, output_path=output_path, **in_hand).run()


def check_together(cfgs: Mapping[str, VisionSAERunnerConfig]) -> VisionSAERunnerConfig:
    """The first of several runs, once it is known that they can share a pass.

    Raises:
        ValueError: there is none, a name is no folder's, or they differ in what they share.
    """
    if not cfgs:
        raise ValueError("there are no SAEs to train: name at least one")
    if list(cfgs) == [ALONE]:
        return cfgs[ALONE]
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
