"""Steerability against one full forward per latent, and adaptive against complete runs.

    python -m benchmarks.steerability            # full size, seven minutes on one core
    python -m benchmarks.steerability --small    # a minute, to see that it works; writes no file

Speed is measured on a ViT-B/32 of random weights with 5,000 concepts; the slow side is the plain
transformers model with a PyTorch hook, on a sample of latents, interleaved with the fast side. The
adaptive mode is measured on the emoji CLIP beside the checkout (left out, with a line saying so,
where it is missing), with an SAE trained here by SAELens's trainer.

Seconds are CPU seconds of this process, on one thread by default: other work on the machine then
changes them little.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

import vision_plugin as vp
from benchmarks._machine import machine
from benchmarks._steerability_adaptive import STRENGTH, measure, timed
from vision_plugin.metrics import random_dictionary, steerability
from vision_plugin.steering import Steering

logger = logging.getLogger("benchmarks.steerability")

N_CONCEPTS = 5000


def vit_b_32() -> CLIPModel:
    """A CLIP ViT-B/32 with random weights and a one-layer text tower that is not used."""
    torch.manual_seed(0)
    config = CLIPConfig(
        vision_config={
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "image_size": 224,
            "patch_size": 32,
        },
        text_config={"num_hidden_layers": 1},
        projection_dim=512,
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():
        model.logit_scale.fill_(math.log(100.0))
    return model


@torch.no_grad()
def full_forward(
    native: CLIPModel, dictionary: Any, pixels: Tensor, texts: Tensor, layer: int, latent: int
) -> Tensor:
    """Probabilities ``[n, concepts]`` of one latent by one native forward with a plain hook."""

    def edit(module: nn.Module, args: Any, output: Any) -> Any:
        del module, args
        x = output[0] if isinstance(output, tuple) else output
        direction = dictionary.W_dec[latent]
        value = (x @ direction).unsqueeze(-1)
        edited = x + (STRENGTH - value) * direction
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    handle = native.vision_model.encoder.layers[layer].register_forward_hook(edit)
    try:
        return plain_forward(native, pixels, texts)
    finally:
        handle.remove()


@torch.no_grad()
def plain_forward(native: CLIPModel, pixels: Tensor, texts: Tensor) -> Tensor:
    """Probabilities ``[n, concepts]`` of the native model as it is."""
    pooled = native.vision_model(pixel_values=pixels).pooler_output
    image = nn.functional.normalize(native.visual_projection(pooled), dim=-1)
    return torch.softmax(native.logit_scale.exp() * image @ texts.T, dim=-1)


def spread(seconds: list[float]) -> dict[str, float]:
    """Median, least and most of repeated timings."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def last_layer(
    native: CLIPModel, model: Any, texts: Tensor, *, n_images: int, n_latents: int, n_slow: int
) -> dict[str, Any]:
    """The closed form for every latent against full forwards for a few of them."""
    pixels = torch.randn(n_images, 3, 224, 224, generator=torch.Generator().manual_seed(2))
    control = random_dictionary(768, n_latents, k=None, seed=0)
    dictionary = control.at("blocks.11.hook_resid_post")
    fast_seconds, result = timed(
        lambda: steerability(model, dictionary, pixels, texts, keep_delta=True)
    )
    before = plain_forward(native, pixels, texts)
    slow_seconds, worst = [], 0.0
    for latent in range(n_slow):
        seconds, after = timed(
            lambda latent=latent: full_forward(native, dictionary, pixels, texts, 11, latent)
        )
        slow_seconds.append(seconds)
        expected = (after - before).double().mean(0)
        worst = max(worst, float((result.delta[latent].double() - expected).abs().max()))
    slow = statistics.median(slow_seconds)
    per_latent = fast_seconds / n_latents
    row = {
        "n_images": n_images,
        "n_latents": n_latents,
        "n_concepts": len(texts),
        "seconds_all_latents": fast_seconds,
        "seconds_per_latent": per_latent,
        "full_forward_seconds_per_latent": spread(slow_seconds),
        "speedup": slow / per_latent,
        "target_speedup": 200,
        "largest_delta": float(result.delta.abs().max()),
        "largest_difference_of_delta": worst,
    }
    logger.info("last layer: %.0f times faster, difference %.1e", row["speedup"], worst)
    return row


