"""The packaged LLaVA: a standard checkpoint over the demo CLIP's tower that answers in words."""

from __future__ import annotations

import pytest
import torch

import vision_plugin as vp
from benchmarks.demo_checkpoint._llava import build_processor
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
    world = draw(60, seed=77)
    images = list(world.images)
    for question in (*QUESTIONS.values(), ONE_WORD):
        said = vlm.generate(images, question, batch_size=60)
        right = [word == answer(question, s) for word, s in zip(said, world.scenes, strict=True)]
        assert sum(right) >= 50, question
