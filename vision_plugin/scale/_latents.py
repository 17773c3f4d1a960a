"""One SAE over several processes by its latents: each holds a slice of the encoder and decoder."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens import TrainingSAE
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE, act_times_W_dec
from torch import Tensor, nn
from torch import distributed as dist

from vision_plugin.sae import SteppedTrainer
from vision_plugin.scale._counting import CountingTrainer
from vision_plugin.scale._select import select
from vision_plugin.scale._team import Lanes

_CUT_ALONG = {"W_enc": 1, "W_dec": 0, "b_enc": 0}
"""Weights that are cut, and the dimension of the latents in each; the others are whole."""


class LatentTeam(Lanes):
    """The processes that hold the slices of one SAE, for a training session.

    Args:
        device: Device of this process's slice; the whole SAE, which is made at the beginning and
            for each checkpoint, lies in the host's memory.

    Raises:
        ValueError: the number of processes is no power of two.

    Examples:
        >>> vp.scale.LatentTeam().leads
        True
    """

    def __init__(self, device: str = "cpu") -> None:
        together = dist.is_available() and dist.is_initialized()
        super().__init__(dist.get_world_size() if together else 1)
        self.device = device

    def identity(self) -> dict[str, Any]:
        """Return what decides the result; any number of processes may continue a checkpoint."""
        return {"split": "latents"}

    def trainer(self, **settings: Any) -> SteppedTrainer:
        """Return a trainer of this process's slice."""
        return LatentTrainer(team=self, **settings)


class LatentTrainer(CountingTrainer):
    """SAELens's trainer of a TopK or BatchTopK SAE, of which each process has some latents.

    Every process reads the whole batch and encodes it by its own latents. The largest are selected
    among all, exactly, AuxK's too; the reconstructions of the slices are added up. ``sae`` is the
    whole SAE, up to date after :meth:`complete`.

    Args:
        team: The processes.
        **settings: Arguments of ``SteppedTrainer``.

    Raises:
        ValueError: the SAE is of another kind, or its latents cannot be cut into equal slices.
    """

    part: Any = None
    """This process's slice of the SAE, from the first step on."""

    def __init__(self, *, team: LatentTeam, **settings: Any) -> None:
        super().__init__(team=team, **settings)
        self.place, cfg = torch.device(team.device), self.sae.cfg
        if type(self.sae) not in (TopKTrainingSAE, BatchTopKTrainingSAE) or self.archetypal:
            raise ValueError(
                f"an SAE of architecture {cfg.architecture()} cannot be split by latents: use topk "
                "or batchtopk with dense=True, or split it in lanes"
            )
        if cfg.d_sae % team.size:
            raise ValueError(
                f"d_sae={cfg.d_sae} cannot be cut into {team.size} equal slices: use a multiple"
            )
        width = cfg.d_sae // team.size
        self.own = slice(team.rank * width, (team.rank + 1) * width)

    def step(self, batch: Tensor) -> TrainStepOutput:
        """Run SAELens's step on this process's latents; bring ``sae`` up to date after the last."""
        if self.part is None:
            self._cut()
        output = super().step(batch)
        if self.n_training_samples >= self.cfg.total_training_samples:
            self.complete()
        return output

    def named_parameters(self) -> dict[str, Tensor]:
        """Return the parameters that the optimiser moves, by name."""
        return super().named_parameters() if self.part is None else {**self._parameters()}

    @torch.no_grad()
    def complete(self) -> None:
        """Bring the weights of all processes into ``sae``; all of them call this."""
        if self.part is None:
            return
        for name, tensor in self.sae.state_dict().items():
            tensor.copy_(self._joined(name, self.part.state_dict()[name]))

    def state(self) -> dict[str, Any]:
        """Return the state of the whole SAE, as one process would; all processes call this."""
        self.complete()
        found = super().state()
        if self.part is not None:
            found["optimizer"] = {
                name: {key: self._joined(name, value) for key, value in state.items()}
                for name, state in found["optimizer"].items()
            }
        return found

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the state of the whole SAE; the slices are cut anew before the next step."""
        assert self.part is None
        super().load_state(state)

    def _parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.part.named_parameters())

    @torch.no_grad()
    def _cut(self) -> None:
        """Make this process's slice of the SAE, and let the optimiser move that instead."""
        sizes = {"d_sae": self.own.stop - self.own.start, "device": str(self.place)}
        with torch.random.fork_rng():
            part: Any = TrainingSAE.from_dict({**self.sae.cfg.to_dict(), **sizes})
        for name, tensor in part.state_dict().items():
            tensor.copy_(self._sliced(name, self.sae.state_dict()[name]))
        whole = {parameter: name for name, parameter in self.sae.named_parameters()}
        of_part, optimizer = dict(part.named_parameters()), self.optimizer
        states = {
            of_part[whole[parameter]]: {
                key: self._sliced(whole[parameter], value).clone() for key, value in state.items()
            }
            for parameter, state in optimizer.state.items()
        }
        for group in optimizer.param_groups:
            group["params"] = [of_part[whole[parameter]] for parameter in group["params"]]
        optimizer.state.clear()
        optimizer.state.update(states)
        self.part = part

    def _sliced(self, name: str, tensor: Tensor) -> Tensor:
        if name not in _CUT_ALONG or not tensor.ndim:  # an optimiser counts its steps
            return tensor
        n_latents = self.own.stop - self.own.start
        return tensor.narrow(_CUT_ALONG[name], self.own.start, n_latents).to(self.place)

    def _joined(self, name: str, tensor: Tensor) -> Tensor:
        if name not in _CUT_ALONG or not tensor.ndim:
            return tensor
        return torch.cat(self.team.gather(tensor), dim=_CUT_ALONG[name]).to(self.sae.device)

    def _train_step(self, sae: Any, sae_in: Tensor) -> TrainStepOutput:
        del sae
        self.part.train()
        with self.autocast_if_enabled:
            output = self._forward(sae_in.to(self.place))
        fired = output.feature_acts.bool().sum(0)
        self.note(torch.cat(self.team.gather(fired)).to(self.act_freq_scores.device))
        if isinstance(self.part, BatchTopKTrainingSAE):
            self._move_threshold(output.feature_acts.detach())
        output.loss.backward()
        self._clip()
        self._schedule()
        return output

    def _forward(self, x: Float[Tensor, "rows d_in"]) -> TrainStepOutput:
        """Return losses of the whole SAE, and this process's latents."""
        part: Any = self.part
        sae_in = _Shared.apply(part.process_sae_in(x), self.team)
        before = sae_in @ part.W_enc + part.b_enc
        if part.cfg.rescale_acts_by_decoder_norm:
            before = before * part.W_dec.norm(dim=-1)
        latents = before.relu() * self._active(before)
        out = self._decoded(latents) + part.b_dec
        losses = {"mse_loss": (out - x).pow(2).sum(-1).mean()}
        losses["auxiliary_reconstruction_loss"] = self._auxiliary(x - out.detach(), before)
        return TrainStepOutput(
            sae_in=x,
            sae_out=out,
            feature_acts=latents,
            hidden_pre=before,
            loss=losses["mse_loss"] + losses["auxiliary_reconstruction_loss"],
            losses=losses,
        )

    def _active(self, before: Float[Tensor, "rows width"]) -> Bool[Tensor, "rows width"]:
        if isinstance(self.part, BatchTopKTrainingSAE):
            return select(self.team, [before.relu()], int(self.part.cfg.k * len(before)))[0]
        return largest_of_rows(self.team, before, int(self.part.cfg.k))

    def _decoded(self, latents: Float[Tensor, "rows width"]) -> Float[Tensor, "rows d_in"]:
        rescaled = self.part.cfg.rescale_acts_by_decoder_norm
        found: Tensor = _Summed.apply(
            act_times_W_dec(latents, self.part.W_dec, rescaled), self.team
        )
        return found

    def _auxiliary(self, residual: Tensor, before: Tensor) -> Tensor:
        """Return AuxK's loss: the largest dead latents predict what the others leave over.

        Source: Gao et al., "Scaling and evaluating sparse autoencoders" (2024), appendix A.2, as
        SAELens computes it.
        """
        dead = self.dead_neurons
        n_dead, k = int(dead.sum()), residual.shape[-1] // 2
        if not n_dead:
            return residual.new_tensor(0.0)
        own = dead[self.own].to(before.device)
        masked = torch.where(own[None], before.detach(), -torch.inf)
        kept = largest_of_rows(self.team, masked, min(k, n_dead))
        found = self._decoded(torch.where(kept, before, 0.0))
        loss: Tensor = (found - residual).pow(2).sum(-1).mean()
        return loss * (float(self.part.cfg.aux_loss_coefficient) * min(n_dead / k, 1.0))

    def _move_threshold(self, latents: Tensor) -> None:
        """Move BatchTopK's threshold towards the least positive latent of all processes."""
        positive = latents[latents > 0]
        own = positive.min().double() if len(positive) else torch.tensor(torch.inf)
        least = torch.stack(self.team.gather(own.reshape(()).double())).min()
        found = torch.zeros_like(least) if least == torch.inf else least
        self.part.update_topk_threshold(found.reshape(1).to(self.place))

    @torch.no_grad()
    def _clip(self) -> None:
        """Scale the gradients of all processes so that their common norm is at most 1."""
        squares = torch.zeros((), dtype=torch.float64, device=self.place)
        for name, parameter in self._parameters().items():
            if parameter.grad is not None and (name in _CUT_ALONG or self.team.leads):
                squares += parameter.grad.double().pow(2).sum()
        norm = torch.stack(self.team.gather(squares)).sum().sqrt()
        scale = (1 / (norm + 1e-6)).clamp(max=1.0)
        for parameter in self._parameters().values():
            if parameter.grad is not None:
                parameter.grad.mul_(scale.to(parameter))


