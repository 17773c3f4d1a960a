"""DINOv3 of Hugging Face transformers: register tokens and rotary positions.

Siméoni et al., DINOv3 (arXiv 2508.10104).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.dinov3_vit.modeling_dinov3_vit import rotate_half

from vision_plugin.hooks._adapter import Dimensions, Paths, VisionArchitectureAdapter
from vision_plugin.hooks._components import VisionAttentionBridge
from vision_plugin.hooks._transformers import sizes


class DINOv3AttentionBridge(VisionAttentionBridge):
    """Attention that rotates queries and keys by the place of the patch."""

    def project(
        self, hidden: Tensor, *, position_embeddings: tuple[Tensor, Tensor], **kwargs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values; class token and registers are not rotated."""
        q, k, v = super().project(hidden, **kwargs)
        cos, sin = position_embeddings
        n_prefix = hidden.shape[1] - sin.shape[-2]

        def rotation(x: Tensor) -> Tensor:
            patches = x[:, :, n_prefix:]
            turned = patches * cos + rotate_half(patches) * sin
            return torch.cat((x[:, :, :n_prefix], turned), dim=-2)

        return (*self.rotate(q, k, rotation), v)


class DINOv3Adapter(VisionArchitectureAdapter):
    """``DINOv3ViTModel``."""

    attention = DINOv3AttentionBridge

    @classmethod
    def dimensions(cls, module: nn.Module) -> Dimensions:
        """Read the sizes from the configuration."""
        return sizes(
            module.config,
            n_registers=module.config.num_register_tokens,
            any_size=True,
            rotary=True,
        )

    def paths(self, module: nn.Module) -> Paths:
        """Return the parts: no position table, and LayerScale after the attention and the MLP."""
        gated = module.config.use_gated_mlp
        return Paths(
            embed="embeddings",
            blocks="model.layer",
            ln1="norm1",
            attn="attention",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="o_proj",
            ln1_post="layer_scale1",
            ln2="norm2",
            mlp="mlp",
            mlp_in="up_proj",
            mlp_gate="gate_proj" if gated else None,
            mlp_out="down_proj",
            ln2_post="layer_scale2",
            ln_final="norm",
        )
