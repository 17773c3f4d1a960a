"""Train SAEs with SAELens's trainer, and save them in SAELens's format."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens import SAE, TrainingSAE

from vision_plugin._engines import opened
from vision_plugin._paths import local_path
from vision_plugin.models import VisionBridge
from vision_plugin.sae._checkpoint import VALIDATION_FILE, CheckpointFolder
from vision_plugin.sae._config import VisionSAERunnerConfig, checkpoints_of
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
from vision_plugin.sae._session import TrainingSession
from vision_plugin.sae._sources import SplitBatches, all_hooks, open_batches, origin
from vision_plugin.sae._team import Team
from vision_plugin.sae._top_features import log_top_features
from vision_plugin.sae._trainer import apart, load_random_state, random_state
from vision_plugin.sae._validation import Validator

ALONE = ""
"""Name of an SAE that trains alone; its folder is the output folder itself."""

MAY_DIFFER = frozenset(
    {
        *("sae", "hook_name", "hook_name_out", "output_path", "dense"),
        *("lr", "lr_end", "lr_scheduler_name", "lr_warm_up_steps", "lr_decay_steps"),
        *("n_restart_cycles", "adam_beta1", "adam_beta2", "dead_feature_window"),
        *("feature_sampling_window", "b_dec_init_method", "decoder_init_method", "defaults"),
        *("explicit", "encoder_lr_ratio", "target_l0", "fit_threshold", "mono_coefficient"),
        *("archetypal_points", "archetypal_relaxation", "revive_dead"),
    }
)
"""Fields in which runs that share a pass over the images may differ."""


class VisionMultiSAETrainingRunner:
    """Trains SAEs of several layers, widths and architectures in one pass over the images.

    Each SAE ends with the weights that it gets when it trains alone, bit for bit on the same
    device. Making the runner checks the configurations, before it computes or writes anything. To
    continue a killed run from its last checkpoint, run the same configurations again; the weights
    end the same.

    Args:
        cfgs: Configurations by the SAE's name, which is also the name of its folder. They may
            differ in the fields of ``MAY_DIFFER``; the runner ignores their ``output_path``.
        output_path: Folder for the SAEs' folders; None saves nothing. Checkpoints go into
            ``<output_path>.checkpoints``.
        model: A loaded model, to use instead of ``cfg.model_name``.
        images: Anything that ``open_images`` takes, or a store, instead of ``cfg.images``.
        saes: SAEs to train further, by name; the others start anew.
        validation_images: Opened held-out images, to use instead of ``cfg.validation_images``.
        team: Processes that train together, as ``vision_plugin.scale`` makes them.

    Raises:
        ValueError: the runs cannot share a pass, or a model, image source, store, hook or width is
            unknown or does not fit.

    Examples:
        >>> import dataclasses
        >>> short = dataclasses.replace(cfg, training_tokens=256)
        >>> cfgs = {
        ...     f"blocks.{layer}": dataclasses.replace(
        ...         short, hook_name=f"blocks.{layer}.hook_resid_post"
        ...     )
        ...     for layer in (1, 2)
        ... }
        >>> saes = vp.VisionMultiSAETrainingRunner(cfgs, output_path=None, model=model).run()
        >>> list(saes)
        ['blocks.1', 'blocks.2']
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
        team: Team | None = None,
    ) -> None:
        self._team = team
        with apart():
            self._open(cfgs, output_path, model, images, saes or {}, validation_images)
            self._random = random_state()
        self.quality: dict[str, Quality] = {}
        """Figures of the finished SAEs by name; empty before the run."""

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
        self.output_path = None if output_path is None else local_path(output_path)
        self._overwrite = first.overwrite or self._was_saving(cfgs)
        for name in cfgs:
            check_output_path(self._folder(name), overwrite=self._overwrite)
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
        """Train and save the SAEs; return them by name as SAELens's inference classes."""
        with apart():
            load_random_state(self._random)
            return self._run()

    def _run(self) -> dict[str, SAE[Any]]:
        made_of: dict[str, Any] = {}
        for name, cfg in self.cfgs.items():
            made_of = origin(cfg, self.model, self.images)
            record_origin(self.saes[name], made_of)
        of_team = {} if self._team is None else self._team.identity()
        session = TrainingSession(
            self.cfgs,
            self.saes,
            self.batches,
            checkpoints=self._checkpoints(),
            validators=self.validators,
            identity=run_identity(self.cfgs, made_of) | of_team,
            team=self._team,
        )
        with session.opened():
            session.fit()
            self.quality = session.quality
            if not session.leads:
                return self._finished()
            for name, validator in self.validators.items():
                log_top_features(session.wandb, validator, prefix=f"{name}/" if name else "")
            if self.output_path is not None:
                self._save(session)
            session.done()
        return self._finished()

    def _finished(self) -> dict[str, SAE[Any]]:
        return {name: inference_sae(sae) for name, sae in self.saes.items()}

    def _was_saving(self, cfgs: Mapping[str, VisionSAERunnerConfig]) -> bool:
        """Whether a run of several SAEs may have been killed when it had saved some of them."""
        checkpoints = self._checkpoints()
        return checkpoints is not None and list(cfgs) != [ALONE] and bool(checkpoints.steps())

    def _folder(self, name: str) -> str | None:
        return None if self.output_path is None else str(self.output_path / name)

    def _checkpoints(self) -> CheckpointFolder | None:
        out = self.output_path
        return None if out is None else CheckpointFolder(checkpoints_of(out))

    def _save(self, session: TrainingSession) -> None:
        for name, cfg in self.cfgs.items():
            more = {VALIDATION_FILE: session.log.text()} if session.log.records else {}
            log_sparsity = session.trainers[name].log_feature_sparsity
            out = Path(str(cfg.output_path))
            save(self.saes[name], cfg, out, log_sparsity, overwrite=self._overwrite, more=more)


