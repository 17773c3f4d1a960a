"""What CLIP's image embedding is made of, for drawn images and real emoji, and what that costs.

    python -m benchmarks.decompose            # about ten minutes on two cores
    python -m benchmarks.decompose --small    # a minute, to see that it works; writes no file

For the packaged CLIP on drawn images and the emoji CLIP on noto's emoji (beside the checkout):
which layers and heads matter by mean ablation, what TEXTSPAN says of the heads that matter most,
how consistent and disentangled heads are, how well maps of a text find an object with an exact mask
beside baselines, and what second-order effects of neurons and latents look like. Then the time of
``decompose`` against a forward that caches everything, in the same run.

A table goes to ``benchmarks/results/decompose.md``, every number to ``decompose.json`` beside it.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

import vision_plugin as vp
from benchmarks._machine import machine
from vision_plugin import lens
from vision_plugin.images import open_images
from vision_plugin.models import VisionBridge

logger = logging.getLogger("benchmarks.decompose")

RESULTS = Path(__file__).parent / "results"
SHARED = Path(__file__).parents[2] / "shared"
EMOJI = SHARED / "models" / "emoji-clip"
NOTO = SHARED / "data" / "noto.parquet"
SCHEMA = "vision_plugin.benchmarks.decompose/1"
TARGET = 3.0
"""Most times a forward with cache that a decomposition may take."""
FACTORS = ("shape", "colour", "texture", "background", "position", "size")
"""Factors whose values are the texts for drawn images."""
COMPONENTS = 64
"""Neurons and latents whose second-order effects are read."""


@dataclass(frozen=True)
class Config:
    """Sizes of the benchmark."""

    n_images: int = 600
    """Drawn images, and emoji, for the heads."""
    n_masks: int = 200
    """Images with a mask."""
    n_spans: int = 6
    """Heads that are described, those that matter most."""
    repeats: int = 5
    """Timings of each kind, interleaved."""
    seed: int = 101
    """Seed of the drawn images; the packaged model never saw it."""
    threads: int = 1
    """Threads of torch."""
    small: bool = False
    """Shrink everything to a minute; writes no file unless --out is given."""
    out: Path | None = None
    """Folder of the results; benchmarks/results by default."""


# ---------------------------------------------------------------- the two worlds


@dataclass(frozen=True)
class World:
    """Images of known classes, with masks, for a model."""

    name: str
    model: VisionBridge
    pixels: Tensor
    classes: list[str]
    """Sentences."""
    labels: list[int]
    texts: list[str]
    """Texts for TEXTSPAN."""
    properties: dict[str, str]
    """Property of each of the texts; empty where there is none."""
    masked: Tensor
    """Pixels of the images with masks."""
    masks: Tensor
    masked_labels: list[int]


def drawn_world(cfg: Config) -> World:
    """The packaged CLIP on drawn images; a class is a colour and a shape."""
    model = vp.load_model("demo")
    world = vp.demo.draw(cfg.n_images + cfg.n_masks, seed=cfg.seed)
    pairs = [(colour, shape) for colour in vp.demo.COLOURS for shape in vp.demo.SHAPES]
    labels = [pairs.index((scene.colour, scene.shape)) for scene in world.scenes]
    every = vp.demo.concept_vocabulary()
    concepts = [concept for concept in every if concept.factor in FACTORS]
    pixels = torch.cat(
        [
            model.preprocess(list(world.images[start : start + 100]))
            for start in range(0, len(world), 100)
        ]
    )
    n = cfg.n_images
    return World(
        name="drawn",
        model=model,
        pixels=pixels[:n],
        classes=[f"a {colour} {shape}" for colour, shape in pairs],
        labels=labels[:n],
        texts=[concept.text for concept in concepts],
        properties={concept.text: concept.factor for concept in concepts},
        masked=pixels[n:],
        masks=torch.tensor(np.stack(list(world.masks[n:]))),
        masked_labels=labels[n:],
    )


def emoji_world(cfg: Config) -> World:
    """The emoji CLIP on noto; for masks, an emoji at half its size on another colour."""
    model = vp.load_model(str(EMOJI))
    source = open_images(str(NOTO))
    names, groups = list(source.column("name")), list(source.column("subgroup"))
    random = np.random.default_rng(cfg.seed)
    chosen = random.permutation(len(names))
    whole, placed = chosen[: cfg.n_images].tolist(), chosen[: cfg.n_masks].tolist()
    import pyarrow.parquet

    rows = pyarrow.parquet.read_table(NOTO).column("image")
    pictures, masks = [], []
    for place in placed:
        picture, mask = _placed(_rgba(rows[place].as_py()["bytes"]), random)
        pictures.append(picture)
        masks.append(mask)
    first_of: dict[str, str] = {}
    for name, group in zip(names, groups, strict=True):
        first_of.setdefault(str(name), str(group))
    return World(
        name="emoji",
        model=model,
        pixels=model.preprocess([source[place] for place in whole]),
        classes=[f"a picture of {name}" for name in names],
        labels=whole,
        texts=list(first_of),
        properties=first_of,
        masked=model.preprocess(pictures),
        masks=torch.tensor(np.stack(masks)),
        masked_labels=placed,
    )


def _rgba(data: bytes) -> Image.Image:
    import io

    return Image.open(io.BytesIO(data)).convert("RGBA").resize((32, 32), Image.Resampling.LANCZOS)


def _placed(emoji: Image.Image, random: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    """A picture of 64 pixels with an emoji somewhere in it, and the emoji's pixels."""
    colour = tuple(int(value) for value in random.integers(60, 256, 3))
    picture = Image.new("RGB", (64, 64), colour)
    left, top = (int(value) for value in random.integers(0, 33, 2))
    picture.paste(emoji, (left, top), emoji)
    mask = np.zeros((64, 64), dtype=bool)
    mask[top : top + 32, left : left + 32] = np.asarray(emoji)[..., 3] > 127
    return picture, mask


