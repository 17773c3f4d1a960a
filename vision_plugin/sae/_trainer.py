"""SAELens's trainer with a pause before every step, and its whole state as tensors and JSON."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.activation_scaler import ActivationWhitening
from sae_lens.training.optim import get_lr_scheduler
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor
from torch.optim import Adam

_ENCODER = ("W_enc", "b_enc", "r_mag", "b_mag", "b_gate")
_STEERING, _DAMPING, _MOST_DAMPING = 0.05, 1.0, 0.2
"""Change of the logarithm of a penalty's weight in a step: most of it for too many or too few
latents, its part for their change, and most of that."""
_COUNTERS = ("n_training_steps", "n_training_samples", "n_frac_active_samples", "l0_excess")
_STATISTICS = ("act_freq_scores", "n_forward_passes_since_fired")


@dataclass(frozen=True)
class Progress:
    """An SAE in training, as one batch and the steps before it show it."""

    explained_variance: float
    """Of the batch."""
    l0: float
    """Mean number of latents that fire on a vector of the batch."""
    n_fired: int
    """Latents that fired at least once in the window."""
    n_latents: int
    """Latents of the SAE."""
    window: int
    """Steps back that ``n_fired`` looks."""

    def __str__(self) -> str:
        return (
            f"explained variance {self.explained_variance:.3f}, L0 {self.l0:.1f}, {self.n_fired} "
            f"of {self.n_latents} latents fired in the last {self.window} steps"
        )


class SteppedTrainer(SAETrainer):  # type: ignore[misc]  # SAELens ships no types
    """SAELens's `SAETrainer`, which calls back before each step.

    Between two steps everything that a run consists of is at rest: that is when its state can be
    taken, or the SAE be looked at. Two things can be added to what SAELens does in a step: another
    learning rate for the encoder, and a penalty whose weight follows from the latents that fire.
    """

    def __init__(
        self,
        *args: Any,
        before_step: Callable[[], None] | None = None,
        encoder_lr_ratio: float = 1.0,
        target_l0: float | None = None,
        **kwargs: Any,
    ) -> None:
        """Make SAELens's trainer.

        Args:
            *args: SAELens's.
            before_step: Called before each step.
            encoder_lr_ratio: Learning rate of the encoder, as a multiple of the others'.
            target_l0: Latents to be active per vector; None leaves the penalty's weight alone.
            **kwargs: SAELens's.
        """
        super().__init__(*args, **kwargs)
        self.before_step, self.target_l0 = before_step, target_l0
        self.l0_excess: float | None = None
        if encoder_lr_ratio != 1:
            self._slow_encoder(encoder_lr_ratio)

    def maybe_reset_sparsity(self) -> dict[str, Any]:
        """Call back; then as SAELens, which asks this first in every step."""
        if self.before_step is not None:
            self.before_step()
        log: dict[str, Any] = super().maybe_reset_sparsity()
        return log

    def step(self, batch: Tensor) -> TrainStepOutput:
        """SAELens's step; then the penalty's weight is moved towards the target."""
        output: TrainStepOutput = super().step(batch)
        if self.target_l0 is not None:
            self._steer(self.target_l0, output)
        return output

    def _steer(self, target: float, output: TrainStepOutput) -> None:
        """Raise the penalty's weight where too many latents fire, lower it where too few do.

        How fast their number changes counts too, against overshooting: a weight that rose while
        the latents were still on their way would kill them.
        """
        found = float((output.feature_acts.detach() > 0).sum()) / len(output.sae_in)
        excess = math.log(max(found, 1e-3 * target) / target)
        change = 0.0 if self.l0_excess is None else excess - self.l0_excess
        self.l0_excess = excess
        by = _STEERING * _within(excess, 1.0) + _within(_DAMPING * change, _MOST_DAMPING)
        for scheduler in self.coefficient_schedulers.values():
            scheduler.final_value *= math.exp(by)
            scheduler.current_value = scheduler.final_value

    def _slow_encoder(self, ratio: float) -> None:
        """A group of its own for the encoder, and SAELens's schedule over both groups."""
        cfg = self.cfg
        encoder = [p for name, p in self.sae.named_parameters() if name in _ENCODER]
        others = [p for name, p in self.sae.named_parameters() if name not in _ENCODER]
        groups = [{"params": others}, {"params": encoder, "lr": cfg.lr * ratio}]
        groups = [group for group in groups if group["params"]]
        self.optimizer = Adam(groups, lr=cfg.lr, betas=(cfg.adam_beta1, cfg.adam_beta2))
        self.lr_scheduler = get_lr_scheduler(
            cfg.lr_scheduler_name,
            lr=cfg.lr,
            optimizer=self.optimizer,
            warm_up_steps=cfg.lr_warm_up_steps,
            decay_steps=cfg.lr_decay_steps,
            training_steps=cfg.total_training_steps,
            lr_end=cfg.lr_end,
            num_cycles=cfg.n_restart_cycles,
        )

    @torch.no_grad()
    def progress(self, output: TrainStepOutput) -> Progress:
        """What a batch says of the SAE in training."""
        x, fired = output.sae_in, output.feature_acts.bool().float().sum(-1)
        error = (x - output.sae_out).pow(2).sum()
        window = max(1, min(self.n_training_steps, int(self.cfg.dead_feature_window)))
        return Progress(
            explained_variance=1 - float(error / (x - x.mean(0)).pow(2).sum().clamp(min=1e-12)),
            l0=float(fired.mean()),
            n_fired=int((self.n_forward_passes_since_fired < window).sum()),
            n_latents=int(self.sae.cfg.d_sae),
            window=window,
        )

    def _update_pbar(
        self, step_output: TrainStepOutput, pbar: Any, update_interval: int = 0
    ) -> None:
        """Show the progress a hundred times in a run, in place of SAELens's losses."""
        interval = update_interval or max(1, self.cfg.total_training_steps // 100)
        last = self.n_training_samples >= self.cfg.total_training_samples
        if self.n_training_steps % interval == 0 or last:
            pbar.set_description(str(self.progress(step_output)))
            pbar.update(self.n_training_samples - pbar.n)


def _within(value: float, bound: float) -> float:
    return max(-bound, min(bound, value))


def trainer_state(trainer: SAETrainer) -> dict[str, Any]:
    """All that decides how a trainer goes on: weights, optimiser, schedules, scaler, statistics."""
    names = {parameter: name for name, parameter in trainer.sae.named_parameters()}
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in trainer.optimizer.param_groups
    ]
    scaler = trainer.activation_scaler
    whitening = None if scaler.whitening is None else dict(vars(scaler.whitening))
    return {
        "sae": dict(trainer.sae.state_dict()),
        "optimizer": {names[p]: dict(state) for p, state in trainer.optimizer.state.items()},
        "parameter_groups": groups,
        "lr_scheduler": trainer.lr_scheduler.state_dict(),
        "coefficients": {
            # SAELens leaves the final value to the configuration; a steered one is not from there.
            name: {**scheduler.state_dict(), "final_value": scheduler.final_value}
            for name, scheduler in trainer.coefficient_schedulers.items()
        },
        "scaler": {"scaling_factor": scaler.scaling_factor, "whitening": whitening},
        "counters": {name: getattr(trainer, name) for name in _COUNTERS},
        "statistics": {name: getattr(trainer, name) for name in _STATISTICS},
    }


