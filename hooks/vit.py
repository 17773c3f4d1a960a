"""ViT, DeiT and the MAE encoder of Hugging Face transformers.

Dosovitskiy et al. (arXiv 2010.11929), Touvron et al. (arXiv 2012.12877), He et al.
(arXiv 2111.06377). TransformerLens has its own adapters for ViT and DeiT; these adapters offer
what the adapters of the other families offer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from vision_plugin.hooks._adapter import Dimensions, Paths, VisionArchitectureAdapter
from vision_plugin.hooks._components import EmbeddingBridge
from vision_plugin.hooks._restructure import tap_positions
from vision_plugin.hooks._transformers import image_result, linear_head, sizes
from vision_plugin.models import UnsupportedModelError
from vision_plugin.models.readout import Readout


class ViTAdapter(VisionArchitectureAdapter):
    """``ViTModel`` and ``ViTForImageClassification``."""

    n_cls = 1

    @classmethod
    def dimensions(cls, module: nn.Module) -> Dimensions:
        """Read the sizes from the configuration."""
        return sizes(module.config, n_cls=cls.n_cls)

    def paths(self, module: nn.Module) -> Paths:
        """Return the parts: the tower is the root, ``vit`` or ``deit``."""
        tower = prefix(module)
        return Paths(
            embed=f"{tower}embeddings",
            pos_embed=f"{tower}embeddings.position_tap",
            blocks=f"{tower}layers",
            ln1="layernorm_before",
            attn="attention",
            q="q_proj",
            k="k_proj",
            v="v_proj",
            o="o_proj",
            ln2="layernorm_after",
            mlp="mlp",
            mlp_in="fc1",
            mlp_out="fc2",
            ln_final=f"{tower}layernorm",
            unembed=linear_head(module, "classifier"),
        )

    def restructure(self, module: nn.Module) -> None:
        """Give the position table a hook, and keep the hidden state with the class scores."""
        tower = module.get_submodule(prefix(module).rstrip("."))
        tap_positions(tower.embeddings, "position_embeddings", resample="interpolate_pos_encoding")
        if classifier(module) is not None:
            module.forward = MethodType(_classify, module)

    def readout(self, model: Any) -> Readout:
        """Return the class token behind the last norm.

        Raises:
            UnsupportedModelError: a pooler with a tanh comes behind it.
        """
        tower = model.native.get_submodule(prefix(model.native).rstrip("."))
        if getattr(tower, "pooler", None) is not None:
            raise UnsupportedModelError(
                f"{model.cfg.model_name} ends in a pooler with a tanh, which cannot be taken "
                "apart; load it with add_pooling_layer=False"
            )
        return super().readout(model)

    def pooled(self, output: Any) -> Tensor:
        """Return the pooler's output, or the class token in a model without a pooler."""
        pooled: Tensor | None = output.get("pooler_output")
        return output.last_hidden_state[:, 0] if pooled is None else pooled


class DeiTAdapter(ViTAdapter):
    """``DeiTModel`` and its classifiers: a class token and a distillation token."""

    n_cls = 2

    def restructure(self, module: nn.Module) -> None:
        """Restructure as for ViT; a classifier with a teacher averages its two heads."""
        super().restructure(module)
        if hasattr(module, "distillation_classifier"):
            module.forward = MethodType(_classify_with_teacher, module)


class MAEEmbeddingBridge(EmbeddingBridge):
    """The embedding of a masked autoencoder, which also returns its mask."""

    def pack(self, residual: Tensor) -> Any:
        """Return the replacement without a mask and without an order to restore."""
        return residual, None, None


class MAEAdapter(ViTAdapter):
    """``ViTMAEModel``: the encoder runs on whole images, without random masking."""

    embedding = MAEEmbeddingBridge

    def restructure(self, module: nn.Module) -> None:
        """Give the position table a hook, and keep all patches in order."""
        super().restructure(module)
        module.config.mask_ratio = 0.0
        module.native_forward = module.forward
        module.forward = MethodType(_forward_unmasked(self.tower_dimensions), module)

    def native_forward(self, module: nn.Module, pixels: Tensor) -> Any:
        """Run the encoder on whole images, whatever its configuration says about masking."""
        order = _order(pixels, self.tower_dimensions)
        with _unmasked(module.config):
            return module(pixel_values=pixels, noise=order)


def prefix(module: nn.Module) -> str:
    """Return the path of the tower, with a dot at the end."""
    return next((f"{name}." for name in ("vit", "deit") if hasattr(module, name)), "")


def classifier(module: nn.Module) -> nn.Module | None:
    """Return the classification head, or the first of two."""
    heads = [getattr(module, name, None) for name in ("classifier", "cls_classifier")]
    return next((head for head in heads if head is not None), None)


def _classify(self: Any, pixel_values: Tensor, **kwargs: Any) -> ImageClassifierOutput:
    """Classify the class token, as the native head does."""
    tower = self.get_submodule(prefix(self).rstrip("."))
    output = tower(pixel_values, **kwargs)
    pooled = output.last_hidden_state[:, 0, :]
    return image_result(self.classifier(pooled), output.last_hidden_state, pooled)


def _classify_with_teacher(self: Any, pixel_values: Tensor, **kwargs: Any) -> ImageClassifierOutput:
    output = self.deit(pixel_values, **kwargs)
    hidden = output.last_hidden_state
    scores = self.cls_classifier(hidden[:, 0, :])
    distilled = self.distillation_classifier(hidden[:, 1, :])
    return image_result((scores + distilled) / 2, hidden, hidden[:, 0, :])


def _order(pixels: Tensor, dims: Dimensions) -> Tensor:
    """Return noise whose order keeps the patches in place."""
    height, width = pixels.shape[-2:]
    n_patches = dims.layout((height, width)).n_patches
    order = torch.arange(n_patches, device=pixels.device, dtype=torch.float32)
    return order.expand(len(pixels), n_patches)


def _forward_unmasked(dims: Dimensions) -> Any:
    def forward(self: Any, pixel_values: Tensor, **kwargs: Any) -> Any:
        return self.native_forward(
            pixel_values=pixel_values, noise=_order(pixel_values, dims), **kwargs
        )

    return forward


@contextmanager
def _unmasked(config: Any) -> Iterator[None]:
    ratio, config.mask_ratio = config.mask_ratio, 0.0
    try:
        yield
    finally:
        config.mask_ratio = ratio
