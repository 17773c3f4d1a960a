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
from vision_plugin.hooks._transformers import image_result, linear_head, sizes
from vision_plugin.models.readout import Readout


class CLIPVisionAdapter(VisionArchitectureAdapter):
    """``CLIPVisionModel``: the tower without a head; its output is the last hidden state."""

    @classmethod
    def dimensions(cls, module: nn.Module) -> Dimensions:
        """Read the sizes from the (vision) configuration."""
        return sizes(getattr(module.config, "vision_config", module.config))

    def paths(self, module: nn.Module) -> Paths:
        """Return the parts: the tower is the root or ``vision_model``."""
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
            unembed=linear_head(module, "visual_projection", "classifier"),
        )


class CLIPVisionProjectionAdapter(CLIPVisionAdapter):
    """``CLIPVisionModelWithProjection``: the output is the image embedding, as ``.logits``."""

    has_joint_space = True

    def restructure(self, module: nn.Module) -> None:
        """Expose the projected embedding as the forward's ``logits``."""
        module.forward = MethodType(_project, module)


class CLIPAdapter(CLIPVisionProjectionAdapter):
    """``CLIPModel``: the forward takes images; ``encode_text`` uses the text tower."""

    def native_forward(self, module: nn.Module, pixels: Tensor) -> Any:
        """Run the vision tower and its projection without the text tower."""
        return module.get_image_features(pixel_values=pixels)

    def encode_text(self, module: nn.Module, **tokens: Tensor) -> Tensor:
        """Return projected text embeddings, not normalised, [batch, d_embed]."""
        output = module.get_text_features(**tokens)
        embedding: Tensor = output if isinstance(output, Tensor) else output.pooler_output
        return embedding


class CLIPClassifierAdapter(CLIPVisionAdapter):
    """``CLIPForImageClassification``: the output is the class scores."""

    def restructure(self, module: nn.Module) -> None:
        """Keep the hidden state beside the class scores."""
        module.forward = MethodType(_classify, module)

    def readout(self, model: Any) -> Readout:
        """Return the mean of the patches, which the classifier reads without a normalisation."""
        del model
        return Readout("patch")


def _project(self: Any, pixel_values: Tensor, **kwargs: Any) -> ImageClassifierOutput:
    """Run the vision tower, pool and project; ``pooler_output`` is not projected."""
    output = self.vision_model(pixel_values=pixel_values, **kwargs)
    embedding = self.visual_projection(output.pooler_output)
    return image_result(embedding, output.last_hidden_state, output.pooler_output)


def _classify(self: Any, pixel_values: Tensor, **kwargs: Any) -> ImageClassifierOutput:
    """Classify the mean of the patches, as the native head does."""
    output = self.vision_model(pixel_values=pixel_values, **kwargs)
    pooled = output.last_hidden_state[:, 1:, :].mean(dim=1)
    return image_result(self.classifier(pooled), output.last_hidden_state, pooled)