# ---------------------------------------------------------------- what is measured


def ablation(world: World) -> lens.MeanAblation:
    """Mean ablation with the classes of the world."""
    return lens.mean_ablation(
        world.model, world.pixels, classes=world.classes, labels=world.labels, batch_size=64
    )


def spans(world: World, found: lens.MeanAblation, cfg: Config) -> dict[str, Any]:
    """TEXTSPAN of the heads that matter most, and the scores of the last layers' heads."""
    outputs = lens.head_outputs(world.model, world.pixels, layers=4, batch_size=64)
    by_head = outputs.textspan(world.texts)
    order = [head for head in found.heads(len(found.rows)) if head in by_head]
    rows = {(row.place or ()): row for row in found.of("head")}
    result: dict[str, Any] = {
        "heads": [
            {
                "head": f"{head[0]}.{head[1]}",
                "accuracy_without": rows[head].accuracy,
                "cosine_without": rows[head].cosine,
                **by_head[head].to_dict(),
            }
            for head in order[: cfg.n_spans]
        ],
        "properties": lens.head_properties(by_head, world.properties).to_dict(),
    }
    # What five texts leave of the answer: each of these heads replaced by its projection.
    texts = torch.nn.functional.normalize(world.model.encode_text(world.classes), dim=-1)
    whole = torch.cat(
        [world.model.encode_image(part, normalize=False) for part in world.pixels.split(64)]
    )
    changed = whole.clone().double()
    for head, span in by_head.items():
        own = outputs.of(head).double()
        changed += span.project(own) - own
    labels = torch.tensor(world.labels)
    result["accuracy"] = _accuracy(whole, texts, labels)
    result["accuracy_projected"] = _accuracy(changed.float(), texts, labels)
    return result


def _accuracy(embeddings: Tensor, texts: Tensor, labels: Tensor) -> float:
    seen = (torch.nn.functional.normalize(embeddings, dim=-1) @ texts.T).argmax(1)
    return float((seen == labels).float().mean())