@torch.no_grad()
def largest_of_rows(
    team: Lanes, values: Float[Tensor, "rows width"], k: int
) -> Bool[Tensor, "rows width"]:
    """Return which of this process's values are among the k largest of each row of all processes.

    Of equal values the first are taken, in the order of the processes and of their latents.

    Args:
        team: The processes; together they hold the rows, cut along the latents.
        values: This process's slice of each row.
        k: How many values to take per row, at most the width of all slices.
    """
    own = values.topk(min(k, values.shape[1]), dim=-1).values
    parts = team.gather(own)
    together = torch.cat(parts, dim=-1)
    cut = together.topk(k, dim=-1).values[:, -1:]
    wanted = k - (together > cut).sum(-1, keepdim=True)
    before = torch.zeros_like(wanted)
    for part in parts[: team.rank]:
        before += (part == cut).sum(-1, keepdim=True)
    equal = values == cut
    return (values > cut) | (equal & (equal.cumsum(-1) + before <= wanted))


class _Shared(torch.autograd.Function):
    """What every process has: its gradient is the sum over the processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Lanes) -> Tensor:
        ctx.team = team
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _sum(ctx.team, gradients[0]), None


class _Summed(torch.autograd.Function):
    """The sum over the processes, which every process has: the gradient goes to each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Lanes) -> Tensor:
        return _sum(team, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], None


def _sum(team: Lanes, tensor: Tensor) -> Tensor:
    """Return the sum over the processes along the tree: all of them get the same bits."""
    found = tensor.detach().clone()
    team.add_branches([found])
    return found
