"""Training a small CLIP on drawn images, from scratch and from one seed, in minutes on a CPU.

Two stages. First the text tower alone learns to embed captions, with a fixed direction for each
value of each factor as its target, which takes seconds. Then the image tower learns against it,
with CLIP's contrastive loss, while the text tower stays as it is (the mirror image of Zhai et al.
2022, "LiT: Zero-shot transfer with locked-image text tuning"). Two untrained towers that wait for
each other take more than ten times as many images.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from benchmarks.demo_checkpoint._muon import Muon
from benchmarks.demo_checkpoint._tokenizer import build_tokenizer
from vision_plugin.demo._captions import phrase, web_caption, zero_shot_prompts
from vision_plugin.demo._factors import (
    FACTORS,
    NO_WORD,
    TRAINING_SEED,
    Scene,
    SceneRule,
    sample_scene,
)
from vision_plugin.demo._pixels import draw_pixels
from vision_plugin.demo._world import draw

logger = logging.getLogger(__name__)

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the training of every checkpoint of the demo world has in common."""

    seed: int = TRAINING_SEED
    """Seeds the images, the texts, the weights and the order of the batches."""
    batch_size: int = 64
    """Images, each with one text, per step."""
    learning_rate: float = 2e-3
    """AdamW's peak rate, for all but the blocks' matrices; reached after the warm-up, then lowered
    along a cosine."""
    matrix_learning_rate: float = 0.02
    """Muon's peak rate, for the blocks' matrices."""


@dataclass(frozen=True, kw_only=True)
class ClipTraining(Training):
    """How the demo checkpoint is trained."""

    images: int = 20_000
    """How many images are drawn."""
    epochs: int = 6
    """How often each is seen, each time with another caption."""
    text_steps: int = 400
    """Steps of the text tower's own training, at four times the batch size."""
    words: float = 0.5
    """The share of images with a printed word."""
    fooled: float = 0.65
    """The share of captions of such images that take the word for the object."""
    layers: int = 4
    """Blocks of the vision tower."""
    width: int = 128
    """The vision tower's residual width (`d_model`)."""
    embedding: int = 64
    """The joint space's dimensions; at least one per value of a factor."""
    image_size: int = 64
    """The side, in pixels, of what the vision tower sees."""
    patch_size: int = 8
    """The side of a patch in pixels."""
    context: int = 32
    """The text tower's context in tokens."""


def train(config: ClipTraining) -> tuple[CLIPModel, CLIPTokenizer]:
    """Train a CLIP model from scratch.

    Returns:
        The model in float32, in evaluation mode, and its tokenizer.
    """
    torch.manual_seed(config.seed)
    tokenizer = build_tokenizer(_every_phrase(), max_length=config.context)
    model = CLIPModel(_architecture(config, tokenizer))
    _start_positions(model)
    _train_texts(model, tokenizer, config)
    scenes = draw(
        config.images, seed=config.seed, words=config.words, combinations="training"
    ).scenes
    started = time.monotonic()
    pixels = draw_pixels(scenes, config.image_size)
    logger.info("drew %d images in %.0f s", len(pixels), time.monotonic() - started)
    _train_images(model, tokenizer, scenes, pixels, config)
    model.eval()
    return model, tokenizer