def middle_layers(
    native: CLIPModel, model: Any, texts: Tensor, *, layers: list[int], n_images: int, repeats: int
) -> list[dict[str, Any]]:
    """Steered passes against full forwards of as many sequences, interleaved."""
    pixels = torch.randn(n_images, 3, 224, 224, generator=torch.Generator().manual_seed(3))
    runs = {}
    for layer in layers:
        control = random_dictionary(768, 64, k=None, seed=0)
        dictionary = control.at(f"blocks.{layer}.hook_resid_post")
        steering = Steering(model, dictionary, texts, batch_size=n_images)
        (prepared,) = steering.prepare(pixels)
        latent = torch.tensor([0])
        steering.shift(prepared, latent, STRENGTH)
        runs[layer] = (dictionary, steering, prepared, latent)
    slow: dict[int, list[float]] = {layer: [] for layer in layers}
    fast: dict[int, list[float]] = {layer: [] for layer in layers}
    before, worst = plain_forward(native, pixels, texts), dict.fromkeys(layers, 0.0)
    for _ in range(repeats):
        for layer, (dictionary, steering, prepared, latent) in runs.items():
            seconds, after = timed(
                lambda d=dictionary, where=layer: full_forward(native, d, pixels, texts, where, 0)
            )
            slow[layer].append(seconds)
            seconds, shift = timed(lambda s=steering, p=prepared, k=latent: s.shift(p, k, STRENGTH))
            fast[layer].append(seconds)
            error = shift.total[0] / n_images - (after - before).mean(0)
            worst[layer] = max(worst[layer], float(error.abs().max()))
    rows = []
    for layer in layers:
        _, steering, prepared, latent = runs[layer]
        # Each pass is held against the full forward just before it: noise that lasts hits both.
        pairs = [quick / full for quick, full in zip(fast[layer], slow[layer], strict=True)]
        share, measured = (11 - layer) / 12, statistics.median(pairs)
        full = statistics.median(slow[layer])
        fixed = fixed_parts(steering, prepared, latent, repeats)
        rows.append(
            {
                "layer": layer,
                "share_of_layers_that_remain": share,
                "share_of_time": measured,
                "time_over_share": measured / share,
                "target_time_over_share": 1.15,
                "seconds": spread(fast[layer]),
                "full_forward_seconds": spread(slow[layer]),
                "fixed_share_of_full_forward": {
                    name: seconds / full for name, seconds in fixed.items()
                },
                "n_images": n_images,
                "largest_difference_of_delta": worst[layer],
            }
        )
        logger.info(
            "layer %d: %.3f of a full forward (editing and head %.3f), %.3f of the layers remain, "
            "difference %.1e",
            layer,
            measured,
            sum(fixed.values()) / full,
            share,
            worst[layer],
        )
    return rows


@torch.no_grad()
def fixed_parts(
    steering: Steering, prepared: Any, latent: Tensor, repeats: int
) -> dict[str, float]:
    """Seconds of what a steered pass of one latent does whatever the layer."""

    def edit() -> None:
        reading = steering._read(prepared.source)
        steering._edited(prepared, reading, None, latent, STRENGTH)

    def head() -> None:
        for _ in range(2):  # with and without steering
            steering._probabilities(prepared.embedding)

    return {
        name: statistics.median(timed(part)[0] for _ in range(repeats))
        for name, part in (("encode_and_edit", edit), ("concepts", head))
    }


def main() -> None:
    """Run the benchmark and write its JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="a minute, to see that it works")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file; a small run writes none by default")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    torch.set_num_threads(arguments.threads)
    small = arguments.small
    native = vit_b_32()
    model = vp.wrap(native)
    generator = torch.Generator().manual_seed(1)
    texts = nn.functional.normalize(torch.randn(N_CONCEPTS, 512, generator=generator), dim=1)
    # The first call imports the hosts, which takes seconds and is no part of any figure.
    few = random_dictionary(768, 2, k=None, seed=0).at("blocks.11.hook_resid_post")
    steerability(model, few, torch.zeros(1, 3, 224, 224), texts)
    sizes: dict[str, Any] = (
        {"n_images": 4, "n_latents": 256, "n_slow": 2}
        if small
        else {"n_images": 32, "n_latents": 4096, "n_slow": 6}
    )
    results = {
        "environment": machine("transformers", "transformer-lens")
        | {"dtype": "float32", "clock": "process CPU seconds"},
        "small": small,
        "last_layer": last_layer(native, model, texts, **sizes),
        "middle_layers": middle_layers(
            native,
            model,
            texts,
            layers=[5] if small else [2, 5, 8],
            n_images=8 if small else 16,
            repeats=2 if small else 9,
        ),
        "adaptive": measure(
            n_images=48 if small else 192,
            d_sae=32 if small else 288,
            steps=20 if small else 200,
            orders=3 if small else 60,
        ),
    }
    results_folder = Path(__file__).parent / "results"
    output = arguments.output or (None if small else results_folder / "steerability.json")
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=2) + "\n")
        logger.info("wrote %s", output.name)


if __name__ == "__main__":
    main()
