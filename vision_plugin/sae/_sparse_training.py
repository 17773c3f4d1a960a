"""SAELens's TopK, BatchTopK and Matryoshka training classes on the sparse kernel.

These classes inherit parameters, configuration, losses, statistics and saved files from SAELens,
and replace only the arithmetic of a training step. A step with a live hook on the latents, and
everything that is not a training step, runs SAELens's dense code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAEConfig, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from torch import Tensor, nn

from vision_plugin import kernels
from vision_plugin.kernels import SparseLatents

from ._prefix import PREFIX, NamedAsStock
from ._sparse_activations import SparseActivations
from ._sparse_auxiliary import (
    DeadLatents,
    auxiliary_loss,
    padded_places,
    rows_of,
    share_gradients,
)

# SAELens ships no types, so its classes are Any to mypy; hence the ignores on subclassing below.


@dataclass
class SparseTopKTrainingSAEConfig(NamedAsStock, TopKTrainingSAEConfig):  # type: ignore[misc]
    """SAELens's `TopKTrainingSAEConfig` for training on the sparse kernel."""

    @classmethod
    def architecture(cls) -> str:
        """Return the name in SAELens's registry of training classes."""
        return f"{PREFIX}topk"

    def get_inference_config_class(self) -> type[SAEConfig]:
        """Return the configuration of SAELens's ``topk``, which the SAE is saved as."""
        config_class: type[SAEConfig] = TopKSAEConfig
        return config_class


@dataclass
class SparseBatchTopKTrainingSAEConfig(NamedAsStock, BatchTopKTrainingSAEConfig):  # type: ignore[misc]
    """SAELens's `BatchTopKTrainingSAEConfig` for training on the sparse kernel."""

    @classmethod
    def architecture(cls) -> str:
        """Return the name in SAELens's registry of training classes."""
        return f"{PREFIX}batchtopk"

    def get_inference_config_class(self) -> type[SAEConfig]:
        """Return the configuration of SAELens's ``jumprelu``, which the SAE is saved as."""
        config_class: type[SAEConfig] = JumpReLUSAEConfig
        return config_class


@dataclass
class SparseMatryoshkaBatchTopKTrainingSAEConfig(
    NamedAsStock,
    MatryoshkaBatchTopKTrainingSAEConfig,  # type: ignore[misc]
):
    """SAELens's `MatryoshkaBatchTopKTrainingSAEConfig` for training on the sparse kernel."""

    @classmethod
    def architecture(cls) -> str:
        """Return the name in SAELens's registry of training classes."""
        return f"{PREFIX}matryoshka_batchtopk"

    def get_inference_config_class(self) -> type[SAEConfig]:
        """Return the configuration of SAELens's ``jumprelu``, which the SAE is saved as."""
        config_class: type[SAEConfig] = JumpReLUSAEConfig
        return config_class


