"""The vision transformers that the matrix runs over, made small and with random weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
VISION = {**TOWER, "image_size": 32, "patch_size": 8}
TEXT = {**TOWER, "vocab_size": 99, "max_position_embeddings": 16}
TIMM_MODULES = ("vision_transformer", "eva", "deit", "vision_transformer_hybrid")
"""timm's files whose architectures are ``VisionTransformer`` or ``Eva``."""


@dataclass(frozen=True)
class Case:
    """One model of the matrix."""

    library: str
    name: str
    build: Callable[[], nn.Module]
    native: Callable[[nn.Module, Tensor], Tensor]
    image: tuple[int, int] | None = None
    """Height and width of the images; None for the model's own."""
    tolerance: float = 0.0
    """How far the output may be off once everything is hooked."""

    @property
    def label(self) -> str:
        """Library and name."""
        return f"{self.library}: {self.name}"


def transformers_cases() -> list[Case]:
    """Every family of transformers, in the forms that people load."""
    import transformers as t

    dino = {k: v for k, v in VISION.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
    naflex = {k: v for k, v in VISION.items() if k != "image_size"} | {"num_patches": 16}
    clip = {"vision_config": VISION, "text_config": TEXT, "projection_dim": 16}
    siglip = {"vision_config": VISION, "text_config": {**TEXT, "projection_size": 32}}
    siglip2 = {"vision_config": naflex, "text_config": {**TEXT, "projection_size": 32}}
    projected = {**VISION, "projection_dim": 16}
    made: list[tuple[str, Callable[[], nn.Module], Callable[..., Tensor]]] = [
        ("CLIPModel", lambda: t.CLIPModel(t.CLIPConfig(**clip)), _image_features),
        ("CLIPVisionModel", lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**VISION)), _hidden),
        (
            "CLIPVisionModelWithProjection",
            lambda: t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**projected)),
            lambda m, x: m(pixel_values=x).image_embeds,
        ),
        (
            "CLIPForImageClassification",
            lambda: t.CLIPForImageClassification(t.CLIPConfig(**clip)),
            _logits,
        ),
        ("SiglipModel", lambda: t.SiglipModel(t.SiglipConfig(**siglip)), _image_features),
        ("SiglipVisionModel", lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**VISION)), _hidden),
        (
            "SiglipForImageClassification",
            lambda: t.SiglipForImageClassification(t.SiglipConfig(**siglip)),
            _logits,
        ),
        ("Siglip2Model", lambda: t.Siglip2Model(t.Siglip2Config(**siglip2)), _naflex_features),
        (
            "Siglip2VisionModel",
            lambda: t.Siglip2VisionModel(t.Siglip2VisionConfig(**naflex)),
            _naflex_hidden,
        ),
        ("Dinov2Model", lambda: t.Dinov2Model(t.Dinov2Config(**dino)), _hidden),
        (
            "Dinov2Model (gated MLP)",
            lambda: t.Dinov2Model(t.Dinov2Config(**dino, use_swiglu_ffn=True)),
            _hidden,
        ),
        (
            "Dinov2ForImageClassification",
            lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**dino)),
            _logits,
        ),
        (
            "Dinov2WithRegistersModel",
            lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**dino)),
            _hidden,
        ),
        (
            "Dinov2WithRegistersForImageClassification",
            lambda: t.Dinov2WithRegistersForImageClassification(
                t.Dinov2WithRegistersConfig(**dino)
            ),
            _logits,
        ),
        (
            "DINOv3ViTModel",
            lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**VISION, num_register_tokens=3)),
            _hidden,
        ),
        (
            "DINOv3ViTModel (gated MLP)",
            lambda: t.DINOv3ViTModel(
                t.DINOv3ViTConfig(**VISION, num_register_tokens=4, use_gated_mlp=True)
            ),
            _hidden,
        ),
        ("ViTModel", lambda: t.ViTModel(t.ViTConfig(**VISION)), _hidden),
        (
            "ViTForImageClassification",
            lambda: t.ViTForImageClassification(t.ViTConfig(**VISION)),
            _logits,
        ),
        ("DeiTModel", lambda: t.DeiTModel(t.DeiTConfig(**VISION)), _hidden),
        (
            "DeiTForImageClassification",
            lambda: t.DeiTForImageClassification(t.DeiTConfig(**VISION)),
            _logits,
        ),
        (
            "DeiTForImageClassificationWithTeacher",
            lambda: t.DeiTForImageClassificationWithTeacher(t.DeiTConfig(**VISION)),
            _logits,
        ),
        ("ViTMAEModel", lambda: t.ViTMAEModel(t.ViTMAEConfig(**VISION)), _unmasked),
    ]
    cases = [
        Case("transformers", name, _prepared(build), native, (32, 32))
        for name, build, native in made
    ]
    wide = [
        ("Dinov2WithRegistersModel", (24, 40)),
        ("DINOv3ViTModel", (24, 40)),
        ("Siglip2VisionModel", (24, 40)),
    ]
    by_name = {case.name: case for case in cases}
    for name, size in wide:
        case = by_name[name]
        label = f"{name} ({size[0]} x {size[1]} pixels)"
        cases.append(Case("transformers", label, case.build, case.native, size))
    return cases


