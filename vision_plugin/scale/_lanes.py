"""One SAE over several processes: SAELens's training step, cut into lanes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor, nn

from vision_plugin.sae import SteppedTrainer
from vision_plugin.scale._counting import CountingTrainer
from vision_plugin.scale._select import select
from vision_plugin.scale._team import Lanes

_MOST_LOSSES = 32
"""Losses of a step that are told: room for them that every process knows."""


class LaneTrainer(CountingTrainer):
    """SAELens's trainer, each of whose steps several processes share.

    Every process reads the same batch and computes its own lanes. Gradients are summed along the
    tree of the lanes, then clipped. BatchTopK selects within the whole batch; counters, thresholds
    and the penalty's weight see the whole batch. All processes end a step with the same weights.

    Args:
        team: The processes.
        **settings: Arguments of ``SteppedTrainer``.

    Raises:
        ValueError: the batch cannot be cut into equal lanes.
    """

    own_step = False

    def __init__(self, *, team: Lanes, **settings: Any) -> None:
        super().__init__(team=team, **settings)
        rows = self.cfg.train_batch_size_samples
        if rows % team.n_lanes:
            raise ValueError(
                f"train_batch_size_tokens={rows} cannot be cut into n_lanes={team.n_lanes} equal "
                "lanes: use a multiple of it"
            )

    def _train_step(self, sae: Any, sae_in: Tensor) -> Any:
        """Run one step; return the output of this process's last lane, with the batch's losses."""
        sae.train()
        team = self.team
        parts = sae_in.chunk(team.n_lanes)
        lanes = [parts[number] for number in team.own]
        step = _Step(self, sae)
        with self.autocast_if_enabled:
            encoded = step.encode(lanes) if isinstance(sae, BatchTopKTrainingSAE) else None
        for place, rows in enumerate(lanes):
            with self.autocast_if_enabled, _encoded(sae, encoded[place] if encoded else None):
                output = sae.training_forward_pass(self._input(rows))
            step.count(place, output)
            output.loss.backward()
            step.keep_gradients()
        step.add_up()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        self._schedule()
        return step.output or _nothing(sae, sae_in)

    def _input(self, rows: Tensor) -> TrainStepInput:
        return TrainStepInput(
            sae_in=rows,
            dead_neuron_mask=self.dead_neurons,
            coefficients=self.get_coefficients(),
            n_training_steps=self.n_training_steps,
            is_logging_step=self._is_logging_step(),
        )


class _Step:
    """One step in the making: the gradients, counts and losses of the lanes so far."""

    def __init__(self, trainer: LaneTrainer, sae: Any) -> None:
        self.trainer, self.sae, self.team = trainer, sae, trainer.team
        self.parameters = [p for p in sae.parameters() if p.requires_grad]
        self.branches: list[tuple[int, list[Tensor]]] = []
        self.fired = torch.zeros(int(sae.cfg.d_sae), dtype=torch.int64, device=sae.device)
        self.least = torch.zeros(self.team.n_lanes, dtype=torch.float64)
        self.losses = torch.zeros(_MOST_LOSSES, self.team.n_lanes, dtype=torch.float64)
        self.output: TrainStepOutput | None = None

    def encode(self, lanes: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return latents and pre-activations of BatchTopK lanes: the k largest of the batch."""
        whole, self.sae.activation_fn = self.sae.activation_fn, nn.ReLU()
        try:
            both = [self.sae.encode_with_hidden_pre(rows) for rows in lanes]
        finally:
            self.sae.activation_fn = whole
        k = int(self.sae.cfg.k * self.trainer.cfg.train_batch_size_samples)
        masks = select(self.team, [latents for latents, _ in both], k)
        kept = [(acts * mask, pre) for (acts, pre), mask in zip(both, masks, strict=True)]
        for number, (acts, _) in zip(self.team.own, kept, strict=True):
            positive = acts.detach()[acts.detach() > 0]
            self.least[number] = positive.min() if len(positive) else torch.inf
        return kept

    @torch.no_grad()
    def count(self, place: int, output: TrainStepOutput) -> None:
        """Count what fired in a lane, and note its losses."""
        self.output = output
        self.fired += output.feature_acts.bool().float().sum(0).long()
        for row, loss in enumerate([output.loss, *output.losses.values()][:_MOST_LOSSES]):
            self.losses[row, self.team.own[place]] = loss.detach()

    def keep_gradients(self) -> None:
        """Take the lane's gradients, and add up branches of the tree that are complete."""
        size, mine = 1, [_taken(parameter) for parameter in self.parameters]
        while self.branches and self.branches[-1][0] == size:
            _, before = self.branches.pop()
            mine = [first.add_(second) for first, second in zip(before, mine, strict=True)]
            size *= 2
        self.branches.append((size, mine))

    def add_up(self) -> None:
        """Give every process the gradients, counts and losses of the whole batch."""
        trainer, team = self.trainer, self.team
        own = [tensors for _, tensors in self.branches]
        gradients = own[0] if own else [torch.zeros_like(p) for p in self.parameters]
        team.add_branches(gradients)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.mul_(1 / team.n_lanes)
        fired = team.add_up(self.fired)
        trainer.note(fired)
        if isinstance(self.sae, BatchTopKTrainingSAE):
            self._move_threshold()
        losses = team.add_up(self.losses).mean(1)
        if self.output is not None:
            self.output.loss = losses[0].to(self.output.loss)
            for name, found in zip(self.output.losses, losses[1:], strict=False):
                self.output.losses[name] = found.to(self.output.loss)

    def _move_threshold(self) -> None:
        """Move the threshold towards the least positive latent of the batch, as SAELens does."""
        least = float(self.team.add_up(self.least).min())
        found = torch.tensor([least if least < torch.inf else 0.0], dtype=torch.float64)
        self.sae.update_topk_threshold(found.to(self.sae.device))


def _nothing(sae: Any, batch: Tensor) -> TrainStepOutput:
    """Return the output of a process that computes no lane."""
    none, latents = batch[:0], batch.new_zeros(0, int(sae.cfg.d_sae))
    loss = batch.new_zeros(())
    return TrainStepOutput(
        sae_in=none, sae_out=none, feature_acts=latents, hidden_pre=latents, loss=loss, losses={}
    )


def _taken(parameter: nn.Parameter) -> Tensor:
    found, parameter.grad = parameter.grad, None
    return torch.zeros_like(parameter) if found is None else found


@contextmanager
def _encoded(sae: Any, found: tuple[Tensor, Tensor] | None) -> Iterator[None]:
    """Let an SAE's forward pass take latents that were selected; its threshold stays."""
    if found is None:
        yield
        return
    sae.encode_with_hidden_pre = lambda x: found
    sae.update_topk_threshold = lambda acts: None
    try:
        yield
    finally:
        del sae.encode_with_hidden_pre, sae.update_topk_threshold


class LaneTeam(Lanes):
    """The processes that train one SAE, for a training session.

    Examples:
        >>> team = vp.scale.LaneTeam(n_lanes=8)  # without torchrun, this process alone
        >>> team.leads, team.n_lanes
        (True, 8)
    """

    def trainer(self, **settings: Any) -> SteppedTrainer:
        """Return a trainer whose steps the processes share."""
        return LaneTrainer(team=self, **settings)
