"""A training step of the sparse classes that asks the host for nothing.

Counters, losses and the clipping of gradients stay on the device, and no shape depends on the data.
On a GPU such a step is captured in a CUDA graph, whose replay is a single call. On a CPU the same
step runs as it is, with the dead latents gathered in as many rows as there are of them.
"""

from __future__ import annotations

import contextlib
import logging
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer
from torch import Tensor, nn

from vision_plugin.sae._sparse_activations import SparseActivations

logger = logging.getLogger(__name__)

_WARM_UP = 3
"""Steps that run before one is captured: kernels are compiled and the optimiser's state is made."""
_MOST_BETWEEN_READS = 64
_FEWEST_DEAD = 256
"""Least room for dead latents. It grows by doubling, so that few graphs are captured in a run."""


class DeviceStep:
    """The training step of an SAE on the sparse kernel.

    Args:
        trainer: Trainer of the SAE.
        fixed_shapes: Whether no shape may depend on the data, as a graph needs it. Dead latents
            then get a fixed number of rows, and zeros fill up what is missing.
        capture: Whether to capture the step in a CUDA graph.
    """

    def __init__(self, trainer: SAETrainer, *, fixed_shapes: bool, capture: bool) -> None:
        self.trainer, self.fixed_shapes, self.capture = trainer, fixed_shapes, capture
        self._steps_to_read = 0
        self._graphs: dict[int, _Graph] = {}
        self._warm: dict[int, int] = {}
        groups = trainer.optimizer.param_groups
        device = trainer.cfg.device
        self._rates = [torch.zeros((), device=device) for _ in groups] if fixed_shapes else []

    def __call__(self, sae_in: Tensor) -> TrainStepOutput:
        """Run one step as SAELens's ``_train_step`` does.

        Returns:
            The output of the step. Where a graph computes it, it holds until the next step.
        """
        trainer = self.trainer
        trainer.sae.train()
        if self.fixed_shapes:
            trainer.sae.dead_capacity = self._room_for_dead()
            for rate, group in zip(self._rates, trainer.optimizer.param_groups, strict=True):
                rate.fill_(float(group["lr"]))
        # Streams and graphs are made on the current device, which need not be that of the SAE.
        with torch.cuda.device(sae_in.device) if sae_in.is_cuda else contextlib.nullcontext():
            output = self._replay(sae_in) if self.capture else self.body(sae_in)
        trainer.n_frac_active_samples += trainer.cfg.train_batch_size_samples
        trainer.lr_scheduler.step()
        for scheduler in trainer.coefficient_schedulers.values():
            scheduler.step()
        return output

    def body(self, sae_in: Tensor) -> TrainStepOutput:
        """Run what happens on the device: losses, counters, gradients, and the optimiser."""
        trainer = self.trainer
        with trainer.autocast_if_enabled:
            output: TrainStepOutput = trainer.sae.training_forward_pass(
                TrainStepInput(
                    sae_in=sae_in,
                    dead_neuron_mask=trainer.dead_neurons,
                    coefficients=trainer.get_coefficients(),
                    n_training_steps=trainer.n_training_steps,
                    is_logging_step=trainer._is_logging_step(),
                )
            )
            self._count(output.feature_acts)
        output.loss.backward()
        self._update()
        return output

    @torch.no_grad()
    def _count(self, latents: Tensor) -> None:
        """Count how often each latent fired, and the steps since it last did."""
        trainer = self.trainer
        if isinstance(latents, SparseActivations):
            counts = latents.count_fired()
        else:
            counts = latents.bool().float().flatten(0, -2).sum(0)
        trainer.n_forward_passes_since_fired.add_(1).masked_fill_(counts > 0, 0)
        trainer.act_freq_scores.add_(counts)

    def _update(self) -> None:
        """Clip the gradients to norm 1 and let the optimiser use them."""
        trainer = self.trainer
        optimizer, parameters = trainer.optimizer, list(trainer.sae.parameters())
        if not optimizer.param_groups[0].get("fused"):
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        else:
            gradients = [p.grad for p in parameters if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            # Fused Adam divides the gradients itself, which saves reading and writing them.
            optimizer.grad_scale = (norm + 1e-6).clamp(min=1.0)
            self._step_with_rates_of_the_device()
        optimizer.zero_grad()

    def _step_with_rates_of_the_device(self) -> None:
        """Run the optimiser with learning rates that it reads on the device.

        A graph would repeat a number of the host. The schedule goes on with the numbers, in double
        precision.
        """
        groups = self.trainer.optimizer.param_groups
        before = [group["lr"] for group in groups]
        for group, rate in zip(groups, self._rates or before, strict=True):
            group["lr"] = rate
        try:
            self.trainer.optimizer.step()
        finally:
            for group, rate in zip(groups, before, strict=True):
                group["lr"] = rate

    def _room_for_dead(self) -> int:
        """Return for how many dead latents there has to be room, looking only now and then.

        A latent is dead once it has not fired for the window, so those that can be dead within
        some steps are known before them.
        """
        window = int(self.trainer.cfg.dead_feature_window)
        if self._steps_to_read == 0:
            self._steps_to_read = max(1, min(_MOST_BETWEEN_READS, window // 4))
            silent = self.trainer.n_forward_passes_since_fired
            self._room = int((silent > window - self._steps_to_read).sum())
        self._steps_to_read -= 1
        if self._room == 0:
            return 0
        room = max(_FEWEST_DEAD, 1 << (self._room - 1).bit_length())
        return min(room, int(self.trainer.sae.cfg.d_sae))

    def _replay(self, sae_in: Tensor) -> TrainStepOutput:
        """Run the step from its graph; run it as it is before there is one."""
        room = self.trainer.sae.dead_capacity
        if has_hooks(self.trainer.sae):
            return self.body(sae_in)
        graph = self._graphs.get(room)
        if graph is None:
            self._warm[room] = self._warm.get(room, 0) + 1
            if self._warm[room] <= _WARM_UP:
                return _on_side_stream(self.body, sae_in)
            try:
                graph = _Graph(self.body, sae_in, next(iter(self._graphs.values()), None))
            except RuntimeError as error:
                self.capture = False
                logger.warning(
                    "the training step is not captured in a CUDA graph, and runs slower: %s",
                    str(error).partition("\n")[0],
                )
                self.trainer.optimizer.zero_grad()
                return self.body(sae_in)
            self._graphs[room] = graph
        return graph.replay(sae_in)


class _Graph:
    """A step in a CUDA graph, with the tensors that it reads and writes."""

    def __init__(self, body: Any, sae_in: Tensor, other: _Graph | None) -> None:
        self.sae_in = sae_in.clone()
        self.graph = torch.cuda.CUDAGraph()
        # Graphs of one run never run together, so they can share their memory.
        with torch.cuda.graph(self.graph, pool=None if other is None else other.graph.pool()):
            self.output = body(self.sae_in)

    def replay(self, sae_in: Tensor) -> TrainStepOutput:
        """Run the step on a batch."""
        self.sae_in.copy_(sae_in, non_blocking=True)
        self.graph.replay()
        for latents in (self.output.feature_acts, self.output.hidden_pre):
            if isinstance(latents, SparseActivations):
                latents.forget_writes()
        return self.output


def _on_side_stream(body: Any, sae_in: Tensor) -> TrainStepOutput:
    """Run a step on a stream of its own, as CUDA graphs ask for before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        output: TrainStepOutput = body(sae_in)
    torch.cuda.current_stream().wait_stream(stream)
    return output


def why_not(sae: Any, *, target_l0: float | None, archetypal: object | None) -> str | None:
    """Return why a run cannot take its steps in a CUDA graph, or None if it can."""
    if not hasattr(sae, "dead_capacity"):
        return f"{sae.cfg.architecture()} trains with SAELens's dense arithmetic"
    if sae.loss_terms:
        return f"the loss has the term {next(iter(sae.loss_terms))}"
    if target_l0 is not None:
        return "target_l0 steers the penalty by a number that the host reads in every step"
    if archetypal is not None:
        return "archetypal_points makes the decoder from other parameters"
    if sae.get_coefficients():
        return "the weights of its penalties change from step to step"
    return None


def has_hooks(sae: nn.Module) -> bool:
    """Return whether a hook on the SAE or on one of its parts is live."""
    return any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks
        for part in sae.modules()
    )
