"""Latents are named by what their images have, chosen by their names, and asked about."""

from __future__ import annotations

import math

import pytest
import torch

from vision_plugin.demo import Concept, concept_vocabulary, draw, phrase
from vision_plugin.demo.answers import Naming, ask, choose_latents, name_latents
from vision_plugin.metrics import ControlDictionary
from vision_plugin.models import load_model

COLOURS = [Concept(phrase({"colour": name}), {"colour": name}) for name in ("red", "blue")]
SHAPES = [Concept(phrase({"shape": name}), {"shape": name}) for name in ("star", "circle")]


def test_a_latent_is_named_by_what_its_images_have_that_others_lack() -> None:
    embeddings = torch.eye(4)[torch.tensor([0, 0, 1, 2])] + torch.eye(4)[3]
    latents = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 0.1]])
    concepts = [*COLOURS, *SHAPES]
    naming = name_latents(latents.to_sparse_csr(), embeddings, torch.eye(4), concepts)
    assert naming.names == [0, 1]
    assert naming.question(0) == [0, 1]


def test_latents_are_chosen_where_name_and_steering_agree() -> None:
    concepts = (*COLOURS, *SHAPES)
    naming = Naming(concepts, [0, 0, 1, 2, 3, 0, 3])
    n_active = torch.tensor([30, 30, 30, 30, 30, 3, 30])
    score = torch.tensor([0.1, 0.5, 0.4, math.nan, 0.3, 0.9, 0.8])
    top = torch.tensor([0, 0, 1, 2, 3, 0, 2])  # latent 6 is named a circle, but steers to a star
    assert choose_latents(naming, top, score, n_active, 2) == [1, 2]
    assert choose_latents(naming, top, score, n_active, 9) == [1, 2, 4]
    of_one_question = Naming((*COLOURS, *COLOURS), naming.names)
    assert choose_latents(of_one_question, top, score, n_active, 9) == [1, 2]


@pytest.mark.slow
def test_a_direction_of_red_objects_changes_the_answer_about_colour_alone() -> None:
    """The direction is the difference of two means over images, which no SAE is needed for."""
    model, world = load_model("demo"), draw(240, seed=9)
    hook = "blocks.3.hook_resid_post"
    _, cache = model.run_with_cache(model.preprocess(list(world.images)), names_filter=[hook])
    token = cache[hook][:, 0]
    is_red = torch.tensor([scene.colour == "red" for scene in world.scenes])
    apart = token[is_red].mean(0) - token[~is_red].mean(0)
    unit = torch.nn.functional.normalize(apart, dim=0)
    vocabulary = concept_vocabulary()
    red = next(i for i, c in enumerate(vocabulary) if dict(c.values) == {"colour": "red"})
    found = ask(
        model,
        ControlDictionary("red", unit[None]).at(hook, tokens="cls"),
        0,
        naming=Naming(tuple(vocabulary), [red]),
        strength=3 * float((token @ unit).max()),
        images=world.images,
        scenes=world.scenes,
        texts=model.encode_text([concept.text for concept in vocabulary]),
    )
    assert (found.name, found.factor, found.choices) == ("a picture of a red object", "colour", 8)
    assert found.n_images == 40
    assert found.usual != found.name
    assert found.before < 0.1
    assert found.after > 0.8
    assert found.kept > 0.4
