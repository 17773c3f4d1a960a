"""What the bridge costs beside the native forward pass.

    python -m benchmarks.bridge                # ViT-B/32 on this machine's GPU, or else its CPU
    python -m benchmarks.bridge --size small --out -

All variants take the same images in interleaved rounds. Figures are ratios to the native forward
pass with SDPA: 1.10 is a tenth more. Weights are random, which changes no time.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

from benchmarks._kernel_timing import interleaved
from benchmarks._machine import machine

RESULTS = Path(__file__).parent / "results"
SCHEMA = 1
SIZES: dict[str, dict[str, int]] = {
    "small": {"hidden_size": 64, "layers": 3, "heads": 4, "patch_size": 8, "image_size": 32},
    "base": {"hidden_size": 768, "layers": 12, "heads": 12, "patch_size": 32, "image_size": 224},
    "large": {"hidden_size": 1024, "layers": 24, "heads": 16, "patch_size": 14, "image_size": 224},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default=device)
    parser.add_argument("--size", choices=tuple(SIZES), default="base")
    parser.add_argument("--batch", type=int, default=64 if device == "cuda" else 4)
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--out", default=str(RESULTS / f"bridge-{device}.json"))
    options = parser.parse_args(arguments)
    report = measure(options.device, options.size, options.batch, options.repetitions)
    sys.stdout.write(json.dumps(report, indent=1) + "\n")
    if options.out != "-":
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")


def measure(device: str, size: str, batch: int, repetitions: int) -> dict[str, Any]:
    """Return milliseconds of each way through the model, and their ratios to the native one."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pixels = torch.randn(batch, 3, *[SIZES[size]["image_size"]] * 2, device=device, dtype=dtype)
    times = interleaved(
        _variants(_tower(size, device, dtype), pixels), repetitions=repetitions, device=device
    )
    native = times["native"].median_ms
    return {
        "schema": SCHEMA,
        "environment": {
            **machine("transformers", "transformer-lens", device=device),
            "dtype": str(dtype),
        },
        "size": SIZES[size],
        "batch": batch,
        "repetitions": repetitions,
        "images_per_s": {name: 1e3 * batch / time.median_ms for name, time in times.items()},
        "ratio_to_native": {name: time.median_ms / native for name, time in times.items()},
        "spread": {name: time.spread for name, time in times.items()},
    }


def _tower(size: str, device: str, dtype: torch.dtype) -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    s = SIZES[size]
    config = CLIPVisionConfig(
        hidden_size=s["hidden_size"],
        intermediate_size=4 * s["hidden_size"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        patch_size=s["patch_size"],
        image_size=s["image_size"],
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return CLIPVisionModel(config).eval().to(device, dtype)


def _edited(model: Any, pixels: torch.Tensor, edit: Any) -> object:
    with model.edit(edit):
        return model(pixels)


def _variants(tower: nn.Module, pixels: torch.Tensor) -> dict[str, Callable[[], object]]:
    import sae_lens

    import vision_plugin as vp
    from vision_plugin.models import Harvester
    from vision_plugin.steering import EditPass

    model = vp.wrap(tower)
    native = model.native
    hook = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    pattern = f"blocks.{model.cfg.n_layers - 1}.attn.hook_pattern"
    width = int(model.cfg.d_model)

    def sae_at(hook_name: str) -> Any:
        made = sae_lens.TopKSAE(
            sae_lens.TopKSAEConfig(
                d_in=width, d_sae=16 * width, k=32, device=str(pixels.device),
                dtype=str(pixels.dtype).removeprefix("torch."),
            )
        )  # fmt: skip
        made.cfg.metadata.hook_name, made.cfg.metadata.tokens = hook_name, "all"
        return made

    sae, middle = sae_at(hook), sae_at(f"blocks.{model.cfg.n_layers // 2 - 1}.hook_resid_post")
    edit = vp.Edit.suppress(middle, [0, 1, 2])
    cached = EditPass(model, pixels, batch_size=len(pixels))
    cached.embed(edit)
    harvest = Harvester(model, [hook])

    def look(activation: torch.Tensor, hook: Any) -> None:
        del activation, hook

    ways: dict[str, Callable[[], object]] = {
        "native": lambda: native(pixel_values=pixels),
        "bridge": lambda: model(pixels),
        "bridge, one hook": lambda: model.run_with_hooks(pixels, fwd_hooks=[(hook, look)]),
        "bridge, one pattern": lambda: model.run_with_hooks(pixels, fwd_hooks=[(pattern, look)]),
        "harvest of the last block": lambda: harvest(pixels),
        "spliced SAE": lambda: model.run_with_saes(pixels, saes=[sae]),
        "edit in the middle": lambda: _edited(model, pixels, edit),
        "the same, cached pass": lambda: cached.embed(edit),
    }

    def quiet(way: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad():
                return way()

        return run

    return {name: quiet(way) for name, way in ways.items()}


if __name__ == "__main__":
    main()
