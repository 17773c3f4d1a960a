"""A training run: it combines trainers, batches, checkpoints and validation, and can resume."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from sae_lens import TrainingSAE
from sae_lens.training.multi_sae_trainer import MultiSAETrainer

from vision_plugin.sae._archetypal import ArchetypalDecoder
from vision_plugin.sae._checkpoint import VALIDATION_FILE, CheckpointError, CheckpointFolder
from vision_plugin.sae._config import VisionSAERunnerConfig, number
from vision_plugin.sae._initialise import by_name, estimate_scalers, initialise
from vision_plugin.sae._monosemantic import reward_monosemanticity
from vision_plugin.sae._quality import Quality, fit_threshold, measure, record, take
from vision_plugin.sae._saving import inference_sae
from vision_plugin.sae._sources import Batches
from vision_plugin.sae._team import Team
from vision_plugin.sae._terms import revive_dead
from vision_plugin.sae._trainer import (
    SteppedTrainer,
    check_finite,
    load_random_state,
    random_state,
)
from vision_plugin.sae._validation import ValidationLog, Validator
from vision_plugin.sae._wandb import WandbRun

logger = logging.getLogger(__name__)


class TrainingSession:
    """A run of one SAE or several, from its beginning or from its last checkpoint."""

    def __init__(
        self,
        cfgs: Mapping[str, VisionSAERunnerConfig],
        saes: Mapping[str, TrainingSAE[Any]],
        batches: Batches,
        *,
        checkpoints: CheckpointFolder | None,
        validators: Mapping[str, Validator],
        identity: dict[str, Any],
        team: Team | None = None,
    ) -> None:
        """Make the trainers.

        Args:
            cfgs: Configurations by the SAE's name. SAELens's `SAETrainer` trains a single one
                named ``""``; its `MultiSAETrainer` trains others together.
            saes: SAEs by name.
            batches: Training batches: one tensor, or tensors by the SAE's name.
            checkpoints: Folder of the checkpoints; None writes none.
            validators: Scorers of held-out images by the SAE's name; for all SAEs or for none.
            identity: JSON values that a checkpoint must agree with to continue this run.
            team: Processes that train the SAEs together; None for this process alone. The first
                of them writes the checkpoints, and validates.
        """
        self.team = team
        self.leads = team is None or team.leads
        self.cfgs, self.saes, self.batches = dict(cfgs), dict(saes), batches
        self.checkpoints, self.validators, self.identity = checkpoints, validators, identity
        self.trainers = {n: _trainer(cfgs[n], sae, batches, team) for n, sae in saes.items()}
        self.first = next(iter(self.trainers.values()))
        self.first.before_step = self._between_steps
        self.cfg = next(iter(self.cfgs.values()))
        self.log = ValidationLog()
        self.quality: dict[str, Quality] = {}
        self._resumed: dict[str, Any] | None = None
        self._resumed_step: int | None = None
        self._checkpoint_steps = _evenly(self.cfg.n_checkpoints + 1, self.cfg)
        self._validation_steps = _evenly(self.cfg.n_validations, self.cfg)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Lock the checkpoints and read the last good one; hold the lock during a ``with`` block.

        Raises:
            CheckpointLockedError: another process trains into the same folder.
            CheckpointError: another run wrote the checkpoints.
        """
        with contextlib.ExitStack() as stack:
            if self.checkpoints is not None:
                if self.leads:
                    stack.enter_context(self.checkpoints.locked())
                self._find(self.checkpoints)
            run_id = None if self._resumed is None else self._resumed["wandb_id"]
            settings = {name or "run": cfg.to_dict() for name, cfg in self.cfgs.items()}
            settings = settings["run"] if list(self.cfgs) == [""] else settings
            self.wandb = stack.enter_context(WandbRun(self.cfg.logger, settings, run_id))
            if self.checkpoints is not None and self.leads:
                self.log.file = self.checkpoints.path / VALIDATION_FILE
            yield

    def fit(self) -> None:
        """Train to the end.

        Raises:
            DivergedError: a weight is no longer finite.
            CheckpointFullError: the disk has no room for a checkpoint.
            ValueError: the data is too small, or has values that are not finite.
        """
        if self._resumed is None:
            self._begin()
        else:
            self._go_on(self._resumed)
            self._resumed = None
        if list(self.trainers) == [""]:
            self.first.fit()
        else:
            self._together().fit()
        self._check_finite()
        self._validate()
        self._look_back()

    def done(self) -> None:
        """Remove the checkpoints, once the SAE is saved."""
        if self.checkpoints is not None and self.leads:
            self.checkpoints.clear()

    def _find(self, checkpoints: CheckpointFolder) -> None:
        found = None
        if self.leads:
            if self.cfg.overwrite:
                checkpoints.clear()
            found = checkpoints.last()
        if self.team is not None:
            step = self.team.agree(None if found is None else found[0])
            if step is not None and found is None:
                found = step, checkpoints.shared(step)
        if found is None:
            return
        self._resumed_step, self._resumed = found
        wrong = _differences(self._resumed["identity"], self.identity)
        if wrong:
            raise CheckpointError(
                f"{checkpoints.path} has checkpoints of another run: {'; '.join(wrong)}. "
                "Name another output_path=, or set overwrite= to begin anew"
            )
        logger.info("continuing from the checkpoint of step %d", self._resumed_step)

    def _begin(self) -> None:
        sample = self.batches.sample()  # raises if the data is wrong
        steps = self.first.cfg.total_training_steps
        most = max(steps, VisionSAERunnerConfig.n_batches_for_norm_estimate)
        estimate_scalers(
            self.trainers,
            self.batches,
            n_batches=min(self.cfg.n_batches_for_norm_estimate, most),
        )
        for name, trainer in self.trainers.items():
            rows = sample[name] if isinstance(sample, dict) else sample
            initialise(trainer, rows, self.cfgs[name])

    def _go_on(self, state: dict[str, Any]) -> None:
        for name, trainer in self.trainers.items():
            trainer.load_state(state["trainers"][name])
        self.batches.load_state_dict(state["batches"])
        self.log.restore(state["validation"])
        load_random_state(state["random"])

    def _look_back(self) -> None:
        """Measure the finished SAEs on the next vectors of the stream, and record the figures.

        Before that, half as many vectors serve to fit the thresholds of the SAEs that ask for it.
        """
        n = min(self.cfg.n_quality_tokens, self.cfg.training_tokens)
        fitting = [name for name, cfg in self.cfgs.items() if cfg.fit_threshold is True]
        if fitting:
            batches = list(take(self.batches, n // 2))
            for name in fitting:
                rows = torch.cat([dict(by_name(batch, [name]))[name] for batch in batches])
                fit_threshold(self.saes[name], rows.to(self.saes[name].device))
        batches = list(take(self.batches, n))
        for name, sae in self.saes.items():
            parts = (dict(by_name(batch, [name]))[name] for batch in batches)
            found = measure(inference_sae(sae), parts)
            self.quality[name] = found
            record(sae, found)
            prefix = f"{name}/quality/" if name else "quality/"
            self.wandb.log(found.scores(prefix), step=self.first.n_training_steps)

    def _together(self) -> MultiSAETrainer:
        """Return SAELens's coordinator with our trainers, each with its own learning rate."""
        multi = _MultiTrainer(
            cfg=self.first.cfg,
            saes=self.saes,
            hook_names={name: name for name in self.saes},
            data_provider=self.batches,
        )
        multi.trainers = self.trainers
        multi.n_training_steps = self.first.n_training_steps
        multi.n_training_samples = self.first.n_training_samples
        return multi

    def _between_steps(self) -> None:
        step = self.first.n_training_steps
        if step == self._resumed_step:
            return
        if step in self._validation_steps:
            self._validate()
        if self.checkpoints is not None and step in self._checkpoint_steps:
            self._check_finite()
            state = self._state()
            if self.leads:
                self.checkpoints.save(step, state)

    def _check_finite(self) -> None:
        for name, trainer in self.trainers.items():
            check_finite(trainer, name or "the SAE")

    def _state(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "trainers": {name: t.state() for name, t in self.trainers.items()},
            "batches": self.batches.state_dict(),
            "random": random_state(),
            "validation": self.log.records,
            "wandb_id": self.wandb.id,
        }

    def _validate(self) -> None:
        """Score on held-out images without changing the run's random state.

        Raises:
            DivergedError: a weight is not finite.
        """
        if not self.validators:
            return
        for trainer in self.trainers.values():
            trainer.complete()
        if not self.leads:
            return
        self._check_finite()
        found: dict[str, Any] = {}
        before = random_state()
        with torch.no_grad():
            for name, trainer in self.trainers.items():
                trainer.sae.eval()
                scores = self.validators[name](trainer.sae, self.batches, trainer.activation_scaler)
                trainer.sae.train()
                found |= {f"{name}/{key}" if name else key: v for key, v in scores.items()}
        load_random_state(before)
        step, samples = self.first.n_training_steps, self.first.n_training_samples
        self.log.add({"step": step, "n_training_samples": samples, **found})
        self.wandb.log(found, step=step)


class _MultiTrainer(MultiSAETrainer):  # type: ignore[misc]  # SAELens ships no types
    """SAELens's coordinator with a progress line about the SAE that explains least."""

    def _update_pbar(self, step_outputs: Any, pbar: Any, update_interval: int = 0) -> None:
        interval = update_interval or max(1, self.cfg.total_training_steps // 100)
        last = self.n_training_samples >= self.cfg.total_training_samples
        if self.n_training_steps % interval and not last:
            return
        states = [t.progress(step_outputs[name]) for name, t in self.trainers.items()]
        worst = min(states, key=lambda state: state.explained_variance)
        pbar.set_description(f"{len(states)} SAEs; the one that explains least: {worst}")
        pbar.update(self.n_training_samples - pbar.n)


def _trainer(
    cfg: VisionSAERunnerConfig, sae: TrainingSAE[Any], batches: Batches, team: Team | None
) -> SteppedTrainer:
    if cfg.revive_dead is True and not hasattr(sae.cfg, "aux_loss_coefficient"):
        revive_dead(sae)
    if cfg.mono_coefficient:
        reward_monosemanticity(sae, cfg.mono_coefficient)
    make = SteppedTrainer if team is None else team.trainer
    return make(
        cfg=cfg.to_sae_trainer_config(),
        sae=sae,
        data_provider=batches,
        encoder_lr_ratio=number(cfg, "encoder_lr_ratio"),
        target_l0=None if cfg.target_l0 is None else number(cfg, "target_l0"),
        archetypal=ArchetypalDecoder(sae, bound=cfg.archetypal_relaxation)
        if cfg.archetypal_points
        else None,
    )


def _evenly(parts: int, cfg: VisionSAERunnerConfig) -> set[int]:
    """Return the steps that divide a run into equal parts, without the first and the last."""
    total = cfg.total_training_steps
    return {round(total * i / parts) for i in range(1, parts)} - {0, total}


def _differences(saved: Any, here: Any, place: str = "") -> list[str]:
    """Return the differences of two JSON documents as texts."""
    if isinstance(saved, dict) and isinstance(here, dict):
        found = []
        for key in sorted({*saved, *here}):
            inner = f"{place}.{key}" if place else key
            found += _differences(saved.get(key), here.get(key), inner)
        return found
    same = json.dumps(saved) == json.dumps(here)
    return [] if same else [f"{place}: {saved!r} saved, {here!r} now"]