def _train_texts(model: CLIPModel, tokenizer: CLIPTokenizer, config: ClipTraining) -> None:
    """Teach the text tower where each caption belongs in the joint space.

    Each value of each factor has a direction, all at right angles, and a caption belongs at the sum
    of the directions of what it says.
    """
    values = [(f, name) for f, names in FACTORS.items() for name in names if name != NO_WORD]
    row = {value: index for index, value in enumerate(values)}
    directions = nn.init.orthogonal_(torch.empty(len(values), config.embedding))
    random = np.random.default_rng([config.seed, 1])
    rule = SceneRule(words=0.5, combinations="training")
    steps = Steps([model.text_model, model.text_projection], config, config.text_steps)
    size = 4 * config.batch_size
    for step in range(config.text_steps):
        texts, targets = [], torch.zeros(size, config.embedding)
        for place in range(size):
            scene = sample_scene(config.seed, int(random.integers(2**32)), rule)
            share = random.random()
            said = {f: scene.value(f) for f in FACTORS if random.random() < share}
            said = {f: value for f, value in said.items() if value != NO_WORD}
            said = said or {"shape": scene.shape}
            texts.append(phrase(said))
            targets[place] = directions[[row[item] for item in said.items()]].sum(0)
        features = encode_texts(model, tokenizer, texts)
        loss = 1 - functional.cosine_similarity(features, targets).mean()
        steps.take(loss)
        if step % 100 == 0 or step == config.text_steps - 1:
            logger.info("texts: step %d, loss %.4f", step, loss.item())


