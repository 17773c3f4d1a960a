"""CLIP of Hugging Face transformers: vision tower alone, with projection, or the whole model.

Radford et al., Learning Transferable Visual Models From Natural Language Supervision
(arXiv 2103.00020).
"""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from vision_plugin.hooks._adapter import Dimensions, Paths, VisionArchitectureAdapter


class CLIPVisionAdapter(VisionArchitectureAdapter):
    """``CLIPVisionModel``: the tower without a head; its output is the last hidden state."""

    @classmethod
    def dimensions(cls, module: nn.Module) -> Dimensions:
        """Read the sizes from the (vision) configuration."""
        config = getattr(module.config, "vision_config", module.config)
        return Dimensions(
            d_model=config.hidden_size,
            n_heads=config.num_attention_heads,
            n_layers=config.num_hidden_layers,
            d_mlp=config.intermediate_size,
            image_size=(config.image_size, config.image_size),
            patch_size=(config.patch_size, config.patch_size),
            eps=config.layer_norm_eps,
            act_fn=config.hidden_act,
            n_channels=config.num_channels,
        )

    def paths(self, module: nn.Module) -> Paths:
        """The tower stands at the root or below ``vision_model``."""
        tower = "vision_model." if hasattr(module, "vision_model") else ""
        return Paths(
            embed=f"{tower}embeddings",
            pos_embed=f"{tower}embeddings.position_embedding",
            embed_ln=f"{tower}pre_layrnorm",
            blocks=f"{tower}encoder.layers",
            ln1="layer_norm1",
            attn="self_attn",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="out_proj",
            ln2="layer_norm2",
            mlp="mlp",
            mlp_in="fc1",
            mlp_out="fc2",
            ln_final=f"{tower}post_layernorm",
            unembed="visual_projection" if hasattr(module, "visual_projection") else None,
        )


class CLIPVisionProjectionAdapter(CLIPVisionAdapter):
    """``CLIPVisionModelWithProjection``: the output is the image embedding, as ``.logits``."""

    has_joint_space = True

    def prepare_model(self, hf_model: nn.Module) -> None:
        """Expose the projected embedding as the forward's ``logits``."""
        super().prepare_model(hf_model)
        hf_model.forward = MethodType(_image_forward, hf_model)


class CLIPAdapter(CLIPVisionProjectionAdapter):
    """``CLIPModel``: the forward takes pictures; the text tower answers ``encode_text``."""

    def native_forward(self, module: nn.Module, pixels: Tensor) -> Any:
        """Run the vision tower and its projection; the text tower has no part in it."""
        return module.get_image_features(pixel_values=pixels)

    def encode_text(self, module: nn.Module, **tokens: Tensor) -> Tensor:
        """Projected text embeddings, not normalised, [batch, d_embed]."""
        output = module.get_text_features(**tokens)
        embedding: Tensor = output if isinstance(output, Tensor) else output.pooler_output
        return embedding


def _image_forward(
    self: Any,
    pixel_values: Tensor,
    interpolate_pos_encoding: bool = False,
    **kwargs: Any,
) -> ImageClassifierOutput:
    """The vision tower, pooled and projected; ``pooler_output`` is not projected."""
    del kwargs
    output = self.vision_model(
        pixel_values=pixel_values, interpolate_pos_encoding=interpolate_pos_encoding
    )
    result = ImageClassifierOutput(logits=self.visual_projection(output.pooler_output))
    result["last_hidden_state"] = output.last_hidden_state
    result["pooler_output"] = output.pooler_output
    return result
