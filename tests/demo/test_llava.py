"""The packaged LLaVA: a standard checkpoint over the demo CLIP's tower that answers in words."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

import vision_plugin as vp
from benchmarks.demo_checkpoint._llava import PROMPT, ask, build_processor
from benchmarks.demo_checkpoint.train_llava import is_there_question
from vision_plugin.demo import checkpoint_path, draw, llava_path
from vision_plugin.demo.dialogue import ONE_WORD, QUESTIONS, answer


@pytest.fixture(scope="module")
def vlm() -> vp.VisionLanguageBridge:
    return vp.load_vlm("demo")


def test_its_tower_is_the_demo_clips_to_the_bit(vlm) -> None:
    clip = vp.load_model("demo").native.vision_model.state_dict()
    tower = vlm.vision.native.state_dict()
    assert tower.keys() == clip.keys()
    assert all(torch.equal(tower[name], clip[name]) for name in clip)


@torch.no_grad()
def test_it_computes_what_transformers_own_class_computes(vlm) -> None:
    native = LlavaForConditionalGeneration.from_pretrained(llava_path(), local_files_only=True)
    processor = AutoProcessor.from_pretrained(llava_path(), local_files_only=True)
    images = list(draw(6, seed=80).images)
    question, options = QUESTIONS["colour"], {"max_new_tokens": 4, "do_sample": False}
    inputs = processor(
        text=[PROMPT.format(question)] * 6, images=images, padding=True, return_tensors="pt"
    )
    length = inputs["input_ids"].shape[1]

    def written() -> torch.Tensor:
        return native.eval().generate(**inputs, **options)[:, length:]

    assert torch.equal(vlm(images, question), native(**inputs).logits)
    plain = written()
    assert torch.equal(vlm.generate(images, question, return_type="tokens", **options), plain)
    names = ["vision.blocks.2.hook_resid_post", "blocks.1.hook_resid_post"]
    logits, cache = vlm.run_with_cache(images, question, names_filter=names)
    assert torch.equal(logits, native(**inputs).logits)
    states = native.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    assert torch.equal(cache[names[0]], states.hidden_states[3])
    assert cache[names[1]].shape == (6, length, 128)
    shift = 40 * torch.randn(128, generator=torch.Generator().manual_seed(0))
    handle = native.model.vision_tower.encoder.layers[2].register_forward_hook(
        lambda module, args, output: output + shift, prepend=True
    )
    try:
        edited = written()
    finally:
        handle.remove()
    edit = vp.Edit.add(vp.steering.Directions("blocks.2.hook_resid_post", shift), {0: 1.0})
    with vlm.edit(edit):
        found = vlm.generate(images, question, return_type="tokens", **options)
    assert torch.equal(found, edited)
    assert not torch.equal(found, plain)


def test_its_processor_is_the_one_it_was_trained_with(vlm) -> None:
    trained = build_processor(checkpoint_path())
    question = "Is there a red star?"
    image = draw(1, seed=5).images[0]
    for text in (question, *QUESTIONS.values(), ONE_WORD):
        expected = vlm.prepare(image, text)["input_ids"]
        placed = trained.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}],
            add_generation_prompt=True,
        )
        found = trained(text=[placed], images=[image], return_tensors="pt")["input_ids"]
        assert torch.equal(found, expected)


def test_it_answers_questions_about_new_images(vlm) -> None:
    world = draw(60, seed=77, combinations="training")
    images = list(world.images)
    for question in (*QUESTIONS.values(), ONE_WORD):
        said = vlm.generate(images, question, batch_size=60)
        right = [word == answer(question, s) for word, s in zip(said, world.scenes, strict=True)]
        assert sum(right) >= 54, question


@pytest.mark.parametrize("word", ["yes", "no"])
def test_it_says_what_is_there_and_what_is_not(vlm, word) -> None:
    world, random = draw(120, seed=78, combinations="training"), np.random.default_rng(0)
    asked = [is_there_question(scene, word, random) for scene in world.scenes]
    said = vlm.generate(list(world.images), asked, batch_size=60)
    assert said.count(word) >= 90  # a constant answer has 0 in one of the two


def test_it_was_asked_for_what_is_there_as_often_as_for_what_is_not() -> None:
    world, random = draw(500, seed=79), np.random.default_rng(0)
    said = Counter[str]()
    for scene in world.scenes:
        asked = [ask(scene, random) for _ in range(20)]
        said.update(answer(text, scene) for text in asked if text.startswith("Is there"))
    assert said["yes"] / said.total() == pytest.approx(0.5, abs=0.03)