class VisionSAETrainingRunner:
    """Trains one SAE, as SAELens's ``LanguageModelSAETrainingRunner`` does for language models.

    This is :class:`VisionMultiSAETrainingRunner` with a single entry, whose folder is
    ``cfg.output_path`` itself.

    Args:
        cfg: Configuration of the run.
        model: A loaded model, to use instead of ``cfg.model_name``.
        images: Anything that ``open_images`` takes, or a store, instead of ``cfg.images``.
        sae: An SAE to train further; by default a new one.
        validation_images: Opened held-out images, to use instead of ``cfg.validation_images``.
        team: Processes that train together, as ``vision_plugin.scale`` makes them.

    Raises:
        ValueError: the model, image source, store, hook or width is unknown or does not fit.

    Examples:
        >>> import dataclasses
        >>> short = dataclasses.replace(cfg, training_tokens=256, output_path=None)
        >>> runner = vp.VisionSAETrainingRunner(short, model=model)
        >>> runner.run().cfg.d_sae
        256
    """

    def __init__(
        self,
        cfg: VisionSAERunnerConfig,
        *,
        model: VisionBridge | None = None,
        images: Any = None,
        sae: TrainingSAE[Any] | None = None,
        validation_images: Any = None,
        team: Team | None = None,
    ) -> None:
        self._runner = VisionMultiSAETrainingRunner(
            {ALONE: cfg},
            output_path=cfg.output_path,
            model=model,
            images=images,
            saes=None if sae is None else {ALONE: sae},
            validation_images=validation_images,
            team=team,
        )

    @property
    def cfg(self) -> VisionSAERunnerConfig:
        """Configuration of the run, with a value for every field."""
        return self._runner.cfgs[ALONE]

    @property
    def sae(self) -> TrainingSAE[Any]:
        """SAE in training."""
        return self._runner.saes[ALONE]

    @property
    def model(self) -> VisionBridge | None:
        """Model of the run; None if a store is enough."""
        return self._runner.model

    @property
    def images(self) -> Any:
        """Image source or store of the run."""
        return self._runner.images

    @property
    def batches(self) -> Any:
        """Stream of training batches."""
        return self._runner.batches

    @property
    def validator(self) -> Validator | None:
        """Scorer of held-out images; None without such images."""
        return self._runner.validators.get(ALONE)

    @property
    def quality(self) -> Quality | None:
        """Figures of the finished SAE; None before the run."""
        return self._runner.quality.get(ALONE)

    def decided(self) -> str:
        """Return the settings that the run filled in, as one line: ``lr 0.002, k 20, ...``."""
        return described(self.cfg.sae.metadata.to_dict().get("auto") or {})

    def run(self) -> SAE[Any]:
        """Train and save the SAE; return it as SAELens's inference class."""
        return self._runner.run()[ALONE]


def train(cfg: VisionSAERunnerConfig, **in_hand: Any) -> SAE[Any]:
    """Train an SAE and return it: ``VisionSAETrainingRunner(cfg, **in_hand).run()``.

    Args:
        cfg: Configuration of the run.
        **in_hand: Other arguments of VisionSAETrainingRunner, for example ``model=``.

    Examples:
        >>> import dataclasses
        >>> short = dataclasses.replace(cfg, training_tokens=256, output_path="runs/short-run")
        >>> sae = vp.train(short, model=model)
        >>> SAE.load_from_disk("runs/short-run").cfg.d_sae
        256
    """
    return VisionSAETrainingRunner(cfg, **in_hand).run()


def train_many(
    cfgs: Mapping[str, VisionSAERunnerConfig],
    *,
    output_path: str | None,
    engine: Any = None,
    **in_hand: Any,
) -> dict[str, SAE[Any]]:
    """Train SAEs in one pass and return them: ``VisionMultiSAETrainingRunner(cfgs, ...).run()``.

    With an engine, runs that cannot share a pass are trained too, each group of those that can as
    a task of its own.

    Args:
        cfgs: Configurations by the SAE's name.
        output_path: Folder for the SAEs' folders; None saves nothing.
        engine: Where the SAEs are trained: ``"ray"``, an engine in hand such as
            ``vision_plugin.scale.RayEngine(address="auto")``, or None for this process.
        **in_hand: Other arguments of VisionMultiSAETrainingRunner, for example ``model=``; an
            engine takes none.

    Raises:
        ValueError: there are no SAEs, the runs cannot share a pass and there is no engine, or an
            engine is given what it has to open itself.

    Examples:
        >>> import dataclasses
        >>> narrow = dataclasses.replace(cfg, training_tokens=256)
        >>> wide = dataclasses.replace(narrow, sae=TopKTrainingSAEConfig(d_in=128, d_sae=512, k=8))
        >>> saes = vp.train_many(
        ...     {"narrow": narrow, "wide": wide}, output_path="runs/widths-of-two", model=model
        ... )
        >>> {name: sae.cfg.d_sae for name, sae in saes.items()}
        {'narrow': 256, 'wide': 512}
    """
    if engine is not None and in_hand:
        left_out = ", ".join(f"{name}=" for name in in_hand)
        raise ValueError(f"an engine opens all on the machines that train: leave out {left_out}")
    with opened(engine) as elsewhere:
        if elsewhere is not None:
            found: dict[str, SAE[Any]] = elsewhere.train_many(cfgs, output_path)
            return found
    return VisionMultiSAETrainingRunner(cfgs, output_path=output_path, **in_hand).run()


def streams(cfgs: Mapping[str, VisionSAERunnerConfig]) -> list[dict[str, VisionSAERunnerConfig]]:
    """Return runs in groups that can share a pass over the images, in the order of the first.

    Args:
        cfgs: Configurations by the SAE's name.

    Examples:
        >>> import dataclasses
        >>> cfgs = {"patches": cfg, "more": cfg, "classes": dataclasses.replace(cfg, tokens="cls")}
        >>> [list(group) for group in vp.sae.streams(cfgs)]
        [['patches', 'more'], ['classes']]
    """
    found: dict[str, dict[str, VisionSAERunnerConfig]] = {}
    for name, cfg in cfgs.items():
        fields = [f.name for f in dataclasses.fields(cfg) if f.name not in MAY_DIFFER]
        shared = repr([(field, getattr(cfg, field)) for field in fields])
        found.setdefault(shared, {})[name] = cfg
    return list(found.values())


def check_together(cfgs: Mapping[str, VisionSAERunnerConfig]) -> VisionSAERunnerConfig:
    """Return the first of several runs after checking that they can share a pass.

    Raises:
        ValueError: there is no run, a name cannot name a folder, or the runs differ in a field
            that they share.
    """
    if not cfgs:
        raise ValueError("there are no SAEs to train: name at least one")
    if list(cfgs) == [ALONE]:
        return cfgs[ALONE]
    for name in cfgs:
        if not name or "/" in name or "\\" in name or name.startswith("."):
            raise ValueError(
                f"{name!r} cannot be the name of an SAE, because it becomes the name of a folder"
            )
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