@torch.no_grad()
def load_trainer_state(trainer: SAETrainer, state: dict[str, Any]) -> None:
    """Put a trainer where :func:`trainer_state` was taken.

    Tensors are copied into those that are there, so that strides, and with them the order of
    arithmetic, stay what they were.
    """
    for name, tensor in trainer.sae.state_dict().items():
        tensor.copy_(state["sae"][name])
    for name, parameter in trainer.sae.named_parameters():
        if name in state["optimizer"]:
            trainer.optimizer.state[parameter] = {
                key: _like(parameter, value) for key, value in state["optimizer"][name].items()
            }
    for group, saved in zip(trainer.optimizer.param_groups, state["parameter_groups"], strict=True):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
    trainer.lr_scheduler.load_state_dict(state["lr_scheduler"])
    for name, scheduler in trainer.coefficient_schedulers.items():
        scheduler.load_state_dict(state["coefficients"][name])
    scaler, saved = trainer.activation_scaler, state["scaler"]
    scaler.scaling_factor = saved["scaling_factor"]
    scaler.whitening = saved["whitening"] and ActivationWhitening(**saved["whitening"])
    for name in _COUNTERS:
        setattr(trainer, name, state["counters"][name])
    for name in _STATISTICS:
        setattr(trainer, name, state["statistics"][name].to(trainer.cfg.device))


def _like(parameter: Tensor, value: Any) -> Any:
    """Optimiser state on the parameter's device; what has its shape has its strides too."""
    if not isinstance(value, Tensor):
        return value
    if value.shape != parameter.shape:
        return value.clone()
    room = torch.empty_like(parameter, dtype=value.dtype, memory_format=torch.preserve_format)
    return room.copy_(value)


def random_state() -> dict[str, Any]:
    """States of the generators that a step might draw from: torch's, NumPy's and Python's."""
    kind, keys, *rest = np.random.get_state()  # the global one is what is shared
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "python": random.getstate(),
    }


def load_random_state(state: dict[str, Any]) -> None:
    """Set the generators to what :func:`random_state` found."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Train as in a process of its own.

    Gradients are on whatever the caller's mode, and the caller's random state is as before.
    """
    before = random_state()
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        load_random_state(before)


def check_finite(trainer: SAETrainer, what: str) -> None:
    """Raise where a weight is not finite any more.

    Raises:
        DivergedError: naming the weight and the step.
    """
    for name, parameter in trainer.sae.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise DivergedError(
                f"{name} of {what} is not finite after step {trainer.n_training_steps}: the run "
                "has diverged. Lower lr, or warm it up (lr_warm_up_steps)"
            )


class DivergedError(ValueError):
    """Training has left the finite numbers."""
