"""Training classes for transcoders, which SAELens can load but not train.

A transcoder reads the activations at one hook and predicts those at another, usually the input and
the output of an MLP. A training batch has both side by side, ``[batch, d_in + d_out]``. The saved
files hold SAELens's ``transcoder`` or ``skip_transcoder``.

Sources: Dunefsky, Chlenski, Nanda, "Transcoders Find Interpretable LLM Feature Circuits" (2024);
Paulo, Shabalin, Belrose, "Transcoders Beat Sparse Autoencoders for Interpretability" (2025) for the
skip connection, which starts at zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.sae import (
    SAEConfig,
    TrainCoefficientConfig,
    TrainingSAE,
    TrainingSAEConfig,
    TrainStepInput,
    TrainStepOutput,
)
from sae_lens.saes.transcoder import SkipTranscoderConfig, TranscoderConfig
from torch import Tensor, nn

from vision_plugin.sae._prefix import PREFIX, NamedAsStock

# SAELens ships no types, so its classes are Any to mypy; hence the ignores on subclassing below.


@dataclass
class TranscoderTrainingConfig(NamedAsStock, TrainingSAEConfig):  # type: ignore[misc]
    """A ReLU transcoder with an L1 penalty.

    Examples:
        >>> transcoder = vp.sae.TranscoderTrainingConfig(d_in=128, d_out=128, d_sae=256)
        >>> transcoder.get_inference_config_class().__name__
        'TranscoderConfig'
    """

    d_out: int = 0
    """Width of the activations to predict; 0 takes the width at ``hook_name_out``."""
    apply_b_dec_to_input: bool = False
    """This has to stay False, because the decoder bias belongs to the other hook."""
    l1_coefficient: float = 1.0
    """Weight of the penalty: the sum of the latents times the norms of their decoder directions."""
    l1_warm_up_steps: int = 0
    """Steps over which ``l1_coefficient`` rises from 0."""

    def __post_init__(self) -> None:
        if self.apply_b_dec_to_input:
            raise ValueError("apply_b_dec_to_input does not apply to transcoders: leave it off")
        if self.normalize_activations != "none":
            raise ValueError(
                f"normalize_activations={self.normalize_activations!r} does not apply to "
                "transcoders, whose two hooks differ in scale: leave it at 'none'"
            )
        super().__post_init__()

    @classmethod
    def architecture(cls) -> str:
        """Return the name in SAELens's registry of training classes."""
        return f"{PREFIX}transcoder"

    def get_inference_config_class(self) -> type[SAEConfig]:
        """Return the configuration of SAELens's ``transcoder``, which it is saved as."""
        config_class: type[SAEConfig] = TranscoderConfig
        return config_class


@dataclass
class SkipTranscoderTrainingConfig(TranscoderTrainingConfig):
    """A ReLU transcoder with an L1 penalty and a linear path past the latents.

    Examples:
        >>> transcoder = vp.sae.SkipTranscoderTrainingConfig(d_in=128, d_out=128, d_sae=256)
        >>> transcoder.get_inference_config_class().__name__
        'SkipTranscoderConfig'
    """

    @classmethod
    def architecture(cls) -> str:
        """Return the name in SAELens's registry of training classes."""
        return f"{PREFIX}skip_transcoder"

    def get_inference_config_class(self) -> type[SAEConfig]:
        """Return the configuration of SAELens's ``skip_transcoder``, which it is saved as."""
        config_class: type[SAEConfig] = SkipTranscoderConfig
        return config_class


class TranscoderTraining(TrainingSAE):  # type: ignore[misc]
    """Trains a transcoder. Saves as stock ``transcoder``."""

    def initialize_weights(self) -> None:
        """Set random weights; encoder and decoder start apart, because they face two hooks."""
        cfg = self.cfg
        options = {"dtype": self.dtype, "device": self.device}
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_out, **options))
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, **options))
        W_dec = nn.init.kaiming_uniform_(torch.empty(cfg.d_sae, cfg.d_out, **options))
        if cfg.decoder_init_norm is not None:
            W_dec *= cfg.decoder_init_norm / W_dec.norm(dim=-1, keepdim=True)
        W_enc = nn.init.kaiming_uniform_(torch.empty(cfg.d_sae, cfg.d_in, **options)).T
        self.W_dec, self.W_enc = nn.Parameter(W_dec), nn.Parameter(W_enc.contiguous())

    def get_coefficients(self) -> dict[str, float | TrainCoefficientConfig]:
        """Return the weight of the L1 penalty and its warm-up."""
        return {
            "l1": TrainCoefficientConfig(
                value=self.cfg.l1_coefficient, warm_up_steps=self.cfg.l1_warm_up_steps
            )
        }

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """Return the input as it is, without subtracting a bias."""
        processed: Tensor = self.hook_sae_input(sae_in.to(self.dtype))
        return processed

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latents and their values before the ReLU."""
        hidden_pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        return self.hook_sae_acts_post(self.activation_fn(hidden_pre)), hidden_pre

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Return the prediction of the second hook's activations, [..., d_out]."""
        decoded: Tensor = self.hook_sae_recons(feature_acts @ self.W_dec + self.b_dec)
        return decoded

    def calculate_aux_loss(
        self, step_input: TrainStepInput, feature_acts: Tensor, hidden_pre: Tensor, sae_out: Tensor
    ) -> dict[str, Tensor]:
        """Return the L1 penalty, averaged over the batch."""
        del hidden_pre, sae_out
        weighted = (feature_acts * self.W_dec.norm(dim=1)).sum(dim=-1).mean()
        return {"l1_loss": step_input.coefficients["l1"] * weighted}

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Return the losses of a training step, for a batch of input and target side by side."""
        x, target = step_input.sae_in.split([self.cfg.d_in, self.cfg.d_out], dim=-1)
        feature_acts, hidden_pre = self.encode_with_hidden_pre(x)
        out = self._predict(x, feature_acts)
        losses = {"mse_loss": self.mse_loss_fn(out, target).sum(dim=-1).mean()}
        losses |= self.calculate_aux_loss(step_input, feature_acts, hidden_pre, out)
        return TrainStepOutput(
            sae_in=target,  # SAELens measures explained variance against it
            sae_out=out,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            loss=torch.stack(list(losses.values())).sum(),
            losses=losses,
        )

    def _predict(self, x: Tensor, feature_acts: Tensor) -> Tensor:
        del x
        return self.decode(feature_acts)

    def forward(self, x: Tensor) -> Tensor:
        """Return the prediction from the first hook's activations, [..., d_out]."""
        return self._predict(x, self.encode(x))


class SkipTranscoderTraining(TranscoderTraining):
    """Trains a transcoder with a skip connection. Saves as stock ``skip_transcoder``."""

    def initialize_weights(self) -> None:
        """Set random weights as for a transcoder; the skip connection starts at zero."""
        super().initialize_weights()
        shape = (self.cfg.d_out, self.cfg.d_in)
        self.W_skip = nn.Parameter(torch.zeros(shape, dtype=self.dtype, device=self.device))

    def _predict(self, x: Tensor, feature_acts: Tensor) -> Tensor:
        return self.decode(feature_acts) + x.to(self.dtype) @ self.W_skip.T


CLASSES: tuple[tuple[Any, Any], ...] = (
    (TranscoderTraining, TranscoderTrainingConfig),
    (SkipTranscoderTraining, SkipTranscoderTrainingConfig),
)
