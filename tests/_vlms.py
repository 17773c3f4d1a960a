"""Vision-language models of random weights, one per family, with inputs that they take."""

from __future__ import annotations

from typing import Any

import torch

IMAGE, PAD, N_WORDS = 63, 1, 64
TEXT = {
    "vocab_size": N_WORDS,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
FAMILIES = ("llava", "llava_next", "llava_onevision", "gemma3", "idefics3", "smolvlm")


def tiny_vlm(family: str) -> Any:
    """Return a model of random weights: 4 blocks of tower, 2 of language model."""
    import transformers as hf

    torch.manual_seed(0)
    clip, siglip = hf.CLIPVisionConfig(**TOWER), hf.SiglipVisionConfig(**TOWER)
    llama = hf.LlamaConfig(**TEXT)
    model: Any
    if family == "llava":
        model = hf.LlavaForConditionalGeneration(
            hf.LlavaConfig(
                vision_config=clip, text_config=llama, image_token_id=IMAGE,
                vision_feature_layer=-2, image_seq_length=16,
            )
        )  # fmt: skip
    elif family == "llava_next":
        model = hf.LlavaNextForConditionalGeneration(
            hf.LlavaNextConfig(
                vision_config=clip, text_config=llama, image_token_id=IMAGE,
                vision_feature_layer=-2, image_grid_pinpoints=[[32, 64], [64, 32]],
            )
        )  # fmt: skip
    elif family == "llava_onevision":
        model = hf.LlavaOnevisionForConditionalGeneration(
            hf.LlavaOnevisionConfig(
                vision_config=siglip, text_config=hf.Qwen2Config(**TEXT), image_token_id=IMAGE,
                video_token_id=62, vision_feature_layer=-1, vision_feature_select_strategy="full",
                image_grid_pinpoints=[[32, 32], [64, 64]], vision_aspect_ratio="anyres_max_9",
            )
        )  # fmt: skip
    elif family == "gemma3":
        text = {**TEXT, "head_dim": 12, "sliding_window": 512}
        model = hf.Gemma3ForConditionalGeneration(
            hf.Gemma3Config(
                vision_config=hf.SiglipVisionConfig(**TOWER, vision_use_head=False),
                text_config=hf.Gemma3TextConfig(**text), mm_tokens_per_image=4,
                image_token_id=IMAGE, boi_token_index=61, eoi_token_index=62,
            )
        )  # fmt: skip
    else:
        smol = family == "smolvlm"
        config = hf.SmolVLMConfig if smol else hf.Idefics3Config
        made = hf.SmolVLMForConditionalGeneration if smol else hf.Idefics3ForConditionalGeneration
        model = made(
            config(vision_config=TOWER, text_config=llama, image_token_id=IMAGE, scale_factor=2)
        )
    with torch.no_grad():  # the default initialisation hardly lets one token see another
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
                if not parameter.any():  # Gemma's projector starts at zero
                    parameter.normal_()
    model.eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, 3
    return model


def tiny_inputs(family: str, batch: int = 2, images: int = 1) -> dict[str, torch.Tensor]:
    """Return inputs of several prompts, each with some images; the first prompt is padded."""
    generator = torch.Generator().manual_seed(1)
    per_image = {
        "llava": 16, "llava_next": 52, "llava_onevision": 36, "gemma3": 4, "idefics3": 4,
        "smolvlm": 4,
    }[family]  # fmt: skip
    n = batch * images
    pixels = torch.randn(n, 3, 32, 32, generator=generator)
    found: dict[str, torch.Tensor] = {}
    if family in ("llava_next", "llava_onevision"):
        pixels = torch.randn(n, 3, 3, 32, 32, generator=generator)
        found["image_sizes"] = torch.tensor([[32, 64]] * n)
    if family == "llava_onevision":
        found["image_sizes"] = torch.tensor([[30, 30]] * n)
        pixels = pixels[:, :2]
    if family in ("idefics3", "smolvlm"):
        pixels = pixels.unflatten(0, (batch, images))
    words = torch.randint(4, 60, (batch, 6), generator=generator)
    pictures = torch.full((batch, images * per_image), IMAGE)
    ids = torch.cat([words[:, :2], pictures, words[:, 2:]], dim=1)
    mask = torch.ones_like(ids)
    ids[0, 0], mask[0, 0] = PAD, 0
    if family == "gemma3":
        found["token_type_ids"] = (ids == IMAGE).long()
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, **found}
