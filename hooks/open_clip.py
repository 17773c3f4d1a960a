"""open_clip: CLIP, its variants with other text towers, CoCa, and image towers alone.

The image tower is open_clip's own ``VisionTransformer`` or a timm model.
"""

from __future__ import annotations

from dataclasses import replace
from types import MethodType
from typing import Any, Literal

from torch import Tensor, nn
from transformers.modeling_outputs import ImageClassifierOutput

from vision_plugin.hooks import _open_clip_tower, _timm_tower
from vision_plugin.hooks._adapter import (
    Dimensions,
    Paths,
    VisionArchitectureAdapter,
    component,
)
from vision_plugin.hooks._components import VisionAttentionBridge
from vision_plugin.hooks._open_clip_tower import OpenClipAttentionBridge
from vision_plugin.hooks._timm_tower import TimmAttentionBridge
from vision_plugin.hooks._transformers import image_result
from vision_plugin.hooks.timm import scaled_sources
from vision_plugin.models import Source, UnsupportedModelError
from vision_plugin.models.readout import Readout


class OpenClipAdapter(VisionArchitectureAdapter):
    """Any open_clip model; the output is the image embedding in the joint space."""

    has_joint_space = True

    @classmethod
    def dimensions(cls, module: nn.Module) -> Dimensions:
        """Read the sizes from the image tower.

        Raises:
            UnsupportedModelError: the tower is no transformer, or a part is not supported.
        """
        tower, prefix = image_tower(module)
        if _timm_tower.is_timm_tower(tower):
            return _timm_tower.dimensions(tower)
        if hasattr(tower, "transformer") and hasattr(tower, "conv1"):
            return _open_clip_tower.dimensions(tower)
        raise UnsupportedModelError(
            f"its image tower ({prefix.rstrip('.') or 'itself'}) is a {type(tower).__name__}, "
            "which is no vision transformer with one residual stream"
        )

    def paths(self, module: nn.Module) -> Paths:
        """Return the parts after :meth:`restructure`."""
        tower, prefix = image_tower(module)
        if _timm_tower.is_timm_tower(tower):
            paths = _timm_tower.paths(tower, prefix)
            visual = getattr(module, "visual", module)
            has_projection = isinstance(getattr(visual.head, "proj", None), nn.Linear)
            above = prefix.removesuffix("trunk.")
            return replace(paths, unembed=f"{above}head.proj") if has_projection else paths
        return _open_clip_tower.paths(tower, prefix)

    def restructure(self, module: nn.Module) -> None:
        """Make the forward take images alone, and give every hook a module."""
        tower, _ = image_tower(module)
        if _timm_tower.is_timm_tower(tower):
            _timm_tower.restructure(tower)
            module.forward = MethodType(_timm_forward, module)
        else:
            _open_clip_tower.restructure(tower)
            module.forward = MethodType(_forward, module)
            self.has_joint_space = tower.proj is not None
        if getattr(module, "logit_bias", None) is not None:
            self.score_function: Literal["softmax", "sigmoid"] = "sigmoid"

    @property
    def attention(self) -> type[VisionAttentionBridge]:  # type: ignore[override]
        """Attention class of the image tower."""
        return TimmAttentionBridge if self.has_timm_tower else OpenClipAttentionBridge

    has_timm_tower: bool = False

    def prepare_model(self, hf_model: nn.Module) -> None:
        """Set what depends on the tower, then prepare as any family does."""
        self.has_timm_tower = _timm_tower.is_timm_tower(image_tower(hf_model)[0])
        super().prepare_model(hf_model)

    def encode_text(self, module: nn.Module, **tokens: Tensor) -> Tensor:
        """Return text embeddings, not normalised, [batch, d_embed]."""
        if not hasattr(module, "encode_text"):
            return super().encode_text(module, **tokens)
        embedding: Tensor = module.encode_text(tokens["text"], normalize=False)
        return embedding

    def readout(self, model: Any) -> Readout:
        """Return the pool, its norms and the joint projection."""
        projection = component(model, "unembed")
        projections = () if projection is None else (projection,)
        tower, _ = image_tower(model.native)
        if not self.has_timm_tower:
            return _open_clip_tower.readout(tower, projections)
        above = getattr(getattr(model.native, "visual", model.native), "head", None)
        maps = [part for head in (tower.head, above) for part in _linear_maps(head)]
        return _timm_tower.readout(tower, tuple(maps))

    # ------------------------------------------------------------------ harvesting

    def native_forward(self, module: nn.Module, pixels: Tensor) -> Any:
        """Run the image tower without the text tower."""
        visual: Any = getattr(module, "visual", module)
        return visual(pixels)

    def native_path(self, path: str) -> str:
        """Return the path before the moves that a timm tower needs."""
        return _timm_tower.native_path(path) if self.has_timm_tower else path

    def find_sources(self, model: Any) -> dict[str, Source]:
        """Return the sources, except tensors that native attention computes from bare weights."""
        sources = super().find_sources(model)
        tower, prefix = image_tower(model.native)
        if self.has_timm_tower:
            sources.update(scaled_sources(tower, prefix))
            return sources
        is_torch = isinstance(tower.transformer.resblocks[0].attn, nn.MultiheadAttention)
        hidden = (".attn.o.hook_in", ".attn.o.hook_out") if is_torch else ()
        return {name: source for name, source in sources.items() if not name.endswith(hidden)}


def image_tower(module: Any) -> tuple[Any, str]:
    """Return the transformer for images, and its path with a dot at the end."""
    tower, prefix = module, ""
    for name in ("visual", "trunk"):
        if hasattr(tower, name):
            tower, prefix = getattr(tower, name), f"{prefix}{name}."
    return tower, prefix


def _linear_maps(head: Any) -> list[nn.Module]:
    """Return the linear layers of a head that has nothing else in it."""
    parts = list(head.children()) if isinstance(head, nn.Sequential) else [head]
    silent = (nn.Dropout, nn.Identity, type(None))
    for part in parts:
        if not isinstance(part, (nn.Linear, *silent)):
            raise UnsupportedModelError(
                f"its head has a {type(part).__name__}, which is no linear map, so its embedding "
                "cannot be taken apart"
            )
    return [part for part in parts if isinstance(part, nn.Linear)]


def _forward(self: Any, pixel_values: Tensor) -> ImageClassifierOutput:
    tower, _ = image_tower(self)
    return image_result(*_open_clip_tower.project_and_pool(tower, pixel_values))


def _timm_forward(self: Any, pixel_values: Tensor) -> ImageClassifierOutput:
    visual = getattr(self, "visual", self)
    features = visual.trunk.forward_features(pixel_values)
    pooled = visual.trunk.forward_head(features, pre_logits=True)
    return image_result(visual.head(visual.trunk.head(pooled)), features, pooled)
