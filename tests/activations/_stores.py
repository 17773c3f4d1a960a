"""A small random CLIP, images for it, and stores made of both."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from vision_plugin.activations import ActivationStore, ExtractionConfig, extract
from vision_plugin.images import open_images
from vision_plugin.models import VisionBridge, wrap

RESID, MLP, Z = "blocks.1.hook_resid_post", "blocks.0.mlp.hook_post", "blocks.1.attn.hook_z"
N_TOKENS, D_MODEL, D_MLP = 17, 16, 24


@cache
def tiny_model(seed: int = 0) -> VisionBridge:
    """A CLIP vision tower of two layers for images of 32 pixels: 17 tokens of width 16."""
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=D_MODEL,
        intermediate_size=D_MLP,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=8,
    )
    processor = CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    module = CLIPVisionModelWithProjection(config).eval()
    return wrap(module, name="tiny", image_processor=processor)


@cache
def images(n: int) -> tuple[Image.Image, ...]:
    """Random images of several sizes."""
    made = []
    for seed in range(n):
        values = np.random.default_rng(seed)
        size = (*values.integers(20, 50, 2), 3)
        made.append(Image.fromarray(values.integers(0, 256, size, dtype=np.uint8)))
    return tuple(made)


def config(path: Path, **changes: Any) -> ExtractionConfig:
    """A configuration for a store of many small shards."""
    settings: dict[str, Any] = {
        "model_name": "tiny",
        "images": "images",
        "hook_names": (RESID,),
        "output_path": str(path),
        "batch_size": 4,
        "images_per_shard": 8,
        "n_workers": 0,
    }
    return ExtractionConfig(**{**settings, **changes})


def make_store(path: Path, n: int = 20, **changes: Any) -> ActivationStore:
    """A store of n images."""
    source = open_images(list(images(n)))
    return extract(config(path, **changes), model=tiny_model(), images=source)


def content(folder: Path) -> dict[str, str]:
    """Hash of every file of a folder, by name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }
