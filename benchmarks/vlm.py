"""What an SAE in the tower costs a vision-language model while it writes.

    python -m benchmarks.vlm          # writes results/vlm.json and results/vlm.md
    python -m benchmarks.vlm --small  # seconds, to see that it works; writes no file

A LLaVA of random weights answers greedily: by the native module, by the bridge, with a latent
clamped, and with an SAE in place of the layer. The ways take turns, so that a busy machine is busy
for all of them. Memory is the most bytes of tensors that live at once, beyond the weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from sae_lens import TopKSAE, TopKSAEConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

import vision_plugin as vp
from benchmarks._live_memory import peak_bytes
from benchmarks._machine import machine

logger = logging.getLogger("benchmarks.vlm")
RESULTS = Path(__file__).parent / "results"
IMAGE, SIDE, PATCH, K = 5, 112, 14, 32
N_PATCHES = (SIDE // PATCH) ** 2


def build(width: int) -> Any:
    """Return a LLaVA of random weights: 6 blocks of tower, 4 of language model."""
    torch.manual_seed(0)
    vision = hf.CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=6,
        num_attention_heads=width // 64, image_size=SIDE, patch_size=PATCH,
    )  # fmt: skip
    text = hf.LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=4,
        num_attention_heads=width // 64, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    config = hf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-2,
        image_seq_length=N_PATCHES,
    )  # fmt: skip
    return hf.LlavaForConditionalGeneration(config).eval()


def run(*, width: int, batch: int, d_sae: int, new_tokens: int, rounds: int) -> dict[str, Any]:
    """Measure every way of writing; return the record."""
    where = machine("transformers", "transformer-lens", "sae-lens")
    native = build(width)
    vlm = vp.wrap_vlm(native)
    sae = TopKSAE(TopKSAEConfig(d_in=width, d_sae=d_sae, k=K))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.tokens = vlm.reach.hook_names[0], "patch"
    ids = torch.randint(10, 1000, (batch, N_PATCHES + 12))
    ids[:, 1 : N_PATCHES + 1] = IMAGE
    pixels = torch.randn(batch, 3, SIDE, SIDE)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    around: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "native": nullcontext,
        "bridge": nullcontext,
        "steer": lambda: vlm.steer(sae, {3: 50.0}),
        "sae": lambda: vlm.saes(sae, use_error_term=False),
        "sae with error": lambda: vlm.saes(sae, use_error_term=True),
    }

    def write(way: str) -> Any:
        if way == "native":
            return native.generate(**inputs, **options)[:, ids.shape[1] :]
        return vlm.generate(inputs, return_type="tokens", **options)

    seconds: dict[str, list[float]] = {way: [] for way in around}
    peaks: dict[str, int] = {}
    said: dict[str, Any] = {}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for way, attached in around.items():
                with attached():
                    began = time.process_time()
                    said[way] = write(way)
                    spent = time.process_time() - began
                    if turn:  # the first round warms up, and is measured for memory afterwards
                        seconds[way].append(spent)
                    else:
                        peaks[way] = peak_bytes(lambda way=way: write(way))
    if not torch.equal(said["native"], said["bridge"]):
        raise AssertionError("the bridge writes other tokens than the native module")
    median = {way: statistics.median(times) for way, times in seconds.items()}
    return {
        "machine": where,
        "shape": {
            "width": width, "tower_blocks": 6, "language_blocks": 4, "batch": batch,
            "tokens_per_image": N_PATCHES + 1, "d_sae": d_sae, "k": K, "new_tokens": new_tokens,
        },
        "cpu_seconds": median,
        "over_native": {way: median[way] / median["native"] for way in median},
        "peak_bytes": peaks,
        "copy_bytes": batch * (N_PATCHES + 1) * width * 4,
        "copies_over_bridge": {
            way: (peaks[way] - peaks["bridge"]) / (batch * (N_PATCHES + 1) * width * 4)
            for way in peaks
        },
    }  # fmt: skip


def markdown(found: dict[str, Any]) -> str:
    """Return the record as a page."""
    shape = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in found["shape"].items())
    around = found["machine"]
    return "\n".join(
        [
            "# What an SAE in the tower costs a vision-language model while it writes",
            "",
            f"`python -m benchmarks.vlm` on {around['device']}, {around['threads']} threads, load "
            f"{around['load_average_before']:.1f} before: {shape}. The medians of CPU seconds of "
            "one `generate`; memory as the most bytes of tensors at once, beyond the weights, and "
            "as copies of the tower's activations at one layer beyond the bridge's.",
            "",
            "| way | CPU s | over native | peak MiB | copies over the bridge |",
            "|---|---|---|---|---|",
            *(
                f"| {way} | {found['cpu_seconds'][way]:.2f} | {found['over_native'][way]:.2f} | "
                f"{found['peak_bytes'][way] / 2**20:.1f} | "
                f"{found['copies_over_bridge'][way]:.2f} |"
                for way in found["cpu_seconds"]
            ),
            "",
        ]
    )


def main() -> None:
    """Measure, print, and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="seconds, to see that it works")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    torch.set_num_threads(1)
    if arguments.small:
        found = run(width=64, batch=2, d_sae=256, new_tokens=3, rounds=2)
    else:
        found = run(width=256, batch=8, d_sae=2048, new_tokens=16, rounds=5)
    page = markdown(found)
    logger.info("%s", page)
    if not arguments.small:
        (RESULTS / "vlm.json").write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / "vlm.md").write_text(page)


if __name__ == "__main__":
    main()
