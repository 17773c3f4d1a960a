"""SAELens's trainer with a callback before every step, and its state as tensors and JSON."""

from __future__ import annotations

import contextlib
import logging
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

from vision_plugin.sae._archetypal import MIXING, MIXING_LR_RATIO, ArchetypalDecoder
from vision_plugin.sae._device_step import DeviceStep, why_not

logger = logging.getLogger(__name__)

_ENCODER = ("W_enc", "b_enc", "r_mag", "b_mag", "b_gate")
_STEERING, _DAMPING, _MOST_DAMPING = 0.05, 1.0, 0.2
"""Change of the logarithm of a penalty's weight per step: the most for too many or too few active
latents, the factor for the change of their number, and the most for that change."""
_COUNTERS = ("n_training_steps", "n_training_samples", "n_frac_active_samples", "l0_excess")
_STATISTICS = ("act_freq_scores", "n_forward_passes_since_fired")
_OF_THE_DEVICE = ("fused", "capturable", "foreach")
"""Settings of an optimiser that say how it computes; a run resumed elsewhere has its own."""


@dataclass(frozen=True)
class Progress:
    """Figures of an SAE in training, from one batch and the steps before it.

    Examples:
        >>> vp.sae.Progress(explained_variance=0.9, l0=8.0, n_fired=250, n_latents=256, window=1000)
        Progress(explained_variance=0.9, l0=8.0, n_fired=250, n_latents=256, window=1000)
    """

    explained_variance: float
    """Explained variance of the batch."""
    l0: float
    """Mean number of latents that fire on a vector of the batch."""
    n_fired: int
    """Number of latents that fired at least once in the window."""
    n_latents: int
    """Number of latents of the SAE."""
    window: int
    """Number of last steps that ``n_fired`` counts over."""

    def __str__(self) -> str:
        return (
            f"explained variance {self.explained_variance:.3f}, L0 {self.l0:.1f}, {self.n_fired} "
            f"of {self.n_latents} latents fired in the last {self.window} steps"
        )


