"""SigLIP of Hugging Face transformers, and the SigLIP 2 checkpoints of fixed resolution.

Zhai et al., Sigmoid Loss for Language Image Pre-Training (arXiv 2303.15343). There is no class
token: an attention pool over the patches makes the image embedding. The loss judges each pair of
image and text by itself, ``sigmoid(scale * cosine + bias)``; the model was not trained for a
softmax over texts.
"""

from __future__ import annotations

from dataclasses import replace
from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from vision_plugin.hooks._adapter import (
    Dimensions,
    Paths,
    VisionArchitectureAdapter,
    component,
)
from vision_plugin.hooks._transformers import image_result, linear_head, sizes
from vision_plugin.models.readout import AttentionPool, Readout


class SiglipVisionAdapter(VisionArchitectureAdapter):
    """``SiglipVisionModel``: the tower alone; its output is the last hidden state."""

    text_padding = "max_length"
    text_mask = False

    @classmethod
    def dimensions(cls, module: nn.Module) -> Dimensions:
        """Read the sizes from the (vision) configuration."""
        return sizes(getattr(module.config, "vision_config", module.config), n_cls=0)

    def paths(self, module: nn.Module) -> Paths:
        """Return the parts: the tower is the root or ``vision_model``."""
        tower = "vision_model." if hasattr(module, "vision_model") else ""
        return Paths(
            embed=f"{tower}embeddings",
            pos_embed=f"{tower}embeddings.position_embedding",
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
            unembed=linear_head(module, "classifier"),
        )

    def readout(self, model: Any) -> Readout:
        """Return the attention pool, or the mean of the patches in a tower without one."""
        norm = component(model, "ln_final")
        head = getattr(getattr(model.native, "vision_model", model.native), "head", None)
        if head is None:
            return Readout("all", norm)

        def mlp(pooled: Tensor) -> Tensor:
            hidden = pooled.to(head.probe.dtype)[:, None]
            output: Tensor = head.mlp(head.layernorm(hidden))[:, 0]
            return output

        pool = AttentionPool.of_torch(head.attention, head.probe[0, 0], mlp=mlp)
        return Readout("all", norm, pool)

    def pooled(self, output: Any) -> Tensor:
        """Return the attention pool's output, or the mean of the patches in a tower without one."""
        pooled: Tensor | None = output.get("pooler_output")
        return output.last_hidden_state.mean(dim=1) if pooled is None else pooled


class Idefics3VisionAdapter(SiglipVisionAdapter):
    """``Idefics3VisionTransformer``, the SigLIP tower in Idefics3 and SmolVLM, without a pool."""

    def paths(self, module: nn.Module) -> Paths:
        """Return the parts; the positions of an image depend on its own patches alone."""
        return replace(super().paths(module), pos_embed=None)


class SiglipAdapter(SiglipVisionAdapter):
    """``SiglipModel``: the output is the image embedding; scores are sigmoids."""

    has_joint_space = True
    score_function = "sigmoid"

    def restructure(self, module: nn.Module) -> None:
        """Make the forward take images alone."""
        module.forward = MethodType(_embed, module)

    def native_forward(self, module: nn.Module, pixels: Tensor) -> Any:
        """Run the vision tower without the text tower."""
        return module.get_image_features(pixel_values=pixels)

    def encode_text(self, module: nn.Module, **tokens: Tensor) -> Tensor:
        """Return text embeddings, not normalised, [batch, d_embed]."""
        output = module.get_text_features(**tokens)
        embedding: Tensor = output if isinstance(output, Tensor) else output.pooler_output
        return embedding


class SiglipClassifierAdapter(SiglipVisionAdapter):
    """``SiglipForImageClassification``: the output is the class scores."""

    def restructure(self, module: nn.Module) -> None:
        """Keep the hidden state with the class scores."""
        module.forward = MethodType(_classify, module)

    def readout(self, model: Any) -> Readout:
        """Return the mean of the patches, which the classifier reads."""
        return Readout("all", component(model, "ln_final"))


def _embed(self: Any, pixel_values: Tensor, **kwargs: Any) -> ImageClassifierOutput:
    output = self.vision_model(pixel_values=pixel_values, **kwargs)
    return image_result(output.pooler_output, output.last_hidden_state, output.pooler_output)


def _classify(self: Any, pixel_values: Tensor, **kwargs: Any) -> ImageClassifierOutput:
    """Classify the mean of the patches, as the native head does."""
    output = self.vision_model(pixel_values=pixel_values, **kwargs)
    pooled = output.last_hidden_state.mean(dim=1)
    return image_result(self.classifier(pooled), output.last_hidden_state, pooled)
