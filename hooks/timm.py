"""timm's ``VisionTransformer`` and ``Eva``: ViT, DeiT, DINOv2 and v3, SigLIP, EVA, EVA-02, PE."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from vision_plugin.hooks import _timm_tower
from vision_plugin.hooks._adapter import Dimensions, Paths, VisionArchitectureAdapter
from vision_plugin.hooks._timm_tower import TimmAttentionBridge
from vision_plugin.hooks._transformers import image_result
from vision_plugin.models import Source
from vision_plugin.models.readout import Readout


class TimmAdapter(VisionArchitectureAdapter):
    """A timm tower; its output is class scores if it has a head, else the pooled features."""

    attention = TimmAttentionBridge

    @classmethod
    def dimensions(cls, module: nn.Module) -> Dimensions:
        """Read the sizes from the module.

        Raises:
            UnsupportedModelError: a part is of an unsupported kind.
        """
        return _timm_tower.dimensions(module)

    def paths(self, module: nn.Module) -> Paths:
        """Return the parts after :meth:`restructure`."""
        return _timm_tower.paths(module)

    def restructure(self, module: nn.Module) -> None:
        """Give every hook a module, and keep what the forward drops."""
        _timm_tower.restructure(module)
        module.forward = MethodType(_forward, module)

    def readout(self, model: Any) -> Readout:
        """Return the pool and its norms, without the classifier."""
        return _timm_tower.readout(model.native)

    def native_forward(self, module: nn.Module, pixels: Tensor) -> Any:
        """Run timm's forward, which takes pixels by position."""
        return module(pixels)

    def native_path(self, path: str) -> str:
        """Return the path in the native module, whose blocks are not in a stack."""
        return _timm_tower.native_path(path)

    def find_sources(self, model: Any) -> dict[str, Source]:
        """Return the sources; Eva's scaled branches are read where they enter stochastic depth."""
        sources = super().find_sources(model)
        sources.update(scaled_sources(model.native))
        return sources


def scaled_sources(tower: Any, prefix: str = "") -> dict[str, Source]:
    """Return sources for the scaled branches of native blocks that hold bare vectors."""
    return {
        f"blocks.{index}.ln{number}_post.hook_out": Source(f"{prefix}{path}", "in")
        for index, number, path in _timm_tower.scale_places(tower)
    }


def _forward(self: Any, pixel_values: Tensor, **kwargs: Any) -> ImageClassifierOutput:
    features = self.forward_features(pixel_values, **kwargs)
    pooled = self.forward_head(features, pre_logits=True)
    # A distilled model averages two heads; all others end in one.
    single = not hasattr(self, "head_dist")
    logits = self.head(pooled) if single else self.forward_head(features)
    return image_result(logits, features, pooled)
