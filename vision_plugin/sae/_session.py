"""A training run that can be killed: trainers, batches, checkpoints and validation together."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from sae_lens import TrainingSAE
from sae_lens.training.multi_sae_trainer import MultiSAETrainer

from vision_plugin.sae._checkpoint import CheckpointError, CheckpointFolder
from vision_plugin.sae._config import VisionSAERunnerConfig
from vision_plugin.sae._initialise import estimate_scalers, initialise
from vision_plugin.sae._sources import Batches
from vision_plugin.sae._trainer import (
    SteppedTrainer,
    check_finite,
    load_random_state,
    load_trainer_state,
    random_state,
    trainer_state,
)
from vision_plugin.sae._validation import ValidationLog, Validator
from vision_plugin.sae._wandb import WandbRun

logger = logging.getLogger(__name__)

VALIDATION_FILE = "validation.jsonl"


class TrainingSession:
    """One run of one SAE or several, from its beginning or from its last checkpoint."""

    def __init__(
        self,
        cfgs: Mapping[str, VisionSAERunnerConfig],
        saes: Mapping[str, TrainingSAE[Any]],
        batches: Batches,
        *,
        checkpoints: CheckpointFolder | None,
        validators: Mapping[str, Validator],
        identity: dict[str, Any],
    ) -> None:
        """Make the trainers.

        Args:
            cfgs: By the SAE's name; one of the name ``""`` alone is trained by SAELens's
                `SAETrainer`, others together by its `MultiSAETrainer`.
            saes: Likewise.
            batches: One tensor, or tensors by the SAE's name.
            checkpoints: Where checkpoints go.
            validators: Looks at held-out images, by the SAE's name; none or all of them.
            identity: What a checkpoint has to have been made with, as JSON has it.
        """
        self.cfgs, self.saes, self.batches = dict(cfgs), dict(saes), batches
        self.checkpoints, self.validators, self.identity = checkpoints, validators, identity
        self.trainers = {
            name: SteppedTrainer(
                cfg=cfgs[name].to_sae_trainer_config(), sae=sae, data_provider=batches
            )
            for name, sae in saes.items()
        }
        self.first = next(iter(self.trainers.values()))
        self.first.before_step = self._between_steps
        self.cfg = next(iter(self.cfgs.values()))
        self.log = ValidationLog()
        self._resumed: dict[str, Any] | None = None
        self._resumed_step: int | None = None
        self._checkpoint_steps = _evenly(self.cfg.n_checkpoints + 1, self.cfg)
        self._validation_steps = _evenly(self.cfg.n_validations, self.cfg)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the checkpoints, and go to the last good one, for the length of a ``with`` block.

        Raises:
            CheckpointLockedError: another process is at the same run.
            CheckpointError: the checkpoints there are of another run.
        """
        with contextlib.ExitStack() as stack:
            if self.checkpoints is not None:
                stack.enter_context(self.checkpoints.locked())
                self._find()
            run_id = None if self._resumed is None else self._resumed["wandb_id"]
            settings = {name or "run": cfg.to_dict() for name, cfg in self.cfgs.items()}
            settings = settings["run"] if list(self.cfgs) == [""] else settings
            self.wandb = stack.enter_context(WandbRun(self.cfg.logger, settings, run_id))
            if self.checkpoints is not None:
                self.log.file = self.checkpoints.path / VALIDATION_FILE
            yield

    def fit(self) -> None:
        """Train to the end.

        Raises:
            DivergedError: a weight is not finite any more.
            CheckpointFullError: there is no room for a checkpoint.
            ValueError: the data is not fit to train on.
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
        for name, trainer in self.trainers.items():
            check_finite(trainer, name or "the SAE")
        self._validate()

    def done(self) -> None:
        """Remove the checkpoints: the SAE is saved."""
        if self.checkpoints is not None:
            self.checkpoints.clear()

    def _find(self) -> None:
        assert self.checkpoints is not None
        if self.cfg.overwrite:
            self.checkpoints.clear()
        found = self.checkpoints.last()
        if found is None:
            return
        self._resumed_step, self._resumed = found
        wrong = _differences(self._resumed["identity"], self.identity)
        if wrong:
            raise CheckpointError(
                f"{self.checkpoints.path} has checkpoints of another run: {'; '.join(wrong)}. "
                "Choose another --output-path, or say --overwrite to begin anew"
            )
        logger.info("going on from the checkpoint of step %d", self._resumed_step)

    def _begin(self) -> None:
        sample = self.batches.sample()  # finds what is wrong with the data
        estimate_scalers(
            self.trainers, self.batches, n_batches=self.cfg.n_batches_for_norm_estimate
        )
        for name, trainer in self.trainers.items():
            rows = sample[name] if isinstance(sample, dict) else sample
            initialise(trainer, rows, self.cfgs[name])

    def _go_on(self, state: dict[str, Any]) -> None:
        for name, trainer in self.trainers.items():
            load_trainer_state(trainer, state["trainers"][name])
        self.batches.load_state_dict(state["batches"])
        self.log.restore(state["validation"])
        load_random_state(state["random"])

    def _together(self) -> MultiSAETrainer:
        """SAELens's coordinator with our trainers in it, each with its own learning rate."""
        multi = MultiSAETrainer(
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
            for name, trainer in self.trainers.items():
                check_finite(trainer, name or "the SAE")
            self.checkpoints.save(step, self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "trainers": {name: trainer_state(t) for name, t in self.trainers.items()},
            "batches": self.batches.state_dict(),
            "random": random_state(),
            "validation": self.log.records,
            "wandb_id": self.wandb.id,
        }

    def _validate(self) -> None:
        """Look at held-out images, and leave no trace in the run's random state."""
        if not self.validators:
            return
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


def _evenly(parts: int, cfg: VisionSAERunnerConfig) -> set[int]:
    """The steps that divide a run into so many parts, without its first and last."""
    total = cfg.total_training_steps
    return {round(total * i / parts) for i in range(1, parts)} - {0, total}


def _differences(saved: Any, here: Any, place: str = "") -> list[str]:
    """Where two JSON documents differ."""
    if isinstance(saved, dict) and isinstance(here, dict):
        found = []
        for key in sorted({*saved, *here}):
            inner = f"{place}.{key}" if place else key
            found += _differences(saved.get(key), here.get(key), inner)
        return found
    same = json.dumps(saved) == json.dumps(here)
    return [] if same else [f"{place}: {saved!r} saved, {here!r} now"]
