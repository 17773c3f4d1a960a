"""The small LLaVA: its processor, its architecture, and the training of its language part.

The vision tower is the demo CLIP's and stays as it is; projector and language model learn to
answer questions about drawn images (Liu et al. 2023, "Visual Instruction Tuning", arXiv 2304.08485,
in one stage).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from benchmarks.demo_checkpoint._training import Steps, Training, normalised
from vision_plugin.demo import FACTORS, Scene, draw
from vision_plugin.demo._pixels import draw_pixels
from vision_plugin.demo.dialogue import ONE_WORD, QUESTIONS, answer, is_there, vocabulary

logger = logging.getLogger(__name__)

SPECIAL = ("<pad>", "<unk>", "<s>", "</s>", "<image>")
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}{% endfor %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PROMPT = "USER: <image> {} ASSISTANT:"
"""What the template makes of a question about one image."""
FEATURE_LAYER = -2
PATCH_SIZE, N_PATCHES = 8, 64
"""Of the demo CLIP."""


@dataclass(frozen=True, kw_only=True)
class LlavaTraining(Training):
    """How the small LLaVA is trained."""

    images: int = 8000
    """How many images are drawn, none with a printed word."""
    steps: int = 4000
    """Steps of the optimizer."""
    layers: int = 2
    """Blocks of the language model."""
    width: int = 128
    """The language model's residual width (`d_model`)."""


def build_processor(clip: Path) -> LlavaProcessor:
    """Return the processor: words, the demo CLIP's image preprocessing and LLaVA's template."""
    words = {word: index for index, word in enumerate((*SPECIAL, *vocabulary()))}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", words["<s>"])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
    images = CLIPImageProcessor.from_pretrained(clip, local_files_only=True)
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def build_model(
    training: LlavaTraining, clip: Path, processor: LlavaProcessor
) -> LlavaForConditionalGeneration:
    """Return an untrained LLaVA around the trained tower of the demo CLIP."""
    trained = CLIPModel.from_pretrained(clip, local_files_only=True, dtype=torch.float32)
    tokenizer = processor.tokenizer
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=training.width,
        intermediate_size=2 * training.width,
        num_hidden_layers=training.layers,
        num_attention_heads=training.width // 32,
        max_position_embeddings=512,
        # Attention begins with scores that differ: a word has to find its patches.
        initializer_range=training.width**-0.5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(training.seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=trained.config.vision_config,
            text_config=text,
            image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
            vision_feature_layer=FEATURE_LAYER,
            vision_feature_select_strategy="default",
            image_seq_length=N_PATCHES,
        )
    )
    model.model.vision_tower.load_state_dict(trained.vision_model.state_dict())
    model.model.vision_tower.requires_grad_(False)
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id = text.bos_token_id, text.eos_token_id
    generation.pad_token_id, generation.max_new_tokens = text.pad_token_id, 4
    return model


def train_llava(
    training: LlavaTraining, clip: Path
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Train projector and language model on questions about drawn images.

    Returns:
        The model in float32, in evaluation mode, and its processor.
    """
    processor = build_processor(clip)
    model = build_model(training, clip, processor)
    scenes = draw(training.images, seed=training.seed, combinations="training").scenes
    started = time.monotonic()
    features = _features(model, scenes)
    logger.info("drew and encoded %d images in %.0f s", len(scenes), time.monotonic() - started)
    random = np.random.default_rng(training.seed)
    learned = [model.model.multi_modal_projector, model.model.language_model, model.lm_head]
    steps = Steps(learned, training, training.steps)
    model.train()
    mean, started = 0.0, time.monotonic()
    for step in range(training.steps):
        chosen = random.integers(len(scenes), size=training.batch_size)
        ids = _dialogues(processor, [scenes[i] for i in chosen], random)
        loss = _loss(model, features[torch.from_numpy(chosen)].float(), ids)
        steps.take(loss)
        mean += (loss.item() - mean) / 50
        if (step + 1) % 100 == 0:
            logger.info("%d: loss %.3f, %.0f s", step + 1, mean, time.monotonic() - started)
    return model.eval(), processor


@torch.no_grad()
def _features(
    model: LlavaForConditionalGeneration, scenes: Sequence[Scene]
) -> Float[Tensor, "n patches d_vision"]:
    """Return what the projector reads of each scene, in float16."""
    side = model.config.vision_config.image_size
    pixels = draw_pixels(scenes, side)
    parts = []
    for start in range(0, len(pixels), 250):
        batch = normalised(pixels[start : start + 250])
        states = model.model.vision_tower(batch, output_hidden_states=True).hidden_states
        parts.append(states[FEATURE_LAYER][:, 1:].half())
    return torch.cat(parts)


def ask(scene: Scene, random: np.random.Generator) -> str:
    """Return a random question about a scene; "Is there a ...?" has "yes" as often as "no"."""
    kinds = (*QUESTIONS, "shape", "texture", "one word", *["is there"] * 4)
    kind = kinds[random.integers(len(kinds))]
    if kind in QUESTIONS:
        return QUESTIONS[kind]
    if kind == "one word":
        return ONE_WORD
    named = ("shape", "colour") if random.random() < 0.5 else ("shape",)
    said = {factor: scene.value(factor) for factor in named}
    if random.random() < 0.5:  # one or all of what is named is something else
        for factor in (named, named[:1], named[-1:])[random.integers(3)]:
            others = [value for value in FACTORS[factor] if value != said[factor]]
            said[factor] = str(random.choice(others))
    return is_there(**said)


def _dialogues(
    processor: LlavaProcessor, scenes: Sequence[Scene], random: np.random.Generator
) -> Int[Tensor, "n length"]:
    """Return token ids of questions with their answers, a word and the end each."""
    tokenizer = processor.tokenizer
    texts, answers = [], []
    for scene in scenes:
        question = ask(scene, random)
        texts.append(PROMPT.format(question).replace("<image>", "<image>" * N_PATCHES))
        answers.append(answer(question, scene))
    ends = torch.full((len(scenes), 1), tokenizer.eos_token_id)
    said = torch.tensor([tokenizer.convert_tokens_to_ids(answers)]).T
    # The padding stands in front, where a causal model of relative positions does not mind it.
    asked = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt").input_ids
    return torch.cat([asked, said, ends], dim=1)


def _loss(
    model: LlavaForConditionalGeneration,
    features: Float[Tensor, "n patches d_vision"],
    ids: Int[Tensor, "n length"],
) -> Float[Tensor, ""]:
    projected = model.model.multi_modal_projector(features)
    embeds = model.get_input_embeddings()(ids)
    here = (ids == model.config.image_token_id).unsqueeze(-1)
    embeds = embeds.masked_scatter(here, projected)
    mask = (ids != model.config.text_config.pad_token_id).long()
    states = model.model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
    ).last_hidden_state
    logits = model.lm_head(states[:, -3:-1])
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, -2:].flatten())
