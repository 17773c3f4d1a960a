"""Time of one candidate set: the cached pass against one full forward for each set.

    python -m benchmarks.tasks_speed            # two minutes on one core
    python -m benchmarks.tasks_speed --small    # seconds, to see that it works; writes no file

The slow side asks the model about the pixels with a plain hook, which encodes every token, sets the
set's latents and adds the change of the decoder's output at the edited tokens: every layer of the
model, as one would write it by hand. It is also measured from the images on, with
``model.preprocess``, which a set costs where pixels are not kept. The fast side is ``EditPass``,
which keeps the stream that enters the edit, encodes only the tokens that change and runs only the
layers that remain. Both give the same embeddings, which is checked.

A search then drops a set once it can no longer win. A whole search is timed beside full forwards of
the attacked and the clean validation images for each of its sets, which a search by hand needs to
see what a set mends and what it costs.

All ways run one after the other, round by round; ratios are of one round, and the median is given.
Seconds are CPU seconds of this process, on one thread.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

import vision_plugin as vp
from benchmarks._machine import machine
from vision_plugin import Edit
from vision_plugin.demo import draw
from vision_plugin.demo.attacks import typographic_data
from vision_plugin.metrics import random_dictionary
from vision_plugin.steering import EditPass
from vision_plugin.tasks import TypographicSettings, typographic

logger = logging.getLogger("benchmarks.tasks_speed")

RESULTS = Path(__file__).parent / "results"
AIM = 5.0
SET = 50
"""Latents of a candidate set."""
EXPANSION = 8


def large_model() -> Any:
    """Return a CLIP ViT-B/32 of random weights: 12 layers, 50 tokens."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "image_size": 224, "patch_size": 32,
    }  # fmt: skip
    config = CLIPConfig(vision_config=vision, text_config={"num_hidden_layers": 1})
    return vp.wrap(CLIPModel(config).eval(), image_processor=CLIPImageProcessor())


@torch.no_grad()
def measure(
    name: str, model: Any, images: list[Any], layer: int, tokens: str, rounds: int
) -> dict[str, Any]:
    """Return medians and ratios at one layer and kind of token."""
    width, n_layers = int(model.cfg.d_model), int(model.cfg.n_layers)
    dictionary = random_dictionary(width, EXPANSION * width, k=32, seed=0)
    sae = dictionary.at(f"blocks.{layer}.hook_resid_post")
    pixels = model.preprocess(images)
    run = EditPass(model, pixels, batch_size=len(pixels))
    generator = torch.Generator().manual_seed(0)

    def candidate() -> Edit:
        latents = torch.randperm(EXPANSION * width, generator=generator)[:SET].tolist()
        return Edit.suppress(sae, latents, tokens=tokens)

    rows = model.token_layout().indices(tokens)

    def hooked(edit: Edit, batch: torch.Tensor) -> torch.Tensor:
        latents = list(edit.changes[0].targets)

        def suppress(x: torch.Tensor, hook: Any) -> torch.Tensor:
            del hook
            change = -sae.encode(x)[..., latents] @ sae.W_dec[latents]
            edited = x.clone()
            edited[:, rows] += change[:, rows]
            return edited

        with model.hooks(fwd_hooks=[(sae.cfg.metadata["hook_name"], suppress)]):
            return model.encode_image(batch, normalize=False)

    def full(edit: Edit) -> torch.Tensor:
        return hooked(edit, pixels)

    def from_images(edit: Edit) -> torch.Tensor:
        return hooked(edit, model.preprocess(images))

    ways: dict[str, Callable[[Edit], torch.Tensor]] = {
        "cached": run.embed, "full": full, "from_images": from_images
    }  # fmt: skip
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    worst = 0.0
    for i in range(rounds + 1):
        edit = candidate()
        outputs = {}
        for way, function in ways.items():
            start = time.process_time()
            outputs[way] = function(edit)
            if i:  # the first round fills the cache
                seconds[way].append(time.process_time() - start)
        size = float(outputs["full"].abs().max())
        worst = max(worst, float((outputs["cached"] - outputs["full"]).abs().max()) / size)
    assert worst < 1e-3, f"the cached pass differs by {worst}"
    ratios = {
        way: statistics.median(
            slow / fast for slow, fast in zip(seconds[way], seconds["cached"], strict=True)
        )
        for way in ("full", "from_images")
    }
    row = {
        "model": name, "n_layers": n_layers, "layer": layer, "tokens": tokens,
        "images": len(images), "d_sae": EXPANSION * width, "set": SET,
        "layers_that_remain": (n_layers - 1 - layer) / n_layers,
        "seconds": {way: statistics.median(values) for way, values in seconds.items()},
        "times_faster": ratios, "largest_relative_difference": worst, "aim": AIM,
    }  # fmt: skip
    logger.info(
        "%s, layer %d of %d, %s: %.1f times faster than a full forward, %.1f from the images on",
        *(name, layer, n_layers, tokens, ratios["full"], ratios["from_images"]),
    )
    return row


