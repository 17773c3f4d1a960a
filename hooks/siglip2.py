"""SigLIP 2 in its NaFlex form: patches of images of any size and aspect ratio.

Tschannen et al., SigLIP 2 (arXiv 2502.14786). The native module takes images cut into patches,
with the shape of their grid and a mask of the padding. The bridge takes pixels, one size per
batch, and cuts them itself; ``model.token_layout((height, width))`` returns the grid.
(Checkpoints of fixed resolution say ``siglip`` in their configuration and are SigLIP modules.)
"""

from __future__ import annotations

from dataclasses import replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from vision_plugin.hooks._adapter import Dimensions, Paths
from vision_plugin.hooks._restructure import tap_positions
from vision_plugin.hooks._transformers import image_result, sizes
from vision_plugin.hooks.siglip import SiglipVisionAdapter


class Siglip2VisionAdapter(SiglipVisionAdapter):
    """``Siglip2VisionModel``: the tower alone; its output is the last hidden state."""

    @classmethod
    def dimensions(cls, module: nn.Module) -> Dimensions:
        """Read the sizes from the (vision) configuration; images are square by default."""
        config = getattr(module.config, "vision_config", module.config)
        side = int(config.num_patches**0.5) * config.patch_size
        return sizes(config, n_cls=0, image_size=(side, side), any_size=True)

    def paths(self, module: nn.Module) -> Paths:
        """Return SigLIP's parts, with a position table that is resampled to each image's grid."""
        paths = super().paths(module)
        tower = "vision_model." if hasattr(module, "vision_model") else ""
        return replace(paths, pos_embed=f"{tower}embeddings.position_tap")

    def restructure(self, module: nn.Module) -> None:
        """Make the forward take pixels, and give the resampled positions a hook."""
        tower = getattr(module, "vision_model", module)
        patch_size = self.tower_dimensions.patch_size[0]
        tap_positions(tower.embeddings, resample="resize_positional_embeddings")
        tower.__dict__["patch_size"] = patch_size
        tower.native_forward = tower.forward
        tower.forward = MethodType(_forward, tower)

    def native_forward(self, module: nn.Module, pixels: Tensor) -> Any:
        """Run the vision tower on pixels cut into patches."""
        tower = getattr(module, "vision_model", module)
        return tower(**cut(pixels, self.tower_dimensions.patch_size[0]))


class Siglip2Adapter(Siglip2VisionAdapter):
    """``Siglip2Model``: the output is the image embedding; scores are sigmoids."""

    has_joint_space = True
    score_function = "sigmoid"

    def restructure(self, module: nn.Module) -> None:
        """Make the forward take pixels alone."""
        super().restructure(module)
        module.forward = MethodType(_embed, module)

    def encode_text(self, module: nn.Module, **tokens: Tensor) -> Tensor:
        """Return text embeddings, not normalised, [batch, d_embed]."""
        output = module.get_text_features(**tokens)
        embedding: Tensor = output if isinstance(output, Tensor) else output.pooler_output
        return embedding


def cut(pixels: Tensor, patch_size: int) -> dict[str, Tensor]:
    """Return the native arguments for images of one size.

    Args:
        pixels: Pixels, [batch, channels, height, width].
        patch_size: Side of a patch in pixels; height and width must be multiples of it.

    Raises:
        ValueError: height or width is not a multiple of ``patch_size``.
    """
    batch, channels, height, width = pixels.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"images of {height} x {width} pixels do not divide into patches of {patch_size}: "
            "resize them to multiples of it"
        )
    rows, columns = height // patch_size, width // patch_size
    patches = pixels.reshape(batch, channels, rows, patch_size, columns, patch_size)
    patches = patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)
    shape = torch.tensor([[rows, columns]], device=pixels.device)
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(
            batch, rows * columns, dtype=torch.int32, device=pixels.device
        ),
        "spatial_shapes": shape.expand(batch, 2),
    }


def _forward(self: Any, pixel_values: Tensor, **kwargs: Any) -> Any:
    """Run the native forward on pixels, or on patches that the native processor cut."""
    if pixel_values.ndim == 4:
        return self.native_forward(**cut(pixel_values, self.patch_size), **kwargs)
    return self.native_forward(pixel_values=pixel_values, **kwargs)


def _embed(self: Any, pixel_values: Tensor, **kwargs: Any) -> ImageClassifierOutput:
    output = self.vision_model(pixel_values=pixel_values, **kwargs)
    return image_result(output.pooler_output, output.last_hidden_state, output.pooler_output)