class SteppedTrainer(SAETrainer):  # type: ignore[misc]  # SAELens ships no types
    """SAELens's `SAETrainer` with a callback before each step.

    Between two steps nothing of a run changes, so the callback can save its state or score the SAE.
    The trainer also has two settings that SAELens lacks: a learning rate for the encoder, and a
    number of active latents that the weight of the sparsity penalty aims at. TopK, BatchTopK and
    Matryoshka SAEs on the sparse kernel take their steps on the device alone, see ``_device_step``.

    Examples:
        >>> import sae_lens
        >>> issubclass(vp.sae.SteppedTrainer, sae_lens.SAETrainer)
        True
    """

    own_step = True
    """Whether this trainer may take the steps of `DeviceStep` in place of SAELens's."""

    def __init__(
        self,
        *args: Any,
        before_step: Callable[[], None] | None = None,
        encoder_lr_ratio: float = 1.0,
        target_l0: float | None = None,
        archetypal: ArchetypalDecoder | None = None,
        **kwargs: Any,
    ) -> None:
        """Make SAELens's trainer.

        Args:
            *args: Arguments of SAELens's trainer.
            before_step: Function to call before each step.
            encoder_lr_ratio: Learning rate of the encoder, as a multiple of ``lr``.
            target_l0: Mean number of active latents per vector to aim at; None leaves the penalty's
                weight alone.
            archetypal: Keeps the decoder near the hull of data points; None leaves it free.
            **kwargs: Arguments of SAELens's trainer.
        """
        super().__init__(*args, **kwargs)
        self.before_step, self.target_l0 = before_step, target_l0
        self.l0_excess: float | None = None
        self.archetypal = archetypal
        reason = why_not(self.sae, target_l0=target_l0, archetypal=archetypal)
        on_gpu = torch.device(self.cfg.device).type == "cuda" and self.own_step
        fused = on_gpu and reason is None
        if encoder_lr_ratio != 1 or archetypal is not None or fused:
            self._regroup(encoder_lr_ratio, fused=fused)
        if archetypal is not None:
            archetypal.attach(self.optimizer)
        self.device_step: DeviceStep | None = None
        if reason is None and self.own_step:
            self.device_step = DeviceStep(self, fixed_shapes=on_gpu, capture=on_gpu)
        elif on_gpu:
            logger.warning("the training step is not captured in a CUDA graph: %s", reason)

    def named_parameters(self) -> dict[str, Tensor]:
        """Return the parameters that the optimiser moves, by name."""
        found = dict(self.sae.named_parameters())
        if self.archetypal is not None:
            del found["W_dec"]
            found |= self.archetypal.parameters()
        return found

    def complete(self) -> None:
        """Bring all weights into ``sae``; where processes share an SAE, all of them call this."""

    def state(self) -> dict[str, Any]:
        """Return the whole state; where processes share an SAE, all of them call this."""
        return trainer_state(self)

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the state that :meth:`state` returned."""
        load_trainer_state(self, state)

    def maybe_reset_sparsity(self) -> dict[str, Any]:
        """Call ``before_step``: SAELens calls this method first in every step."""
        if self.before_step is not None:
            self.before_step()
        log: dict[str, Any] = super().maybe_reset_sparsity()
        return log

    def step(self, batch: Tensor) -> TrainStepOutput:
        """Run SAELens's step, then change the penalty's weight towards ``target_l0``."""
        output: TrainStepOutput = super().step(batch)
        if self.target_l0 is not None:
            self._steer(self.target_l0, self.mean_l0(output))
        return output

    def _train_step(self, sae: Any, sae_in: Tensor) -> TrainStepOutput:
        """Run the step on the device alone where it can, and SAELens's own elsewhere."""
        if self.device_step is not None:
            return self.device_step(sae_in)
        output: TrainStepOutput = super()._train_step(sae, sae_in)
        return output

    def _reset_running_sparsity_stats(self) -> None:
        """Reset the counts where they are, since a graph knows tensors by their place."""
        self.act_freq_scores.zero_()
        self.n_frac_active_samples = 0

    def mean_l0(self, output: TrainStepOutput) -> float:
        """Return the mean number of active latents per vector of the batch."""
        return float((output.feature_acts.detach() > 0).sum()) / len(output.sae_in)

    def _steer(self, target: float, found: float) -> None:
        """Raise the penalty's weight if too many latents fire, and lower it if too few do.

        The change of their number counts too, to avoid overshooting: a weight that rises while the
        number still falls would kill latents.
        """
        excess = math.log(max(found, 1e-3 * target) / target)
        change = 0.0 if self.l0_excess is None else excess - self.l0_excess
        self.l0_excess = excess
        by = _STEERING * _within(excess, 1.0) + _within(_DAMPING * change, _MOST_DAMPING)
        for scheduler in self.coefficient_schedulers.values():
            scheduler.final_value *= math.exp(by)
            scheduler.current_value = scheduler.final_value

    def _regroup(self, ratio: float, *, fused: bool) -> None:
        """Give the encoder and the mixing their own learning rates, under SAELens's schedule."""
        cfg, named = self.cfg, self.named_parameters()
        encoder = [p for name, p in named.items() if name in _ENCODER]
        mixing = [p for name, p in named.items() if name == MIXING]
        others = [p for name, p in named.items() if name not in (*_ENCODER, MIXING)]
        groups = [
            {"params": others},
            {"params": encoder, "lr": cfg.lr * ratio},
            {"params": mixing, "lr": cfg.lr * MIXING_LR_RATIO},
        ]
        groups = [group for group in groups if group["params"]]
        how = {"fused": True, "capturable": True} if fused else {}
        self.optimizer = Adam(groups, lr=cfg.lr, betas=(cfg.adam_beta1, cfg.adam_beta2), **how)
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
        """Return figures of the SAE in training from the output of a step."""
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
        """Show the progress a hundred times in a run, instead of SAELens's losses."""
        interval = update_interval or max(1, self.cfg.total_training_steps // 100)
        last = self.n_training_samples >= self.cfg.total_training_samples
        if self.n_training_steps % interval == 0 or last:
            pbar.set_description(str(self.progress(step_output)))
            pbar.update(self.n_training_samples - pbar.n)


def _within(value: float, bound: float) -> float:
    return max(-bound, min(bound, value))


def trainer_state(trainer: SteppedTrainer) -> dict[str, Any]:
    """Return the state of a trainer: weights, optimiser, schedules, scaler and statistics."""
    names = {parameter: name for name, parameter in trainer.named_parameters().items()}
    groups = [
        {key: value for key, value in group.items() if key != "params"}
        for group in trainer.optimizer.param_groups
    ]
    scaler = trainer.activation_scaler
    whitening = None if scaler.whitening is None else dict(vars(scaler.whitening))
    return {
        "sae": dict(trainer.sae.state_dict()),
        "archetypal": None if trainer.archetypal is None else trainer.archetypal.state(),
        "optimizer": {names[p]: dict(state) for p, state in trainer.optimizer.state.items()},
        "parameter_groups": groups,
        "lr_scheduler": trainer.lr_scheduler.state_dict(),
        "coefficients": {
            # SAELens takes the final value from the configuration, but target_l0 changes it.
            name: {**scheduler.state_dict(), "final_value": scheduler.final_value}
            for name, scheduler in trainer.coefficient_schedulers.items()
        },
        "scaler": {"scaling_factor": scaler.scaling_factor, "whitening": whitening},
        "counters": {name: getattr(trainer, name) for name in _COUNTERS},
        "statistics": {name: getattr(trainer, name) for name in _STATISTICS},
    }


@torch.no_grad()
def load_trainer_state(trainer: SteppedTrainer, state: dict[str, Any]) -> None:
    """Restore the state that :func:`trainer_state` returned.

    The function copies into the existing tensors, because their strides decide the order of
    arithmetic and with it the bits of the result.
    """
    for name, tensor in trainer.sae.state_dict().items():
        tensor.copy_(state["sae"][name])
    if trainer.archetypal is not None:
        trainer.archetypal.load_state(state["archetypal"])
    for name, parameter in trainer.named_parameters().items():
        if name in state["optimizer"]:
            on_device = bool(trainer.optimizer.param_groups[0].get("capturable"))
            trainer.optimizer.state[parameter] = {
                key: _like(parameter, value, on_device)
                for key, value in state["optimizer"][name].items()
            }
    for group, saved in zip(trainer.optimizer.param_groups, state["parameter_groups"], strict=True):
        saved = {key: value for key, value in saved.items() if key not in _OF_THE_DEVICE}
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
        getattr(trainer, name).copy_(state["statistics"][name])


def _like(parameter: Tensor, value: Any, on_device: bool) -> Any:
    """Return optimiser state on the parameter's device, with its strides if the shapes agree.

    Args:
        parameter: Parameter that the state is of.
        value: A part of the state: a tensor like the parameter, or the number of steps.
        on_device: Whether the number of steps is on the device as well.
    """
    if not isinstance(value, Tensor):
        return value
    if value.shape != parameter.shape:
        return value.clone().to(parameter.device if on_device else value.device)
    room = torch.empty_like(parameter, dtype=value.dtype, memory_format=torch.preserve_format)
    return room.copy_(value)


def random_state() -> dict[str, Any]:
    """Return the states of torch's, NumPy's and Python's random generators."""
    kind, keys, *rest = np.random.get_state()  # a step may use the global one
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "python": random.getstate(),
    }


def load_random_state(state: dict[str, Any]) -> None:
    """Set the random generators to states that :func:`random_state` returned."""
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
    """Raise if a weight is no longer finite.

    Args:
        trainer: Trainer of the SAE.
        what: Name of the SAE for the message.

    Raises:
        DivergedError: a weight is not finite; the message names it and the step.
    """
    for name, parameter in trainer.sae.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise DivergedError(
                f"{name} of {what} is not finite after step {trainer.n_training_steps}: the run "
                "has diverged. Lower lr=, or raise lr_warm_up_steps="
            )


class DivergedError(ValueError):
    """Training produced a weight that is not finite."""

    exit_status = 1
    """Exit status of the command: 1, since the run began and then failed."""