@torch.no_grad()
def search(model: Any, layer: int, *, train: int, validation: int, hand: int) -> dict[str, Any]:
    """Return the time of a set in a whole search, beside full forwards for each set.

    Args:
        model: The demo model.
        layer: Block behind which latents are edited.
        train: Number of pairs in which latents are found.
        validation: Number of pairs on which is chosen.
        hand: Number of sets that are run by hand.
    """
    data = typographic_data(model, "colour", train=train, validation=validation, test=30)
    width = int(model.cfg.d_model)
    sae = random_dictionary(width, EXPANSION * width, k=32, seed=0).at(
        f"blocks.{layer}.hook_resid_post"
    )
    settings = TypographicSettings(methods=("sae",), unseen_words=False)
    start = time.process_time()
    with torch.enable_grad():
        result = typographic(model, sae, data, settings=settings)
    whole = time.process_time() - start
    seen = [entry["images"] for entry in result.search]
    each = []
    for place in range(hand):
        latents = list(range(place * SET, (place + 1) * SET))

        def suppress(x: torch.Tensor, hook: Any, latents: list[int] = latents) -> torch.Tensor:
            del hook
            return x - sae.encode(x)[..., latents] @ sae.W_dec[latents]

        start = time.process_time()
        with model.hooks(fwd_hooks=[(sae.cfg.metadata["hook_name"], suppress)]):
            for pixels in (data.validation.attacked, data.validation.clean):
                for batch in pixels.split(100):
                    model.encode_image(batch)
        each.append(time.process_time() - start)
    by_hand = statistics.median(each)
    row = {
        "layer": layer, "n_layers": int(model.cfg.n_layers), "sets": len(seen),
        "pairs": validation, "images_seen": sum(seen) / len(seen), "seconds": whole,
        "seconds_by_hand_per_set": by_hand, "times_faster": by_hand * len(seen) / whole,
    }  # fmt: skip
    logger.info(
        "a whole search behind block %d: %d sets, %.1f times faster than full forwards",
        *(layer, len(seen), row["times_faster"]),
    )
    return row


def page(rows: list[dict[str, Any]], searches: list[dict[str, Any]]) -> str:
    """Return the results as a page."""
    lines = [
        "# Time of a candidate set of latents",
        "",
        "Times faster than one full forward with a plain hook, medians of paired rounds.",
        "",
        "| model | edit behind block | layers that remain | tokens | from the pixels on | from the "
        "images on |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']} | {row['layer']} of {row['n_layers']} | "
        f"{row['layers_that_remain']:.0%} | {row['tokens']} | {row['times_faster']['full']:.1f} | "
        f"{row['times_faster']['from_images']:.1f} |"
        for row in rows
    ]
    lines += [
        "",
        f"The aim was {AIM:g} times at a middle layer. Where half of the layers remain, with every "
        "token, since patches attend to the class token, the layers alone bound the gain at twice. "
        "What is above it is the SAE, which encodes the edited tokens only, and the last block, "
        "which runs for the class token alone: of four layers that is much, of twelve little.",
        "",
        "A whole search of the typographic task (finding the latents, choosing among the sets and "
        "reporting the winner on 30 pairs included), beside full forwards of the attacked and the "
        "clean validation images for each set. A set is dropped once it can no longer win, which "
        "changes no choice:",
        "",
        "| edit behind block | sets | pairs | attacked images looked at per set | times faster |",
        "|---|---|---|---|---|",
        *(
            f"| {row['layer']} of {row['n_layers']} | {row['sets']} | {row['pairs']} | "
            f"{row['images_seen']:.0f} | {row['times_faster']:.1f} |"
            for row in searches
        ),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark and write its page and JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="seconds, to see that it works")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logger.setLevel(logging.INFO)
    torch.set_num_threads(1)
    rounds, n = (2, 4) if arguments.small else (9, 60)
    around = machine("transformers", "sae-lens")
    images = list(draw(n, seed=5).images)
    demo = vp.load_model("demo")
    rows = [
        measure("demo", demo, images, layer, tokens, rounds)
        for layer in (1, 2, 3)
        for tokens in ("cls", "all")
    ]
    large, some = large_model(), [image.resize((640, 480)) for image in images[: math.ceil(n / 8)]]
    rows += [
        measure("ViT-B/32, random", large, some, layer, tokens, max(2, rounds // 2))
        for layer in (5, 8, 10)
        for tokens in ("cls", "all")
    ]
    sizes = (
        {"train": 40, "validation": 40} if arguments.small else {"train": 300, "validation": 400}
    )
    searches = [search(demo, layer, hand=2 if arguments.small else 7, **sizes) for layer in (1, 2)]
    if not arguments.small:
        found = {"machine": around, "rows": rows, "searches": searches}
        (RESULTS / "tasks-speed.json").write_text(json.dumps(found, indent=1) + "\n")
        (RESULTS / "tasks-speed.md").write_text(page(rows, searches))
    logger.info("%s", page(rows, searches))


if __name__ == "__main__":
    main()
