"""SAELens's trainer with a pause before every step, and its whole state as tensors and JSON."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sae_lens.training.activation_scaler import ActivationWhitening
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor

_COUNTERS = ("n_training_steps", "n_training_samples", "n_frac_active_samples")
_STATISTICS = ("act_freq_scores", "n_forward_passes_since_fired")


class SteppedTrainer(SAETrainer):  # type: ignore[misc]  # SAELens ships no types
    """SAELens's `SAETrainer`, which calls back before each step.

    Between two steps everything that a run consists of is at rest: that is when its state can be
    taken, or the SAE be looked at.
    """

    def __init__(
        self, *args: Any, before_step: Callable[[], None] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.before_step = before_step

    def maybe_reset_sparsity(self) -> dict[str, Any]:
        """Call back; then as SAELens, which asks this first in every step."""
        if self.before_step is not None:
            self.before_step()
        log: dict[str, Any] = super().maybe_reset_sparsity()
        return log


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
        "coefficients": {n: s.state_dict() for n, s in trainer.coefficient_schedulers.items()},
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