class _SparseStep(TopKTrainingSAE):  # type: ignore[misc]
    """The sparse training step of the three classes; it comes before SAELens's class as a base."""

    W_enc: nn.Parameter

    dead_capacity: int | None = None
    """Number of rows for dead latents in a step whose shapes do not depend on the data; at least as
    many as are dead. None gathers as many as there are, for which the host has to count them."""

    def initialize_weights(self) -> None:
        """Set SAELens's initial weights; store W_enc latent-major (same shape, other strides)."""
        super().initialize_weights()
        self.loss_terms: dict[str, Callable[[Tensor, SparseLatents | Tensor], Tensor]] = {}
        in_host_layout: Tensor = self.W_enc.data
        self.W_enc = nn.Parameter(_latent_major(in_host_layout))

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """Save W_enc in SAELens's layout: safetensors refuses tensors that are not contiguous."""
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Store W_enc latent-major again; loading may keep the tensor with its strides."""
        super().process_state_dict_for_loading(state_dict)
        state_dict["W_enc"] = _latent_major(state_dict["W_enc"])

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Return the losses of a training step as SAELens defines them, from the sparse kernel.

        Activations are ``[batch, d_in]``, or have more axes before ``d_in``. ``feature_acts`` and
        ``hidden_pre`` of the output are `SparseActivations`, which act as dense tensors outside the
        autograd graph. ``hidden_pre`` holds the selected latents only.
        """
        if any(_is_live(hook) for hook in (self.hook_sae_acts_pre, self.hook_sae_acts_post)):
            return self._with_terms(super().training_forward_pass(step_input), step_input)
        shaped = self._sparse_input(step_input.sae_in)
        lead, x = shaped.shape[:-1], shaped.reshape(-1, shaped.shape[-1])
        scale = self.W_dec.detach().norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else None
        dead = self._dead_latents(step_input.dead_neuron_mask)
        W_enc, W_dec, shared = share_gradients(self.W_enc, self.W_dec, dead)
        latents = self._encode_sparse(x, W_enc, scale)
        reconstructions = dict(self._reconstruct(latents, W_dec, lead))
        sae_out = reconstructions[self.cfg.d_sae]
        losses = {"mse_loss": self._mean_squared_error(sae_out, step_input.sae_in)}
        auxiliary = sae_out.new_zeros(())
        for group, gradients in zip(dead, shared, strict=True):
            residual = (step_input.sae_in - reconstructions[group.width]).detach()
            auxiliary = auxiliary + self._loss_of_dead(x, scale, residual, group, gradients)
        losses["auxiliary_reconstruction_loss"] = self.cfg.aux_loss_coefficient * auxiliary
        for name, term in self.loss_terms.items():
            losses[name] = term(step_input.sae_in.reshape(x.shape), latents)
        for width, inner in list(reconstructions.items())[:-1]:
            losses[f"inner_mse_loss_{width}"] = self._mean_squared_error(inner, step_input.sae_in)
        reported = latents.detach()
        if scale is not None:
            reported = reported.with_values(reported.values * scale[reported.indices.long()])
        output = TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out,
            feature_acts=_reported(reported, lead),
            hidden_pre=_reported(reported, lead),
            loss=sum(losses.values(), start=sae_out.new_zeros(())),
            losses=losses,
        )
        self._after_step(reported.values, output)
        return output

    def _with_terms(self, output: TrainStepOutput, step_input: TrainStepInput) -> TrainStepOutput:
        """Add the terms to the losses of SAELens's own step, which hooks on the latents ask for."""
        x = step_input.sae_in.reshape(-1, step_input.sae_in.shape[-1])
        latents = output.feature_acts.reshape(-1, self.cfg.d_sae)
        for name, term in self.loss_terms.items():
            output.losses[name] = term(x, latents)
            output.loss = output.loss + output.losses[name]
        return output

    def _sparse_input(self, sae_in: Tensor) -> Tensor:
        """Do what SAELens's `process_sae_in` does, except subtract b_dec: the kernel does that."""
        x = self.hook_sae_input(self.reshape_fn_in(sae_in.to(self.dtype)))
        normalised: Tensor = self.run_time_activation_norm_fn_in(x)
        return normalised

    @property
    def _b_in(self) -> Tensor | None:
        return self.b_dec if self.cfg.apply_b_dec_to_input else None

    def _encode_sparse(self, x: Tensor, W_enc: Tensor, scale: Tensor | None) -> SparseLatents:
        values, indices = kernels.topk_encode(
            x, W_enc, self.b_enc, self.cfg.k, b_in=self._b_in, scale=scale
        )
        return SparseLatents.from_topk(values, indices, d_sae=self.cfg.d_sae, trusted=True)

    def _reconstruct(
        self, latents: SparseLatents, W_dec: Tensor, lead: torch.Size
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield each nested width and its reconstruction, ascending."""
        decoded = kernels.csr_decode(latents, W_dec, self.b_dec)
        yield (
            self.cfg.d_sae,
            self._output(self.hook_sae_recons(decoded.view(*lead, decoded.shape[-1]))),
        )

    def _output(self, reconstruction: Tensor) -> Tensor:
        out = self.run_time_activation_norm_fn_out(reconstruction)
        reshaped: Tensor = self.reshape_fn_out(out, self.d_head)
        return reshaped

    def _mean_squared_error(
        self, reconstruction: Float[Tensor, "... d_in"], target: Float[Tensor, "... d_in"]
    ) -> Float[Tensor, ""]:
        error: Tensor = self.mse_loss_fn(reconstruction, target).sum(dim=-1).mean()
        return error

    def _dead_latents(self, dead: Bool[Tensor, " d_sae"] | None) -> list[DeadLatents]:
        """Return the dead latents, by the reconstruction whose error they learn."""
        found = self._dead_within(dead, [self.cfg.d_sae])
        if found and self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
            raise ValueError(
                "TopK auxiliary loss does not support activation normalization "
                f"(normalize_activations={self.cfg.normalize_activations!r}): the reconstruction "
                "would be in normalized space and the residual in the original one. "
                "Use 'none' or 'expected_average_only_in'."
            )
        return found

    def _dead_within(
        self, dead: Bool[Tensor, " d_sae"] | None, widths: list[int]
    ) -> list[DeadLatents]:
        """Return the dead latents between each width and the one before it, if there are any."""
        found: list[DeadLatents] = []
        if dead is None or self.dead_capacity == 0:
            return found
        for first, width in pairwise([0, *widths]):
            part = dead[first:width]
            if self.dead_capacity is None:
                places, alive = part.nonzero().squeeze(1), None
            else:
                places, alive = padded_places(part, min(self.dead_capacity, len(part)))
            if len(places):
                found.append(DeadLatents(width, places + first, alive))
        return found

    def _loss_of_dead(
        self,
        x: Float[Tensor, "batch d_in"],
        scale: Float[Tensor, " d_sae"] | None,
        residual: Float[Tensor, "... width_out"],
        dead: DeadLatents,
        gradients: tuple[Tensor, Tensor],
    ) -> Float[Tensor, ""]:
        """Return SAELens's AuxK loss: dead latents reconstruct the error of the others."""
        return auxiliary_loss(
            x,
            residual,
            wanted=residual.shape[-1] // 2,
            W_enc=rows_of(self.W_enc.t(), dead.places, gradients[0]).t(),
            b_enc=self.b_enc.index_select(0, dead.places),
            W_dec=rows_of(self.W_dec, dead.places, gradients[1]),
            b_in=self._b_in,
            scale=None if scale is None else scale.index_select(0, dead.places),
            alive=dead.alive,
        )

    def _after_step(self, values: Tensor, output: TrainStepOutput) -> None:
        """Update what an architecture tracks from step to step."""


class SparseTopKTrainingSAE(_SparseStep, TopKTrainingSAE):  # type: ignore[misc]
    """SAELens's `TopKTrainingSAE` on the sparse kernel. Saves as stock ``topk``."""


class SparseBatchTopKTrainingSAE(_SparseStep, BatchTopKTrainingSAE):  # type: ignore[misc]
    """SAELens's `BatchTopKTrainingSAE` on the sparse kernel. Saves as stock ``jumprelu``."""

    topk_threshold: Tensor

    def _encode_sparse(self, x: Tensor, W_enc: Tensor, scale: Tensor | None) -> SparseLatents:
        return kernels.batch_topk_encode(
            x,
            W_enc,
            self.b_enc,
            self.cfg.k,
            b_in=self._b_in,
            scale=scale,
            padded=self.dead_capacity is not None,
        )

    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: Tensor) -> None:
        """SAELens's moving average, without a branch that waits for the device."""
        rate: float = self.cfg.topk_threshold_lr
        before: Tensor = self.topk_threshold
        # A last infinity, since there may be no entries.
        positive = torch.where(acts_topk > 0, acts_topk, torch.inf).flatten()
        lowest = torch.cat([positive, positive.new_full((1,), torch.inf)]).amin().to(before.dtype)
        after = (1 - rate) * before + rate * lowest
        before.copy_(torch.where((acts_topk > 0).any(), after, before))

    @torch.no_grad()
    def _after_step(self, values: Tensor, output: TrainStepOutput) -> None:
        # The threshold's rule reads only the positive entries, and ``values`` has all of them.
        self.update_topk_threshold(values)
        output.metrics["topk_threshold"] = self.topk_threshold