def segmentation(world: World) -> dict[str, dict[str, float]]:
    """Maps of each image's own text beside baselines."""
    model, n_layers = world.model, int(world.model.cfg.n_layers)
    texts = model.encode_text(world.classes)
    own = texts[world.masked_labels]
    against = texts
    maps: dict[str, list[Tensor]] = {}
    for place in range(len(world.masked)):
        pixels, text = world.masked[place : place + 1], own[place : place + 1]
        rows, columns = model.token_layout().grid
        centre = torch.zeros(1, rows, columns)
        centre[:, rows // 4 : rows - rows // 4, columns // 4 : columns - columns // 4] = 1
        similar = lens.similarity_maps(model, pixels, texts)
        found = {
            "parts, text": lens.text_maps(model, pixels, text)[:, 0],
            "parts, text less other texts": lens.text_maps(model, pixels, text, against=against)[
                :, 0
            ],
            "parts of the last layer, less others": lens.text_maps(
                model, pixels, text, against=against, layers=[n_layers - 1]
            )[:, 0],
            "similarity of the patch": similar[:, world.masked_labels[place]],
            "similarity, less other texts": similar[:, world.masked_labels[place]]
            - similar.mean(1),
            "attention of the last layer": lens.attention_maps(model, pixels),
            "the middle of the image": centre,
        }
        for name, heat in found.items():
            maps.setdefault(name, []).append(heat.float())
    scores = {
        name: lens.segmentation_scores(torch.cat(heats), world.masks).to_dict()
        for name, heats in maps.items()
    }
    share = float(world.masks.float().mean())
    scores["everything is background"] = {
        "pixel_accuracy": 1 - share,
        "miou": (1 - share) / 2,
        "mean_ap": share,
        "n_images": len(world.masks),
    }
    return scores


def second_order(world: World) -> dict[str, Any]:
    """First directions of the strongest neurons and of the latents of an SAE, with their words."""
    n_layers = int(world.model.cfg.n_layers)
    pixels = world.pixels[:200]
    texts = world.model.encode_text(world.texts)
    found: dict[str, Any] = {}
    layer = n_layers - 3
    for name, source in (("neurons", layer), ("latents", _sae(world, layer))):
        every = lens.second_order(world.model, pixels, source, batch_size=50, progress=False)
        order = every.strength().argsort(descending=True)[:COMPONENTS].tolist()
        shares = [every.explained(every.which[place]) for place in order]
        coded = [every.words(every.which[place], texts, world.texts, n_words=8) for place in order]
        found[name] = {
            "layer": layer,
            "n": len(every),
            "median_share_of_first_direction": median(shares),
            "median_explained_by_8_texts": median(words.explained for words in coded),
            "strongest": [
                {"component": every.which[place], "words": words.texts[:4]}
                for place, words in zip(order[:6], coded, strict=False)
            ],
        }
    return found


def _sae(world: World, layer: int) -> Any:
    """A small TopK SAE on the stream behind a layer, trained here on the world's own images."""
    from sae_lens import LoggingConfig, TopKTrainingSAEConfig

    d_in = int(world.model.cfg.d_model)
    pictures = [Image.fromarray((255 * _visible(image)).astype(np.uint8)) for image in world.pixels]
    cfg = vp.VisionSAERunnerConfig(
        model_name="demo" if world.name == "drawn" else str(EMOJI),
        images="",
        hook_name=f"blocks.{layer}.hook_resid_post",
        tokens="all",
        sae=TopKTrainingSAEConfig(d_in=d_in, d_sae=4 * d_in, k=16),
        training_tokens=min(200_000, 65 * len(pictures) * 4),
        train_batch_size_tokens=512,
        lr=1e-3,
        output_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    return vp.train(cfg, model=world.model, images=pictures)


def _visible(pixels: Tensor) -> np.ndarray:
    low, high = pixels.amin(), pixels.amax()
    return ((pixels - low) / (high - low)).permute(1, 2, 0).numpy()


def cost(models: dict[str, tuple[VisionBridge, Tensor]], repeats: int) -> list[dict[str, Any]]:
    """Median times, each kind in turn, of a decomposition and of a forward that caches all."""
    rows = []
    for name, (model, pixels) in models.items():
        kinds: dict[str, Callable[[], object]] = {
            "forward": lambda m=model, x=pixels: m(x),
            "forward with cache": lambda m=model, x=pixels: m.run_with_cache(x),
            "layers": lambda m=model, x=pixels: m.decompose(x, heads=False, tokens=False),
            "heads": lambda m=model, x=pixels: m.decompose(x, tokens=False),
            "tokens": lambda m=model, x=pixels: m.decompose(x, heads=False),
            "heads and tokens": lambda m=model, x=pixels: m.decompose(x),
        }
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        with torch.no_grad():
            for turn in range(repeats + 1):
                for kind, run in kinds.items():
                    began = time.perf_counter()
                    run()
                    if turn:  # the first is to warm up
                        times[kind].append(time.perf_counter() - began)
        cached = times["forward with cache"]
        ratios = {
            kind: median(a / b for a, b in zip(taken, cached, strict=True))
            for kind, taken in times.items()
        }
        rows.append(
            {
                "model": name,
                "batch": len(pixels),
                "seconds": {kind: median(taken) for kind, taken in times.items()},
                "over_forward_with_cache": ratios,
            }
        )
        logger.info("%s: %s", name, {k: round(v, 2) for k, v in ratios.items()})
    return rows


def cost_models(worlds: list[World], *, small: bool) -> dict[str, tuple[VisionBridge, Tensor]]:
    """The two models, and a CLIP and a SigLIP of a base size with random weights."""
    import transformers as t

    found = {world.name: (world.model, world.pixels[:32]) for world in worlds}
    if small:
        return found
    base = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
    vision = {**base, "num_attention_heads": 12, "image_size": 224}
    text = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 99}
    text |= {"num_attention_heads": 4}
    clip = t.CLIPConfig(
        vision_config={**vision, "patch_size": 32}, text_config=text, projection_dim=512
    )
    siglip = t.SiglipConfig(
        vision_config={**vision, "patch_size": 32}, text_config={**text, "projection_size": 768}
    )
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    found["CLIP ViT-B/32 (random weights)"] = (vp.wrap(t.CLIPModel(clip).eval()), pixels)
    found["SigLIP ViT-B/32 (random weights)"] = (vp.wrap(t.SiglipModel(siglip).eval()), pixels)
    return found


# ---------------------------------------------------------------- the run


def run(cfg: Config) -> dict[str, Any]:
    """Measure everything."""
    torch.set_num_threads(cfg.threads)
    environment = machine("transformers", "transformer-lens", "scikit-learn")
    worlds = [drawn_world(cfg)]
    if EMOJI.is_dir() and NOTO.is_file():
        worlds.append(emoji_world(cfg))
    else:
        logger.warning("the emoji CLIP and noto are not beside the checkout: left out")
    found: dict[str, Any] = {}
    for world in worlds:
        began = time.perf_counter()
        ablated = ablation(world)
        found[world.name] = {
            "n_images": len(world.pixels),
            "n_classes": len(world.classes),
            "parts": _parts(world),
            "ablation": ablated.to_dict()["rows"],
        }
        stages: dict[str, Callable[[], Any]] = {
            "textspan": lambda w=world, a=ablated: spans(w, a, cfg),
            "segmentation": lambda w=world: segmentation(w),
            "second_order": lambda w=world: second_order(w),
        }
        for stage, measure in stages.items():
            found[world.name][stage] = measure()
            seconds = time.perf_counter() - began
            logger.info("%s, %s done after %.0f s", world.name, stage, seconds)
    timed = cost(cost_models(worlds, small=cfg.small), cfg.repeats)
    return {
        "schema": SCHEMA,
        "environment": environment,
        "setting": {
            "n_images": cfg.n_images,
            "n_masks": cfg.n_masks,
            "repeats": cfg.repeats,
            "seed": cfg.seed,
        },
        "target": {"times_forward_with_cache": TARGET},
        "cost": timed,
        "worlds": found,
    }


def _parts(world: World) -> dict[str, Any]:
    """Shares of layers, and how far the parts are from the embedding."""
    pixels = world.pixels[:128]
    found = world.model.decompose(pixels, heads=False, tokens=False)
    off = (found.total() - world.model.encode_image(pixels, normalize=False)).abs().max()
    return {"shares": found.shares(), "largest_difference": float(off)}


def table(found: dict[str, Any]) -> str:
    """The Markdown."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: dict[str, Any]) -> Iterator[str]:
    device = found["environment"]["device"]
    yield f"`python -m benchmarks.decompose`, {device}, {found['environment']['threads']} threads."
    yield ""
    yield f"Times a forward that caches everything (aim: at most {TARGET:g}):"
    yield ""
    yield "| model | batch | plain forward | layers | heads | tokens | heads and tokens |"
    yield "|---|---|---|---|---|---|---|"
    for row in found["cost"]:
        over = row["over_forward_with_cache"]
        cells = [over[k] for k in ("forward", "layers", "heads", "tokens", "heads and tokens")]
        yield f"| {row['model']} | {row['batch']} | " + " | ".join(f"{c:.2f}" for c in cells) + " |"
    for name, world in found["worlds"].items():
        yield ""
        yield f"### {name}: {world['n_images']:,} images, {world['n_classes']:,} classes"
        yield ""
        off = world["parts"]["largest_difference"]
        yield f"The parts sum to the embedding to {off:.0e}. Replaced by their means:"
        yield ""
        yield "| replaced | cosine | same answer | accuracy |"
        yield "|---|---|---|---|"
        for row in world["ablation"]:
            if row["kind"] != "head":
                yield (
                    f"| {row['name']} | {row['cosine']:.3f} | {row['agreement']:.3f} | "
                    f"{row['accuracy']:.3f} |"
                )
        yield ""
        span = world["textspan"]
        yield (
            "TEXTSPAN of the heads whose mean does worst. With every head of the last four layers "
            "replaced by its projection onto five texts, accuracy goes from "
            f"{span['accuracy']:.3f} to {span['accuracy_projected']:.3f}."
        )
        yield ""
        yield "| head | accuracy without | variance explained | texts |"
        yield "|---|---|---|---|"
        for head in span["heads"]:
            last = head["explained"][-1] if head["explained"] else 0.0
            yield (
                f"| {head['head']} | {head['accuracy_without']:.3f} | {last:.2f} | "
                f"{', '.join(head['texts'])} |"
            )
        yield ""
        scores = span["properties"]
        yield (
            f"Consistency of the heads {scores['consistency']:.2f} (texts drawn at random "
            f"{scores['chance']:.2f}), disentanglement {scores['disentanglement']:.2f}."
        )
        yield ""
        yield "| map of the object's text | mIoU | pixel accuracy | mean AP |"
        yield "|---|---|---|---|"
        for kind, row in world["segmentation"].items():
            yield (
                f"| {kind} | {row['miou']:.3f} | {row['pixel_accuracy']:.3f} | "
                f"{row['mean_ap']:.3f} |"
            )
        yield ""
        yield "| second order | layer | first direction's share | in 8 texts | strongest |"
        yield "|---|---|---|---|---|"
        for kind, row in world["second_order"].items():
            words = "; ".join(
                f"{one['component']}: {', '.join(one['words'][:2])}" for one in row["strongest"][:3]
            )
            yield (
                f"| {kind} | {row['layer']} | {row['median_share_of_first_direction']:.2f} | "
                f"{row['median_explained_by_8_texts']:.2f} | {words} |"
            )


def main(cfg: Config) -> None:
    """Measure, print the table and write the files."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if cfg.small:
        cfg = Config(n_images=80, n_masks=12, repeats=2, small=True, out=cfg.out)
    found = run(cfg)
    logger.info("%s", table(found))
    if cfg.small and cfg.out is None:
        return
    out = cfg.out or RESULTS
    out.mkdir(parents=True, exist_ok=True)
    (out / "decompose.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "decompose.md").write_text(table(found))


if __name__ == "__main__":
    main(tyro.cli(Config))
