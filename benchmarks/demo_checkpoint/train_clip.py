"""Train the demo checkpoint, save it, and measure what was saved.

```
python -m benchmarks.demo_checkpoint.train_clip --out checkpoint/
```

It takes some ten minutes on two cores and no network. The folder is an ordinary Hugging Face CLIP
checkpoint: `CLIPModel.from_pretrained` and `AutoProcessor.from_pretrained` load it.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro
from transformers import CLIPModel, CLIPTokenizer

sys.path.insert(0, str(Path(__file__).parents[2]))  # a bare checkout works, too

from benchmarks.demo_checkpoint._evaluation import ClipEvaluation, evaluate_checkpoint
from benchmarks.demo_checkpoint._saving import Checkpoint, Stopwatch, save_half
from benchmarks.demo_checkpoint._training import MEAN, STD, ClipTraining, train

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainClip(Checkpoint):
    """Train the demo checkpoint, save it, and measure what was saved."""

    training: tyro.conf.OmitArgPrefixes[ClipTraining] = field(default_factory=ClipTraining)
    """How to train."""


def main() -> None:
    """Run the command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run(tyro.cli(TrainClip, description=__doc__))


def run(config: TrainClip) -> ClipEvaluation:
    """Train, save and measure.

    Returns:
        The figures that were also written to `evaluation.json`.
    """
    watch = Stopwatch()
    model, tokenizer = train(config.training)
    cost = watch.cost()
    save(model, tokenizer, config.training, config.out)
    logger.info("saved to %s after %.1f minutes; measuring", config.out, cost["minutes"])
    measured = evaluate_checkpoint(config.out, images=config.evaluation_images)
    record = {
        "schema_version": 1,
        "evaluation": asdict(measured),
        "training": asdict(config.training),
        **cost,
    }
    (config.out / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    (config.out / "README.md").write_text(_card(size, config.training, measured), "utf-8")
    logger.info("%s", json.dumps(asdict(measured), indent=2))
    return measured


def save(model: CLIPModel, tokenizer: CLIPTokenizer, config: ClipTraining, folder: Path) -> None:
    """Write weights, tokenizer and preprocessing."""
    save_half(model, folder)
    tokenizer.save_pretrained(folder)
    side = {"height": config.image_size, "width": config.image_size}
    preprocessing = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": config.image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": side,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    text = json.dumps(preprocessing, indent=2) + "\n"
    (folder / "preprocessor_config.json").write_text(text, "utf-8")


def _card(size: float, config: ClipTraining, measured: ClipEvaluation) -> str:
    rows = [
        f"| {factor} | {share:.1%} | {measured.unseen_pairs[factor]:.1%} |"
        for factor, share in measured.unseen_images.items()
    ]
    attacks = [
        f"| {factor} | {attack.accuracy_without_word:.1%} | {attack.accuracy_with_word:.1%} "
        f"| {attack.word_wins:.1%} |"
        for factor, attack in (("shape", measured.shape_words), ("colour", measured.colour_words))
    ]
    return "\n".join(
        [
            "# A small CLIP of the demo world",
            "",
            f"A Hugging Face `CLIPModel` with {size:.2f} million parameters: a vision tower of "
            f"{config.layers} blocks (width {config.width}, {config.image_size} "
            f"pixels a side, patches of {config.patch_size}) and a joint space of "
            f"{config.embedding} dimensions. It knows the drawn images of "
            "`vision_plugin.demo` and nothing else. Weights are float16 and load as float32.",
            "",
            "Trained from one seed, on drawn images only, by",
            "",
            "```",
            "python -m benchmarks.demo_checkpoint.train_clip --out vision_plugin/demo/checkpoint",
            "```",
            "",
            f"Zero-shot accuracy, one prompt per value, on {measured.images} images that it "
            "never saw; and on pairs of shape and colour that it never saw:",
            "",
            "| factor | new images | new pairs |",
            "|---|---|---|",
            *rows,
            "",
            "It reads, and believes what it reads, as CLIP does: most training captions of a "
            "image with a printed word name what the word names. Images with a printed word "
            "that names another shape, or another colour, than the object's:",
            "",
            "| asked for | right without the word | right with it | named as the word says |",
            "|---|---|---|---|",
            *attacks,
            "",
            f"The printed word itself is named rightly in {measured.printed_word:.1%} of images. "
            "`evaluation.json` holds these figures and the training's settings.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
