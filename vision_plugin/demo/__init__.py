"""The demo world: drawn images whose factors are all known, a small CLIP and a small LLaVA.

```python
from vision_plugin.demo import checkpoint_path, draw, factor_codes

world = draw(1000, seed=7, words=0.3)
world.images[0], world.captions[0], world.scenes[0], world.masks[0]
codes, names = factor_codes(world.scenes, "shape")
model = vision_plugin.load_model(str(checkpoint_path()))
```

Importing this package needs numpy and Pillow alone.
"""

from __future__ import annotations

from pathlib import Path

from vision_plugin.demo._captions import (
    Concept,
    caption,
    concept_vocabulary,
    phrase,
    zero_shot_prompts,
)
from vision_plugin.demo._factors import (
    COLOURS,
    FACTORS,
    HELD_OUT,
    NO_WORD,
    SHAPE_GROUPS,
    SHAPES,
    TRAINING_SEED,
    WORDS,
    Scene,
    factor_codes,
    taxonomy,
)
from vision_plugin.demo._render import IMAGE_SIZE, object_mask, render
from vision_plugin.demo._world import DemoWorld, Drawn, draw

__all__ = [
    "COLOURS",
    "FACTORS",
    "HELD_OUT",
    "IMAGE_SIZE",
    "NO_WORD",
    "SHAPES",
    "SHAPE_GROUPS",
    "TRAINING_SEED",
    "WORDS",
    "Concept",
    "DemoWorld",
    "Drawn",
    "Scene",
    "caption",
    "checkpoint_path",
    "concept_vocabulary",
    "draw",
    "factor_codes",
    "llava_path",
    "object_mask",
    "phrase",
    "render",
    "taxonomy",
    "zero_shot_prompts",
]


def checkpoint_path() -> Path:
    """Return the folder of the packaged checkpoint: a Hugging Face `CLIPModel` with its processor.

    Raises:
        FileNotFoundError: the installation lacks the checkpoint.

    Examples:
        >>> sorted(file.name for file in vp.demo.checkpoint_path().glob("*.safetensors"))
        ['model.safetensors']
    """
    return _packaged("checkpoint", "train_clip")


def llava_path() -> Path:
    """Return the folder of the packaged `LlavaForConditionalGeneration` with its processor.

    Its vision tower is the tower of the checkpoint in :func:`checkpoint_path`.

    Raises:
        FileNotFoundError: the installation lacks the checkpoint.

    Examples:
        >>> vlm = vp.load_vlm(vp.demo.llava_path())
        >>> vlm.vision.cfg.n_layers, vlm.language.cfg.n_layers
        (4, 2)
    """
    return _packaged("llava", "train_llava")


def _packaged(name: str, script: str) -> Path:
    folder = Path(__file__).parent / name
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"{folder} holds no model.safetensors. Install vision_plugin from its wheel, or train "
            f"the checkpoint: python -m benchmarks.demo_checkpoint.{script} --out {folder}"
        )
    return folder
