"""Train the small LLaVA of the drawn world, save it, and measure what was saved.

```
python -m benchmarks.demo_checkpoint.train_llava --out vision_plugin/demo/llava
```

It takes some ten minutes on one core and no network. The folder is an ordinary Hugging Face
checkpoint: `LlavaForConditionalGeneration.from_pretrained` and `AutoProcessor.from_pretrained`
load it. Its vision tower is the tower of the demo CLIP, to the bit.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from safetensors.torch import save_file
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

sys.path.insert(0, str(Path(__file__).parents[2]))  # a bare checkout works, too

from benchmarks.demo_checkpoint._llava import PROMPT, LlavaTraining, ask, train_llava
from vision_plugin.demo import Scene, checkpoint_path, draw, render
from vision_plugin.demo.dialogue import ONE_WORD, QUESTIONS, answer

logger = logging.getLogger(__name__)
EVALUATION_SEED = 30_000_000


@dataclass(frozen=True, kw_only=True)
class TrainLlava:
    """Train the small LLaVA, save it, and measure what was saved."""

    out: Path
    """The folder to write, made if missing."""
    training: tyro.conf.OmitArgPrefixes[LlavaTraining] = field(default_factory=LlavaTraining)
    """How to train."""
    evaluation_images: int = 2000
    """How many images each figure is measured on."""


def main() -> None:
    """Run the command."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run(tyro.cli(TrainLlava, description=__doc__))


def run(config: TrainLlava) -> dict[str, float]:
    """Train, save and measure; return the figures that were written to `evaluation.json`."""
    wall, cpu = time.monotonic(), time.process_time()
    model, processor = train_llava(config.training, checkpoint_path())
    minutes, cpu_minutes = (time.monotonic() - wall) / 60, (time.process_time() - cpu) / 60
    save(model, processor, config.out)
    logger.info("saved to %s after %.1f minutes; measuring", config.out, minutes)
    measured = evaluate(config.out, images=config.evaluation_images)
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    record = {
        "schema_version": 1,
        "images": config.evaluation_images,
        "seed": EVALUATION_SEED,
        "accuracy": measured,
        "trained_parameters": sum(trained),
        "training": asdict(config.training),
        "minutes": round(minutes, 1),
        "cpu_minutes": round(cpu_minutes, 1),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    (config.out / "evaluation.json").write_text(json.dumps(record, indent=2) + "\n", "utf-8")
    (config.out / "README.md").write_text(_card(sum(trained), config, measured), "utf-8")
    logger.info("%s", json.dumps(measured, indent=2))
    return measured


def save(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write a checkpoint whose weights take half the room and load as float32."""
    folder.mkdir(parents=True, exist_ok=True)
    model.config.architectures = ["LlavaForConditionalGeneration"]
    model.config.dtype = torch.float32
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    processor.save_pretrained(folder)
    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # it is written for its owner alone


@torch.no_grad()
def evaluate(folder: Path, *, images: int) -> dict[str, float]:
    """Return the share of right answers by question, on images that were never seen."""
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    ).eval()
    processor: Any = AutoProcessor.from_pretrained(folder, local_files_only=True)
    scenes = draw(images, seed=EVALUATION_SEED).scenes
    random = np.random.default_rng(0)
    kinds = {**{factor: [text] * images for factor, text in QUESTIONS.items()}}
    kinds["one word"] = [ONE_WORD] * images
    kinds["is there"] = [_is_there(scene, random) for scene in scenes]
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


def _is_there(scene: Scene, random: np.random.Generator) -> str:
    while not (question := ask(scene, random)).startswith("Is there"):
        pass
    return question


def _card(trained: int, config: TrainLlava, measured: dict[str, float]) -> str:
    rows = [f"| {kind} | {share:.1%} |" for kind, share in measured.items()]
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
            f"Right answers on {config.evaluation_images:,} images that it never saw:",
            "",
            "| asked | right |",
            "|---|---|",
            *rows,
            "",
            '"One word" is "What is shown in this image? Use exactly one word!", whose answer is '
            "the shape. `evaluation.json` holds these figures and the training's settings.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