class SparseMatryoshkaBatchTopKTrainingSAE(
    SparseBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAE,  # type: ignore[misc]
):
    """SAELens's `MatryoshkaBatchTopKTrainingSAE` on the kernel. Saves as stock ``jumprelu``."""

    def _reconstruct(
        self, latents: SparseLatents, W_dec: Tensor, lead: torch.Size
    ) -> Iterator[tuple[int, Tensor]]:
        widths = self.cfg.matryoshka_widths
        decoded = kernels.matryoshka_decode(latents, W_dec, self.b_dec, widths)
        levels = decoded.view(len(widths), *lead, decoded.shape[-1]).unbind(0)
        for width, level in zip(widths[:-1], levels[:-1], strict=True):
            yield width, self._output(level)
        yield widths[-1], self._output(self.hook_sae_recons(levels[-1]))

    def _dead_latents(self, dead: Bool[Tensor, " d_sae"] | None) -> list[DeadLatents]:
        if not self.cfg.use_matryoshka_aux_loss:
            return super()._dead_latents(dead)
        return self._dead_within(dead, self.cfg.matryoshka_widths)


def _reported(latents: SparseLatents, lead: torch.Size) -> Tensor:
    if torch.compiler.is_compiling():  # which cannot trace the making of such a tensor
        return latents.to_dense().view(*lead, latents.d_sae)
    return SparseActivations(latents, lead)


def _latent_major(W_enc: Float[Tensor, "d_in d_sae"]) -> Float[Tensor, "d_in d_sae"]:
    return W_enc.t().contiguous().t()


def _is_live(hook: nn.Module) -> bool:
    return bool(hook._forward_hooks or hook._forward_pre_hooks or hook._backward_hooks)