def _train_images(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    scenes: Sequence[Scene],
    pixels: UInt8[np.ndarray, "n size size 3"],
    config: ClipTraining,
) -> None:
    """Train the image tower against the text tower."""
    total = config.epochs * (len(scenes) // config.batch_size)
    prompts = {factor: zero_shot_prompts(factor) for factor in FACTORS}
    with torch.no_grad():
        asked = {
            f: encode_texts(model, tokenizer, list(texts)) for f, (texts, _) in prompts.items()
        }
    scale = nn.ParameterList([model.logit_scale])
    steps = Steps([model.vision_model, model.visual_projection, scale], config, total)
    started = time.monotonic()
    model.train()
    for step, (indices, random) in enumerate(_batches(len(scenes), config)):
        captions = [web_caption(scenes[i], random, fooled=config.fooled) for i in indices]
        features = encode_images(model, pixels[indices])
        losses = {"contrast": _contrast(model, tokenizer, features, [s.text for s in captions])}
        for factor, (_, names) in prompts.items():
            # Taken for an object or not, a printed word is still there to be read.
            seen = [
                scenes[index].value(factor) if factor == "word" else said.believed[factor]
                for index, said in zip(indices, captions, strict=True)
            ]
            losses[factor] = _choice(model, features, asked[factor], names, seen)
        steps.take(torch.stack(list(losses.values())).sum())
        model.logit_scale.data.clamp_(max=math.log(100))
        if step % 50 == 0 or step == total - 1:
            elapsed = time.monotonic() - started
            shown = ", ".join(f"{name} {loss.item():.3f}" for name, loss in losses.items())
            logger.info("step %d of %d, %.0f s: %s", step, total, elapsed, shown)


def _contrast(
    model: CLIPModel,
    tokenizer: CLIPTokenizer,
    features: Float[Tensor, "batch d_embed"],
    texts: Sequence[str],
) -> Float[Tensor, ""]:
    """CLIP's symmetric contrastive loss over a batch, where equal captions are equally right."""
    distinct = list(dict.fromkeys(texts))
    matching = torch.tensor([distinct.index(text) for text in texts])
    with torch.no_grad():
        text_features = encode_texts(model, tokenizer, distinct)
    logits = model.logit_scale.exp() * features @ text_features.T
    target = functional.one_hot(matching, len(distinct)).float()
    per_text = -(functional.log_softmax(logits, 0) * (target / target.sum(0))).sum(0)
    return (functional.cross_entropy(logits, matching) + per_text.mean()) / 2


def _choice(
    model: CLIPModel,
    features: Float[Tensor, "batch d_embed"],
    prompts: Float[Tensor, "v d_embed"],
    names: Sequence[str],
    seen: Sequence[str],
) -> Float[Tensor, ""]:
    """Which value of one factor fits the image, among one prompt per value.

    These are the hard negatives, captions that differ in one thing, that a small batch lacks.
    """
    rows = [row for row, value in enumerate(seen) if value in names]
    if not rows:
        return features.new_zeros(())
    target = torch.tensor([names.index(seen[row]) for row in rows])
    logits = model.logit_scale.exp() * features[rows] @ prompts.T
    return functional.cross_entropy(logits, target) * (len(rows) / len(seen))


def encode_images(
    model: CLIPModel, pixels: UInt8[np.ndarray, "n size size 3"]
) -> Float[Tensor, "n d_embed"]:
    """Unit embeddings of images that are already of the vision tower's size."""
    pooled = model.vision_model(pixel_values=normalised(pixels)).pooler_output
    return functional.normalize(model.visual_projection(pooled), dim=-1)


def normalised(
    pixels: UInt8[np.ndarray, "n size size 3"],
) -> Float[Tensor, "n 3 size size"]:
    """Return pixels as the demo checkpoint's preprocessing gives them."""
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def encode_texts(
    model: CLIPModel, tokenizer: CLIPTokenizer, texts: list[str]
) -> Float[Tensor, "n d_embed"]:
    """Unit embeddings of texts."""
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    pooled = model.text_model(**tokens).pooler_output
    return functional.normalize(model.text_projection(pooled), dim=-1)


def _batches(
    images: int, config: ClipTraining
) -> Iterator[tuple[Int[np.ndarray, " batch"], np.random.Generator]]:
    for epoch in range(config.epochs):
        random = np.random.default_rng([config.seed, 2, epoch])
        order = random.permutation(images)
        for start in range(0, images - config.batch_size + 1, config.batch_size):
            yield order[start : start + config.batch_size], random


class Steps:
    """Muon for the blocks' matrices and AdamW for everything else, on one schedule."""

    def __init__(self, modules: Sequence[nn.Module], config: Training, total: int) -> None:
        named = [item for module in modules for item in module.named_parameters()]
        inner = [p for name, p in named if "layers" in name and p.ndim == 2]
        outer = [p for name, p in named if not ("layers" in name and p.ndim == 2)]
        self._parameters = inner + outer
        self._config, self._total, self._done = config, total, 0
        self._muon = Muon(inner, lr=config.matrix_learning_rate)
        self._adam = torch.optim.AdamW(outer, betas=(0.9, 0.98), weight_decay=0.01)

    def take(self, loss: Float[Tensor, ""]) -> None:
        """One step down the gradient of a loss."""
        self._adam.zero_grad()
        for parameter in self._parameters:
            parameter.grad = None
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        warm = max(1, self._total // 20)
        cosine = 0.5 * (1 + math.cos(math.pi * self._done / self._total))
        scale = min((self._done + 1) / warm, cosine)
        for group in self._adam.param_groups:
            group["lr"] = self._config.learning_rate * scale
        self._adam.step()
        self._muon.step(scale)
        self._done += 1


def _every_phrase() -> list[str]:
    return [phrase({factor: name}) for factor, names in FACTORS.items() for name in names] + [
        phrase({"shape": "star", "word": "star"})
    ]


def _architecture(config: ClipTraining, tokenizer: CLIPTokenizer) -> CLIPConfig:
    shared = {"projection_dim": config.embedding, "hidden_act": "gelu"}
    return CLIPConfig(
        text_config={
            **shared,
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": config.context,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            **shared,
            "hidden_size": config.width,
            "intermediate_size": 3 * config.width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.width // 32,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
        },
        projection_dim=config.embedding,
        logit_scale_init_value=math.log(20),
    )


@torch.no_grad()
def _start_positions(model: CLIPModel) -> None:
    """Start the patches' position embeddings as sines and cosines of row and column.

    (Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k", do so for quick training too.)
    """
    positions = model.vision_model.embeddings.position_embedding.weight
    patches, width = len(positions) - 1, positions.shape[1]
    side = math.isqrt(patches)
    frequency = math.pi * 2.0 ** torch.linspace(-1, 2, width // 4)
    place = (torch.arange(side) + 0.5) / side
    waves = torch.cat([(place[:, None] * frequency).sin(), (place[:, None] * frequency).cos()], 1)
    rows, columns = waves.repeat_interleave(side, 0), waves.repeat(side, 1)
    positions[1:] = 0.3 * torch.cat([rows, columns], dim=1)
