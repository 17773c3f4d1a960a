"""Names of features: planted truth, chance, what a model without text gets, and names.json."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import vision_plugin as vp
from tests._models import save_tiny_clip
from vision_plugin.demo import FACTORS, concept_vocabulary, draw
from vision_plugin.images import open_images
from vision_plugin.lens import FeatureNames, read_names, read_vocabulary
from vision_plugin.metrics import ControlDictionary, neuron_dictionary

N = 240
WORDS = [concept.text for concept in concept_vocabulary() if len(concept.values) == 1]
FACTORS_NAMED = ("shape", "colour", "texture", "background")
LABELS = ("column:shape", "column:colour", "column:texture", "column:background")


class Answers(ControlDictionary):
    """A latent for each known fact about the drawn images, whatever the activation says."""

    def __init__(self, directions: Tensor, codes: Tensor) -> None:
        super().__init__("answers", directions, hook_name="unembed.hook_out")
        self.codes, self.seen = codes, 0

    def encode(self, x: Tensor) -> Tensor:
        n = len(x)
        found = self.codes[self.seen : self.seen + n].reshape(*x.shape[:-1], -1)
        self.seen = (self.seen + n) % len(self.codes)
        return found


@pytest.fixture(scope="module")
def world() -> SimpleNamespace:
    drawn = draw(N, seed=3)
    model = vp.load_model("demo")
    images = [drawn.images[i] for i in range(N)]
    return SimpleNamespace(
        model=model, images=images, scenes=drawn.scenes, texts=model.encode_text(WORDS).float()
    )


def codes_of(world: SimpleNamespace, factor: str) -> Tensor:
    """One latent for each value of a factor."""
    values = FACTORS[factor]
    return torch.tensor([[float(s.value(factor) == v) for v in values] for s in world.scenes])


def named(world: SimpleNamespace, sae: Any, **options: Any) -> FeatureNames:
    options = {"vocabulary": WORDS, "progress": False, "batch_size": 40, **options}
    return vp.name_features(world.model, sae, world.images, **options)


def test_directions_that_are_texts_get_exactly_these_names(world: SimpleNamespace) -> None:
    sae = ControlDictionary("texts", world.texts, k=8, hook_name="unembed.hook_out")
    found = named(world, sae, methods=("decoder",))
    assert list(found.candidates["decoder"].names) == WORDS
    assert found.candidates["decoder"].note.startswith("exact")
    assert bool((found.candidates["decoder"].scores > 0.999).all())


def test_latents_of_factors_values_are_named_after_them(world: SimpleNamespace) -> None:
    """Known truth: ``dissect`` says at least 80% of the values, by images alone."""
    truth = [(factor, value) for factor in FACTORS_NAMED for value in FACTORS[factor]]
    codes = torch.cat([codes_of(world, factor) for factor in FACTORS_NAMED], 1)
    found = named(world, Answers(torch.zeros(codes.shape[1], 64), codes), methods=("dissect",))
    concepts = {c.text: c.values for c in concept_vocabulary()}
    right = [
        concepts[name].get(factor) == value
        for name, (factor, value) in zip(found.names, truth, strict=True)
        if name
    ]
    assert len(right) == len(truth) == 27
    assert sum(right) >= 0.8 * len(truth)
    check = found.check
    assert check is not None
    assert float(check.auroc.nanmean()) > 0.75


def test_shuffled_vocabularies_score_as_chance(world: SimpleNamespace) -> None:
    codes = torch.cat([codes_of(world, factor) for factor in ("shape", "colour", "texture")], 1)
    sae = Answers(torch.zeros(codes.shape[1], 64), codes)
    found = named(world, sae, methods=("dissect",)).summary()["dissect"]
    assert found["mean_auroc"] > 0.75
    assert found["mean_shuffled"] == pytest.approx(0.5, abs=0.08)
    assert found["share_better"] > 0.9
    assert found["share_better_shuffled"] <= 0.1
    assert found["margin_low"] > 0.2


def test_latents_that_fire_at_random_get_names_that_explain_nothing(
    world: SimpleNamespace,
) -> None:
    generator = torch.Generator().manual_seed(0)
    codes = (torch.rand(N, 60, generator=generator) < 0.2).float()
    found = named(world, Answers(torch.zeros(60, 64), codes), methods=("dissect",))
    summary = found.summary()["dissect"]
    assert summary["n_names"] == 60
    assert summary["mean_auroc"] == pytest.approx(0.5, abs=0.04)
    assert summary["share_better"] < 0.15


@pytest.mark.slow
def test_every_method_at_once_and_the_chosen_name(world: SimpleNamespace, tmp_path: Path) -> None:
    sae = neuron_dictionary(128).at("blocks.3.hook_resid_post", tokens="cls")
    seen: list[int] = []

    def captioner(images: list[Image.Image]) -> str:
        seen.append(len(images))
        return f" 'a picture of a {'red' if len(seen) % 2 else 'blue'} object'.\n"

    given = open_images("demo:60@3")
    found = vp.name_features(
        world.model, sae, given, vocabulary=WORDS, progress=False,
        methods=("caption", "steering", "labels", "dissect", "decoder"), captioner=captioner,
        latents=(0, 1, 2), steering_images=2, labels=LABELS,
    )  # fmt: skip
    assert list(found.candidates) == ["decoder", "dissect", "labels", "steering", "caption"]
    assert len(seen) == 3
    assert max(seen) <= 9
    assert found.candidates["caption"].names[:2] == (
        "a picture of a red object",
        "a picture of a blue object",
    )
    assert all(name in WORDS for name in found.candidates["steering"].names[:3] if name)
    assert "final norm" in found.candidates["decoder"].note
    for latent in range(128):
        making = {m: float(c.making_auroc[latent]) for m, c in found.candidates.items()}
        known = {m: v for m, v in making.items() if v == v}
        if known:
            assert known[str(found.made_by[latent])] == max(known.values())
    assert found.agreement["decoder|dissect"]["n_latents"] == 128
    assert found.plot().axes
    place = found.save(tmp_path)
    again = read_names(tmp_path, sae=sae, model=world.model)
    assert found.to_dict() == json.loads(place.read_text())
    rounded, before = again.to_dict(), found.to_dict()  # six digits are kept of each number
    for method, numbers in before.pop("summary").items():
        assert rounded["summary"][method] == pytest.approx(numbers, abs=1e-5, nan_ok=True)
    rounded.pop("summary")
    assert rounded == before
    assert again.names == found.names
    entries = again.entries()
    assert entries.keys() == again.texts().keys()
    for latent, candidates in entries.items():
        assert candidates[0]["name"] == again.names[latent]
        assert candidates[0]["method"] == again.made_by[latent]
        for one in candidates:
            check = again.candidates[str(one["method"])].check
            assert check is not None
            if one["auroc"] is not None:
                assert one["auroc"] == pytest.approx(float(check.auroc[latent]))
                assert one["chance"] == pytest.approx(float(check.others[latent]), nan_ok=True)
                assert one["better"] == bool(check.better[latent])
    assert found.table(5).row_count == 5
    assert found.summary_table().row_count == 6


def test_steering_names_are_what_steerability_raises(world: SimpleNamespace) -> None:
    """The name is the argmax of the mean change of probabilities, computed with a plain hook."""
    hook = "blocks.2.hook_resid_post"
    sae = neuron_dictionary(128).at(hook, tokens="all")
    found = vp.name_features(
        world.model, sae, world.images[:24], vocabulary=WORDS, methods=("steering",),
        latents=(5, 17), strength=20.0, steering_images=4, progress=False,
    )  # fmt: skip
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    rows = order[12:].sort().values[:4].tolist()
    pixels = world.model.preprocess([world.images[row] for row in rows])

    def probabilities(latent: int | None) -> Tensor:
        def set_it(activation: Tensor, hook: Any) -> Tensor:
            activation = activation.clone()
            if latent is not None:
                activation[:, :, latent] = 20.0
            return activation

        with torch.no_grad(), world.model.hooks(fwd_hooks=[(hook, set_it)]):
            embedded = world.model.encode_image(pixels)
        return torch.softmax(world.model.zero_shot_logits(embedded, world.texts), -1)

    for latent in (5, 17):
        change = (probabilities(latent) - probabilities(None)).mean(0)
        assert found.candidates["steering"].names[latent] == WORDS[int(change.argmax())]
        assert float(found.candidates["steering"].scores[latent]) == pytest.approx(
            float(change.max()), abs=1e-4
        )


def test_a_vision_language_model_says_what_it_sees_in_nothing() -> None:
    vlm = vp.load_vlm("demo")
    width = int(vlm.vision.cfg.d_model)
    sae = neuron_dictionary(width).at("blocks.2.hook_resid_post", tokens="all")
    images = [draw(20, seed=1).images[i] for i in range(20)]
    found = vp.name_features(
        vlm, sae, images, judge="demo", vocabulary=WORDS, methods=("steering", "caption"),
        latents=(3,), strength=30.0, captioner=vlm, progress=False,
        steering_prompt="What shape is shown?", caption_prompt="What shape is shown?",
    )  # fmt: skip
    for method in ("steering", "caption"):
        said = found.candidates[method].names
        assert said[3]
        assert said.count(None) == width - 1


def test_names_are_those_of_one_sae_and_model(
    world: SimpleNamespace, tmp_path: Path, tiny_clip: str
) -> None:
    sae = ControlDictionary("texts", world.texts, k=8, hook_name="unembed.hook_out")
    found = named(world, sae, methods=("decoder",))
    found.save(tmp_path / "names.json")
    other = ControlDictionary("texts", world.texts.flip(0), k=8, hook_name="unembed.hook_out")
    with pytest.raises(ValueError, match="this SAE is another one"):
        read_names(tmp_path, sae=other)
    with pytest.raises(ValueError, match="whose weights differ"):
        read_names(tmp_path, model=vp.load_model(tiny_clip))
    with pytest.raises(FileNotFoundError, match="vision-plugin name"):
        read_names(tmp_path / "none")
    (tmp_path / "mine.json").write_text("{}")
    with pytest.raises(FileExistsError, match="left alone"):
        found.save(tmp_path / "mine.json")


def test_latents_are_found_by_words_of_their_names(world: SimpleNamespace) -> None:
    sae = ControlDictionary("texts", world.texts, k=8, hook_name="unembed.hook_out")
    found = named(world, sae, methods=("decoder",))
    assert {found.names[k] for k in found.find("red")} == {n for n in WORDS if "red" in n.split()}
    assert len(found.find("Red Object")) == 1
    with pytest.raises(ValueError, match=r"no feature is named 'squ'.*a picture of a square"):
        found.find("squ")
    texts = found.texts()
    assert texts[0] == WORDS[0]
    assert len(found.texts(better_than_chance=True)) < len(texts) == len(WORDS)


@pytest.mark.slow
def test_a_model_without_text_takes_labels_or_a_judge(
    world: SimpleNamespace, tmp_path: Path
) -> None:
    from tests.lens._tower import tower_of

    tower = tower_of(world.model)
    sae = neuron_dictionary(128).at("blocks.3.hook_resid_post", tokens="cls")
    given = open_images("demo:60@3")
    with pytest.raises(ValueError, match="has no text tower: give judge="):
        vp.name_features(tower, sae, given, methods=("dissect",), progress=False)
    with pytest.raises(ValueError, match="no method can name these features"):
        vp.name_features(tower, sae, world.images[:30], progress=False)
    by_labels = vp.name_features(tower, sae, given, labels=LABELS[:2], progress=False)
    assert list(by_labels.candidates) == ["labels"]
    assert by_labels.check is not None
    assert by_labels.check.by == "labels"
    judged = vp.name_features(
        tower, sae, given, labels=LABELS[:2], judge=world.model, vocabulary=WORDS, progress=False
    )
    assert list(judged.candidates) == ["dissect", "labels"]
    assert "decoder" in judged.left_out
    own = vp.name_features(
        world.model, sae, given, methods=("dissect",), vocabulary=WORDS, progress=False
    )
    assert judged.candidates["dissect"].names == own.candidates["dissect"].names


def test_words_that_cannot_be_used_are_refused_in_a_sentence(
    world: SimpleNamespace, tmp_path: Path
) -> None:
    sae = neuron_dictionary(128).at("blocks.3.hook_resid_post", tokens="cls")
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    folder = tmp_path / "clip"
    folder.mkdir()
    save_tiny_clip(folder)
    for options, says in (
        ({"vocabulary": str(tmp_path / "empty.txt")}, "has no words"),
        ({"vocabulary": []}, "has no words"),
        ({"text_embeddings": torch.randn(len(WORDS), 7)}, "another model's text space"),
        ({"text_embeddings": torch.randn(len(WORDS), 64)}, "another model's text space"),
        ({"text_embeddings": world.texts[:-1]}, "other words"),
        ({"methods": ("guess",)}, "is no way to make names"),
        ({"methods": ("caption",)}, "give captioner="),
        ({"methods": ("labels",)}, "have none: name columns"),
        ({"methods": ("steering",), "latents": (128,)}, "out of range"),
        ({"template": "a picture"}, "must have one"),
    ):
        with pytest.raises(ValueError, match=says):
            named(world, sae, **options)
    named(world, sae, methods=("decoder",), text_embeddings=world.texts)


def test_the_packaged_vocabulary_says_where_it_is_from() -> None:
    from vision_plugin.lens import _vocabulary

    found = read_vocabulary()
    assert len(found) > 5000
    assert {"red", "striped", "cat", "apple tree", "pizza"} <= set(found.words)
    assert not any(word.startswith("#") for word in found.words)
    header = _vocabulary.PACKAGED.read_text()
    assert "WordNet 3.0 Copyright 2006 by" in header
    assert list(found.words) == sorted(set(found.words))


def test_directions_through_the_head_are_what_they_add(world: SimpleNamespace) -> None:
    """At the last block, the decoder's map is the derivative up to a factor and the mean's part.

    The derivative at an image of the embedding along a direction, by a plain difference, has its
    largest cosine with this map among all directions' maps.
    """
    from vision_plugin.lens._name_decoder import _derivatives, text_directions
    from vision_plugin.models.site import Site

    sae = neuron_dictionary(128).at("blocks.3.hook_resid_post", tokens="cls")
    pixels = world.model.preprocess(world.images[:16])
    closed, _ = text_directions(Site.of(world.model, sae), sae, pixels)
    slopes = torch.nn.functional.normalize(_derivatives(world.model, torch.eye(128), pixels))
    assert float((closed * slopes).sum(-1).mean()) > 0.97
