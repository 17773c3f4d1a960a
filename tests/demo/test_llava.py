"""The packaged LLaVA: a standard checkpoint over the demo CLIP's tower that answers in words."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

import vision_plugin as vp
from benchmarks.demo_checkpoint._llava import ask, build_processor
from benchmarks.demo_checkpoint.train_llava import is_there_question
from vision_plugin.demo import checkpoint_path, draw
from vision_plugin.demo.dialogue import ONE_WORD, QUESTIONS, answer


@pytest.fixture(scope="module")
def vlm() -> vp.VisionLanguageBridge:
    return vp.load_vlm("demo")


def test_its_tower_is_the_demo_clips_to_the_bit(vlm) -> None:
    clip = vp.load_model("demo").native.vision_model.state_dict()
    tower = vlm.vision.native.state_dict()
    assert tower.keys() == clip.keys()
    assert all(torch.equal(tower[name], clip[name]) for name in clip)


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
