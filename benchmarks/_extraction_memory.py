"""One extraction in a process of its own, which tells its peak memory at the end."""

from __future__ import annotations

import io
import json
import resource
import sys
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

import vision_plugin as vp
from vision_plugin.activations import ExtractionConfig, extract, open_images

HOOK_NAME = "blocks.1.hook_resid_post"


def write_parquet(path: Path, n_images: int) -> None:
    """Small pictures, a thousand different ones over and over."""
    pictures = []
    for seed in range(1000):
        values = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(values).save(stream, "PNG")
        pictures.append({"bytes": stream.getvalue(), "path": None})
    rows = {"image": [pictures[i % 1000] for i in range(n_images)]}
    features = datasets.Features(image=datasets.Image())
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path, batch_size=1000)


def small_clip() -> vp.VisionBridge:
    """A vision tower that is quick, with 17 tokens of width 64."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=8,
    )
    size = {"height": 32, "width": 32}
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    module = CLIPVisionModelWithProjection(config).eval()
    return vp.wrap(module, name="small", processor=processor)


def main() -> None:
    """Arguments: Parquet file, number of pictures (0 for none), folder of the store."""
    parquet, n_images, store = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    model = small_clip()
    if n_images:
        config = ExtractionConfig(
            model_name="small",
            images=parquet,
            hook_names=[HOOK_NAME],
            output_path=store,
            batch_size=128,
            images_per_shard=2048,
            n_images=n_images,
            n_workers=1,
        )
        extract(config, model=model, images=open_images(parquet, n_images=n_images))
    usage = {
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peak_rss_of_a_worker_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
    }
    sys.stdout.write(json.dumps(usage) + "\n")


if __name__ == "__main__":
    main()