def llava_cases() -> list[Case]:
    """The towers inside LLaVA, LLaVA-NeXT and LLaVA-OneVision."""
    import transformers as t

    text = {**TEXT, "num_key_value_heads": 4, "max_position_embeddings": 64}
    clip = t.CLIPVisionConfig(**VISION)
    siglip = t.SiglipVisionConfig(**VISION, vision_use_head=False)
    made = [
        (
            "LlavaForConditionalGeneration",
            lambda: t.LlavaForConditionalGeneration(
                t.LlavaConfig(vision_config=clip, text_config=t.LlamaConfig(**text))
            ),
        ),
        (
            "LlavaNextForConditionalGeneration",
            lambda: t.LlavaNextForConditionalGeneration(
                t.LlavaNextConfig(vision_config=clip, text_config=t.LlamaConfig(**text))
            ),
        ),
        (
            "LlavaOnevisionForConditionalGeneration",
            lambda: t.LlavaOnevisionForConditionalGeneration(
                t.LlavaOnevisionConfig(vision_config=siglip, text_config=t.Qwen2Config(**text))
            ),
        ),
    ]
    return [Case("transformers", name, _prepared(build), _hidden, (32, 32)) for name, build in made]


def timm_names() -> list[str]:
    """Every architecture name of timm's ViT and EVA files."""
    import timm

    return sorted(name for module in TIMM_MODULES for name in timm.list_models(module=module))


def timm_case(name: str, **overrides: Any) -> Case:
    """One timm architecture, two blocks deep."""
    return Case("timm", name, _prepared(lambda: small_timm(name, **overrides)), _call)


def open_clip_names() -> list[str]:
    """Every configuration that open_clip lists."""
    import open_clip

    return sorted(open_clip.list_models())


def open_clip_case(name: str) -> Case:
    """One open_clip configuration, its towers made small."""
    return Case(
        "open_clip", name, _prepared(lambda: small_open_clip(name)), _visual, tolerance=1e-6
    )


def small_timm(name: str, **others: Any) -> nn.Module:
    """A timm model with two narrow blocks on 4 x 4 patches, or as near to it as it can be built.

    What is no ``VisionTransformer`` or ``Eva`` comes without memory, for the refusal alone.
    """
    import timm

    with torch.device("meta"):
        full = timm.create_model(name, **others)
    if not {cls.__name__ for cls in type(full).__mro__} & {"VisionTransformer", "Eva"}:
        return full
    patch = full.patch_embed.feat_ratio()
    small: dict[str, Any] = {"depth": 2, "img_size": 4 * patch, **others}
    attention = getattr(full.blocks[0], "attn", None)
    if getattr(attention, "num_kv_groups", 1) > 1 or "sapiens" in name:
        small["num_kv_heads"] = 2
    reasons = []
    for narrow in ({"embed_dim": 48, "num_heads": 4}, {"embed_dim": 256, "num_heads": 4}, {}):
        try:
            return timm.create_model(name, **{**small, **narrow, **others})
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            reasons.append(str(error))
    raise RuntimeError(f"{name} cannot be built small: {reasons}")


def small_open_clip(name: str) -> nn.Module:
    """An open_clip model of a listed configuration, with small towers."""
    import open_clip

    config = open_clip.get_model_config(name)
    custom = bool(config.pop("custom_text", False)) or "hf_model_name" in config["text_cfg"]
    text = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1}
    kept = ("embed_cls", "output_tokens", "pool_type", "no_causal_mask", "proj_type", "proj_bias")
    text |= {key: config["text_cfg"][key] for key in kept if key in config["text_cfg"]}
    vision = dict(config["vision_cfg"])
    if "timm_model_name" not in vision and isinstance(vision["layers"], int):
        patch = vision["patch_size"]
        side = 4 * patch if isinstance(patch, int) else tuple(4 * p for p in patch)
        vision |= {"layers": 2, "width": 64, "head_width": 16, "image_size": side}
        vision |= {"attn_pooler_heads": 4} if vision.get("attentional_pool") else {}
    extra = {k: config[k] for k in ("quick_gelu", "init_logit_bias") if k in config}
    with _small_timm_towers():
        if "multimodal_cfg" in config:
            decoder = {"context_length": 8, "vocab_size": 99, "width": 32, "heads": 2, "layers": 1}
            return open_clip.CoCa(32, decoder, text, vision, **extra)
        model_class = open_clip.CustomTextCLIP if custom else open_clip.CLIP
        return model_class(32, vision, text, **extra)


@contextmanager
def _small_timm_towers() -> Iterator[None]:
    """Let open_clip build its timm towers small."""
    import open_clip.timm_model as adapter

    class Small:
        @staticmethod
        def create_model(name: str, pretrained: bool = False, **others: Any) -> nn.Module:
            del pretrained
            return small_timm(name, **others)

    original, adapter.timm = adapter.timm, Small
    try:
        yield
    finally:
        adapter.timm = original


def _prepared(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A builder whose weights are spread enough for every part to matter."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        with _unset_memory_as_nan():
            module = build().eval()
        with torch.no_grad():
            for parameter in module.parameters():
                if not parameter.is_meta:
                    parameter.nan_to_num_(nan=0.0)
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return module

    return made


@contextmanager
def _unset_memory_as_nan() -> Iterator[None]:
    """Show which weights a library leaves as they are in memory (CoCa's text projection is one)."""
    mode = torch.get_deterministic_debug_mode()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch fills with NaN then
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


def _hidden(module: Any, pixels: Tensor) -> Tensor:
    output: Tensor = module(pixel_values=pixels).last_hidden_state
    return output


def _logits(module: Any, pixels: Tensor) -> Tensor:
    output: Tensor = module(pixel_values=pixels).logits
    return output


def _image_features(module: Any, pixels: Tensor) -> Tensor:
    output: Tensor = module.get_image_features(pixel_values=pixels).pooler_output
    return output


def _unmasked(module: Any, pixels: Tensor) -> Tensor:
    """The encoder with nothing masked: noise that is in order, and a ratio of zero."""
    ratio, module.config.mask_ratio = module.config.mask_ratio, 0.0
    try:
        n_patches = module.embeddings.patch_embeddings.num_patches
        noise = torch.arange(n_patches, dtype=torch.float32).expand(len(pixels), -1)
        output: Tensor = module(pixel_values=pixels, noise=noise).last_hidden_state
    finally:
        module.config.mask_ratio = ratio
    return output


def naflex_arguments(pixels: Tensor, patch: int) -> dict[str, Tensor]:
    """Images cut by transformers' own code, as its processor does."""
    from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

    grid = [pixels.shape[-2] // patch, pixels.shape[-1] // patch]
    return {
        "pixel_values": torch.stack([convert_image_to_patches(p, patch) for p in pixels]),
        "pixel_attention_mask": torch.ones(len(pixels), grid[0] * grid[1], dtype=torch.int32),
        "spatial_shapes": torch.tensor([grid] * len(pixels)),
    }


def _naflex_hidden(module: Any, pixels: Tensor) -> Tensor:
    output: Tensor = module(**naflex_arguments(pixels, 8)).last_hidden_state
    return output


def _naflex_features(module: Any, pixels: Tensor) -> Tensor:
    output: Tensor = module.get_image_features(**naflex_arguments(pixels, 8)).pooler_output
    return output


def _call(module: Any, pixels: Tensor) -> Tensor:
    output: Tensor = module(pixels)
    return output


def _visual(module: Any, pixels: Tensor) -> Tensor:
    output = module.visual(pixels)
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor
