"""Train the small LLaVA of the drawn world, save it, and measure what was saved.

```
python -m benchmarks.demo_checkpoint.train_llava --out vision_plugin/demo/llava
```

It takes some twenty minutes on one core and no network. The folder is an ordinary Hugging Face
checkpoint: `LlavaForConditionalGeneration.from_pretrained` and `AutoProcessor.from_pretrained`
load it. Its vision tower is the tower of the demo CLIP, to the bit.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

sys.path.insert(0, str(Path(__file__).parents[2]))  # a bare checkout works, too

from benchmarks.demo_checkpoint._llava import PROMPT, LlavaTraining, ask, train_llava
from benchmarks.demo_checkpoint._saving import Checkpoint, Stopwatch, save_half
from vision_plugin.demo import Scene, checkpoint_path, draw, render
from vision_plugin.demo._factors import Combinations
from vision_plugin.demo.dialogue import ONE_WORD, QUESTIONS, answer

logger = logging.getLogger(__name__)
EVALUATION_SEED = 30_000_000
DRAWN: Mapping[str, Combinations] = {"new images": "training", "new pairs": "held out"}
"""What is measured on, and which pairs of shape and colour are drawn for it."""


@dataclass(frozen=True, kw_only=True)
class TrainLlava(Checkpoint):
    """Train the small LLaVA, save it, and measure what was saved."""

    training: tyro.conf.OmitArgPrefixes[LlavaTraining] = field(default_factory=LlavaTraining)
    """How to train."""


def main() -> None:
    """Run the command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run(tyro.cli(TrainLlava, description=__doc__))


def run(config: TrainLlava) -> dict[str, dict[str, float]]:
    """Train, save and measure; return the figures that were written to `evaluation.json`."""
    watch = Stopwatch()
    model, processor = train_llava(config.training, checkpoint_path())
    cost = watch.cost()
    save(model, processor, config.out)
    logger.info("saved to %s after %.1f minutes; measuring", config.out, cost["minutes"])
    measured = {
        name: evaluate(config.out, images=config.evaluation_images, combinations=combinations)
        for name, combinations in DRAWN.items()
    }
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    record = {
        "schema_version": 1,
        "images": config.evaluation_images,
        "seed": EVALUATION_SEED,
        "accuracy": measured,
        "trained_parameters": sum(trained),
        "training": asdict(config.training),
        **cost,
    }
    (config.out / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    (config.out / "README.md").write_text(_card(sum(trained), config, measured), "utf-8")
    logger.info("%s", json.dumps(measured, indent=2))
    return measured


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write weights, settings of generation, and the processor."""
    save_half(model, folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)


@torch.no_grad()
def evaluate(folder: Path, *, images: int, combinations: Combinations) -> dict[str, float]:
    """Return the share of right answers by question, on images that were never seen."""
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    ).eval()
    processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
    scenes = draw(images, seed=EVALUATION_SEED, combinations=combinations).scenes
    random = np.random.default_rng(0)
    kinds = {**{factor: [text] * images for factor, text in QUESTIONS.items()}}
    kinds["one word"] = [ONE_WORD] * images
    for word in ("yes", "no"):
        kinds[f"is there: {word}"] = [is_there_question(scene, word, random) for scene in scenes]
    right: dict[str, list[bool]] = {kind: [] for kind in kinds}
    for start in range(0, images, 100):
        some = scenes[start : start + 100]
        drawn = [render(scene) for scene in some]
        for kind, questions in kinds.items():
            asked = questions[start : start + 100]
            texts = [PROMPT.format(question) for question in asked]
            inputs = processor(text=texts, images=drawn, padding=True, return_tensors="pt")
            ids = model.generate(**inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            said = processor.batch_decode(ids, skip_special_tokens=True)
            right[kind] += [
                words.strip() == answer(question, scene)
                for words, question, scene in zip(said, asked, some, strict=True)
            ]
    return {kind: round(float(np.mean(hits)), 4) for kind, hits in right.items()}


def is_there_question(scene: Scene, word: str, random: np.random.Generator) -> str:
    """Return a question that has this answer."""
    while True:
        question = ask(scene, random)
        if question.startswith("Is there") and answer(question, scene) == word:
            return question


def _card(trained: int, config: TrainLlava, measured: dict[str, dict[str, float]]) -> str:
    seen, unseen = measured.values()
    rows = [f"| {kind} | {share:.1%} | {unseen[kind]:.1%} |" for kind, share in seen.items()]
    training = config.training
    return "\n".join(
        [
            "# A small LLaVA of the demo world",
            "",
            "A Hugging Face `LlavaForConditionalGeneration`: the vision tower of the demo CLIP "
            "(frozen; the projector reads its third block's output, without the class token), a "
            f"projector and a Llama of {training.layers} blocks (width {training.width}). "
            f"{trained:,} parameters were trained, on {training.images:,} drawn images without "
            "words. Weights are float16 and load as float32.",
            "",
            "```",
            "python -m benchmarks.demo_checkpoint.train_llava --out vision_plugin/demo/llava",
            "```",
            "",
            f"Right answers on {config.evaluation_images:,} images that it never saw, and on as "
            "many with pairs of shape and colour that neither it nor its tower ever saw:",
            "",
            f"| asked | {' | '.join(measured)} |",
            "|---|---|---|",
            *rows,
            "",
            '"One word" is "What is shown in this image? Use exactly one word!", whose answer is '
            "the shape. `evaluation.json` holds these figures and the training's settings.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
