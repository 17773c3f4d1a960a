"""The texts: true, complete, and with the weakness for printed words that was asked for."""

from __future__ import annotations

import numpy as np
import pytest

from vision_plugin.demo import (
    FACTORS,
    HELD_OUT,
    NO_WORD,
    Scene,
    caption,
    concept_vocabulary,
    draw,
    phrase,
    zero_shot_prompts,
)
from vision_plugin.demo._captions import web_caption

SCENE = Scene(
    shape="star",
    colour="orange",
    texture="striped",
    background="grass",
    position="top left",
    size="large",
    word="heart",
)


def test_a_caption_names_every_factor() -> None:
    assert caption(SCENE) == (
        "a picture of a large orange striped star on grass in the top left with the word heart"
    )
    for scene, text in zip(draw(200, seed=0).scenes, draw(200, seed=0).captions, strict=True):
        said = set(text.split())
        assert {scene.shape, scene.colour, scene.texture, scene.background, scene.size} <= said
        assert set(scene.position.split()) <= said
        assert "word" not in said


def test_a_caption_mentions_only_what_it_is_asked_to() -> None:
    assert caption(SCENE, factors=["colour"]) == "a picture of an orange object"
    assert caption(SCENE, factors=["shape", "word"]) == "a picture of a star with the word heart"
    assert caption(SCENE, factors=["word"]) == "a picture of the word heart"


def test_captions_tell_scenes_apart() -> None:
    texts = {phrase({factor: name}) for factor, names in FACTORS.items() for name in names} - {
        phrase({"word": NO_WORD})
    }
    assert len(texts) == sum(len(names) for names in FACTORS.values()) - 1


@pytest.mark.parametrize("factor", list(FACTORS))
def test_there_is_one_prompt_per_value(factor: str) -> None:
    texts, names = zero_shot_prompts(factor)
    assert names == tuple(name for name in FACTORS[factor] if name != NO_WORD)
    for text, name in zip(texts, names, strict=True):
        assert set(name.split()) <= set(text.split())


def test_the_vocabulary_holds_every_value_and_every_pair_once() -> None:
    concepts = concept_vocabulary()
    assert len({concept.text for concept in concepts}) == len(concepts)
    single = sum(len(zero_shot_prompts(factor)[0]) for factor in FACTORS)
    pairs = [concept for concept in concepts if concept.factor == "colour and shape"]
    assert len(pairs) == 72
    assert len(concepts) == single + 72
    true = [concept.text for concept in concepts if concept.shown_in(SCENE)]
    assert "a picture of an orange star" in true
    assert "a picture of the word heart" in true
    assert "a picture of a heart" not in true
    assert len(true) == 8


def test_web_captions_believe_a_printed_word_as_often_as_asked() -> None:
    random = np.random.default_rng(0)
    captions = [web_caption(SCENE, random, fooled=0.6) for _ in range(2000)]
    fooled = [said for said in captions if said.believed["shape"] == "heart"]
    assert abs(len(fooled) / len(captions) - 0.6) < 0.04
    for said in captions:
        if said in fooled:
            assert "heart" in said.text
            assert "word" not in said.text
        else:
            assert "the word heart" in said.text
            assert said.believed == {factor: SCENE.value(factor) for factor in FACTORS}


def test_web_captions_of_images_without_words_are_true() -> None:
    random = np.random.default_rng(0)
    for scene in draw(200, seed=1).scenes:
        said = web_caption(scene, random, fooled=1.0)
        assert said.believed == {factor: scene.value(factor) for factor in FACTORS}
        assert set(said.text.split()) <= set(caption(scene).split()) | {"an", "object"}


def test_web_captions_never_make_up_a_held_out_pair() -> None:
    random = np.random.default_rng(0)
    for scene in draw(600, seed=1, words=1, combinations="training").scenes:
        believed = web_caption(scene, random, fooled=1.0).believed
        assert (believed["shape"], believed["colour"]) not in HELD_OUT


def test_an_unknown_value_is_named() -> None:
    with pytest.raises(ValueError, match=r"colour='mauve'.*red"):
        phrase({"colour": "mauve"})
    with pytest.raises(ValueError, match=r"factor='form'.*shape"):
        zero_shot_prompts("form")
