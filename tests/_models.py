"""Models that tests of several folders load."""

from __future__ import annotations

from pathlib import Path

import torch

TEXTS = ("a red circle", "a blue square", "a green star")


def save_tiny_clip(folder: Path) -> None:
    """Save a CLIP of random weights: 3 blocks, 32 dimensions, 16 patches."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    from benchmarks.demo_checkpoint._tokenizer import build_tokenizer

    tokenizer = build_tokenizer(TEXTS, max_length=8)
    tower = {"intermediate_size": 64, "num_attention_heads": 4, "hidden_size": 32}
    config = CLIPConfig(
        vision_config={
            **tower,
            "num_hidden_layers": 3,
            "image_size": 32,
            "patch_size": 8,
            "projection_dim": 16,
        },
        text_config={
            **tower,
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 8,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": tokenizer.bos_token_id,
        },
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = CLIPModel(config).eval()
    with torch.no_grad():  # the default initialisation hardly lets one token see another
        for parameter in model.vision_model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    ).save_pretrained(folder)
