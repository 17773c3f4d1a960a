"""DINOv2 of Hugging Face transformers, with and without register tokens.

Oquab et al. (arXiv 2304.07193), Darcet et al., Vision Transformers Need Registers
(arXiv 2309.16588).
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from vision_plugin.hooks._adapter import Dimensions, Paths, VisionArchitectureAdapter
from vision_plugin.hooks._restructure import tap_positions
from vision_plugin.hooks._transformers import image_result, linear_head, sizes
from vision_plugin.models import UnsupportedModelError
from vision_plugin.models.readout import Readout


class Dinov2Adapter(VisionArchitectureAdapter):
    """``Dinov2Model``, ``Dinov2WithRegistersModel`` and their classifiers."""

    @classmethod
    def dimensions(cls, module: nn.Module) -> Dimensions:
        """Read the sizes from the configuration and the first MLP."""
        mlp = _tower(module).encoder.layer[0].mlp
        out = mlp.down_proj if hasattr(mlp, "down_proj") else mlp.fc2
        return sizes(
            module.config,
            d_mlp=out.in_features,
            n_registers=getattr(module.config, "num_register_tokens", 0),
            any_size=True,
        )

    def paths(self, module: nn.Module) -> Paths:
        """Return the parts, with LayerScale after the attention and after the MLP."""
        tower = _prefix(module)
        gated = hasattr(_tower(module).encoder.layer[0].mlp, "gate_proj")
        return Paths(
            embed=f"{tower}embeddings",
            pos_embed=f"{tower}embeddings.position_tap",
            blocks=f"{tower}encoder.layer",
            ln1="norm1",
            attn="attention",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="o_proj",
            ln1_post="layer_scale1",
            ln2="norm2",
            mlp="mlp",
            mlp_in="up_proj" if gated else "fc1",
            mlp_gate="gate_proj" if gated else None,
            mlp_out="down_proj" if gated else "fc2",
            ln2_post="layer_scale2",
            ln_final=f"{tower}layernorm",
            unembed=linear_head(module, "classifier"),
        )

    def readout(self, model: Any) -> Readout:
        """Return the class token behind the last norm.

        Raises:
            UnsupportedModelError: it is a classifier, whose vector is twice as wide.
        """
        if hasattr(model.native, "classifier"):
            raise UnsupportedModelError(
                f"{model.cfg.model_name} joins its class token and the mean of its patches to one "
                "vector, which is not taken apart; load its Dinov2Model"
            )
        return super().readout(model)

    def restructure(self, module: nn.Module) -> None:
        """Give the position table a hook, and keep the hidden state with the class scores."""
        embeddings: Any = _tower(module).embeddings
        tap_positions(embeddings, "position_embeddings", resample="interpolate_pos_encoding")
        if hasattr(module, "classifier"):
            module.forward = MethodType(_classify(self.tower_dimensions.n_registers), module)


def _prefix(module: nn.Module) -> str:
    names = ("dinov2", "dinov2_with_registers")
    return next((f"{name}." for name in names if hasattr(module, name)), "")


def _tower(module: nn.Module) -> Any:
    return module.get_submodule(_prefix(module).rstrip("."))


def _classify(n_registers: int) -> Any:
    def forward(self: Any, pixel_values: Tensor, **kwargs: Any) -> ImageClassifierOutput:
        """Classify class token and mean of the patches, as the native head does."""
        output = _tower(self)(pixel_values, **kwargs)
        hidden = output.last_hidden_state
        patches = hidden[:, 1 + n_registers :].mean(dim=1)
        pooled = torch.cat([hidden[:, 0], patches], dim=1)
        return image_result(self.classifier(pooled), hidden, pooled)

    return forward
