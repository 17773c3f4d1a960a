"""Latents that were planted in the drawn world are found, and nothing is found where nothing is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import vision_plugin as vp
from vision_plugin import Edit
from vision_plugin.demo import SHAPES, draw, zero_shot_prompts
from vision_plugin.metrics import ControlDictionary
from vision_plugin.models import VisionBridge
from vision_plugin.tasks import RULES, FoundLatents, find_latents

HOOK = "blocks.1.hook_resid_post"
PLANTED = (101, 7, 64, 33, 90)
"""Latents that stand for the first five shapes: their directions carry the planted answer."""
AMPLITUDE = 150.0
SPREAD = 1e-3
"""By this much of weighed pixels the planted latents vary: rounding alone has ranks, too."""
STEP = 1e-4
"""A mark is written in an image's first pixel, too faint for the model to see."""


@dataclass
class World:
    """A model that is misled by planted directions, and a dictionary that has them as latents."""

    model: VisionBridge
    sae: ControlDictionary
    clean: Tensor
    marked: Tensor
    labels: Tensor
    wrong: Tensor
    texts: Tensor

    def fooled(self, edit: Edit) -> float:
        with torch.no_grad(), self.model.edit(edit):
            answers = (self.model.encode_image(self.marked) @ self.texts.T).argmax(1)
        return float((answers == self.wrong).double().mean())


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    model = vp.load_model("demo")
    drawn = draw(80, seed=5)
    clean = model.preprocess(list(drawn.images))
    clean[:, 0, 0, 0] = 0.0
    labels = torch.tensor([SHAPES.index(scene.shape) for scene in drawn.scenes])
    wrong = (labels + 1 + torch.arange(80) % 4) % 5
    wrong = torch.where(wrong == labels, (wrong + 1) % 5, wrong)
    marked = clean.clone()
    marked[:, 0, 0, 0] = STEP * (wrong + 1)
    texts = model.encode_text(list(zero_shot_prompts("shape")[0]))
    with torch.no_grad():
        stream = model(clean, stop_at_layer=2)[:, 0]
    means = torch.stack([stream[labels == c].mean(0) for c in range(5)]) - stream.mean(0)
    generator = torch.Generator().manual_seed(0)
    rest = torch.randn(128 - 5, 128, generator=generator)
    q = torch.linalg.qr(torch.cat([means, rest]).double().T).Q.T.float()
    signs = (q[:5] * means).sum(1, keepdim=True).sign()
    basis = torch.empty(128, 128)
    others = [row for row in range(128) if row not in PLANTED]
    basis[list(PLANTED)], basis[others] = q[:5] * signs, q[5:]
    planted = basis[list(PLANTED)]
    seen: list[Tensor] = []

    def read_mark(pixels: Tensor, hook: object) -> None:
        marks = (pixels[:, 0, 0, 0] / STEP).round().long() - 1
        noise = torch.randn(pixels[0, 1].numel(), 5, generator=torch.Generator().manual_seed(1))
        seen[:] = [marks, pixels[:, 1].flatten(1) @ noise / len(noise) ** 0.5]

    def plant(x: Tensor, hook: object) -> Tensor:
        x = x.clone()
        x[:, 0] -= (x[:, 0] @ planted.T - SPREAD * seen[1]) @ planted
        has = seen[0] >= 0
        x[has, 0] += AMPLITUDE * planted[seen[0][has]]
        return x

    with model.hooks(fwd_hooks=[("embed.hook_in", read_mark), (HOOK, plant)]):
        sae = ControlDictionary("planted", basis).at(HOOK, tokens="cls")
        yield World(model, sae, clean, marked, labels, wrong, texts)


def found_by(world: World, rule: str, **options: object) -> FoundLatents:
    return find_latents(
        world.model, world.sae, world.marked, rule=rule, n=5, clean=world.clean,
        labels=world.labels.tolist(), wrong=world.wrong, texts=world.texts, **options,
    )  # fmt: skip


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "unused"])
def test_planted_latents_are_found_exactly_and_suppressing_them_is_perfect(world, rule) -> None:
    found = found_by(world, rule)
    assert sorted(found.latents) == sorted(PLANTED)
    others = found.scores.clone()
    others[list(PLANTED)] = 0
    assert float(others.abs().max()) < 0.1 * float(found.scores[list(found.latents)].min())
    assert world.fooled(Edit()) > 0.7
    with torch.no_grad():
        expected = world.model.encode_image(world.clean)
        with world.model.edit(Edit.suppress(world.sae, found.latents)):
            torch.testing.assert_close(
                world.model.encode_image(world.marked), expected, rtol=0, atol=1e-3
            )
    assert world.fooled(Edit.suppress(world.sae, found.random(seed=0))) > 0.6


def test_attribution_is_the_effect_of_a_small_step(world) -> None:
    """The gradient through a latent, against a difference quotient of whole passes."""
    found = found_by(world, "attribution")
    latent, step = PLANTED[2], 0.5
    rows = torch.arange(80)

    def lead(by: float) -> Tensor:
        edit = Edit.add(world.sae, {latent: by})
        with torch.no_grad(), world.model.edit(edit):
            unit = world.model.encode_image(world.marked)
        logits = world.model.zero_shot_logits(unit, world.texts).double()
        return logits[rows, world.wrong] - logits[rows, world.labels]

    slope = (lead(step) - lead(-step)) / (2 * step)
    expected = float((slope * AMPLITUDE * (world.wrong == 2)).sum())
    assert float(found.scores[latent]) == pytest.approx(expected, rel=0.02)


@pytest.mark.slow
def test_shuffled_labels_find_nothing_better_than_random(world) -> None:
    both = torch.cat([world.marked, world.clean])
    present = torch.arange(160) < 80
    planted = list(PLANTED)

    def found(rule: str, present: Tensor) -> FoundLatents:
        return find_latents(world.model, world.sae, both, rule=rule, n=5, present=present)

    for rule in ("difference", "auroc"):
        true = found(rule, present)
        assert sorted(true.latents) == sorted(PLANTED)
    shuffled, random = [], []
    for seed in range(3):
        order = torch.randperm(160, generator=torch.Generator().manual_seed(seed))
        by_chance = found("difference", present[order])
        assert float(by_chance.scores.max()) < 0.7 * float(
            found("difference", present).scores[planted].min()
        )
        by_chance = found("auroc", present[order])
        shuffled.append(world.fooled(Edit.suppress(world.sae, by_chance.latents)))
        random.append(world.fooled(Edit.suppress(world.sae, by_chance.random(seed))))
    assert sum(shuffled) >= sum(random) - 0.3


def test_auroc_agrees_with_counting_pairs(world) -> None:
    both = torch.cat([world.marked[:30], world.clean[30:60]])
    present = [True] * 30 + [False] * 30
    found = find_latents(world.model, world.sae, both, rule="auroc", n=3, present=present)
    with torch.no_grad():
        _, cache = world.model.run_with_cache(both, names_filter=HOOK)
    latents = world.sae.encode(cache[HOOK][:, 0])
    pairs = (latents[:30, None] > latents[None, 30:]).double()
    pairs += 0.5 * (latents[:30, None] == latents[None, 30:]).double()
    torch.testing.assert_close(found.scores.double(), 2 * pairs.mean((0, 1)) - 1, rtol=0, atol=1e-5)


def test_neurons_and_random_latents_stand_beside(world) -> None:
    found = found_by(world, "attribution", neurons=True)
    assert found.neurons is not None
    assert len(found.neurons) == len(found) == 5
    assert found.neurons.noun == "neuron"
    random = found.random(seed=1)
    assert len(set(random)) == 5
    assert not set(random) & set(found.latents)
    assert random == found.random(seed=1) != found.random(seed=2)
    assert found.best(2).latents == found.latents[:2]
    assert found.best(2).neurons.latents == found.neurons.latents[:2]
    assert found.table().row_count == 5
    most = found_by(world, "difference").best(128)
    many = FoundLatents("list", tuple(range(100)), most.scores, "cls", most.active, most.clean_mean)
    assert len(set(many.random(seed=0))) == 100  # only 28 others are there


def test_latents_are_named_or_listed(world) -> None:
    names = [f"a blue thing {i}" for i in range(128)]
    names[9] = "a Red star"
    assert find_latents(
        world.model, world.sae, rule="name", names=names, words=["red"]
    ).latents == (9,)
    listed = find_latents(world.model, world.sae, rule="list", latents=[4, 2, 4])
    assert listed.latents == (4, 2)


def test_unused_latents_are_those_that_clean_images_do_not_use(world) -> None:
    sae = ControlDictionary("few", world.sae.W_dec, k=20).at(HOOK, tokens="cls")
    found = find_latents(world.model, sae, world.marked, clean=world.clean, rule="unused", n=128)
    with torch.no_grad():
        _, cache = world.model.run_with_cache(world.clean, names_filter=HOOK)
    share = (sae.encode(cache[HOOK][:, 0]) > 0).double().mean(0)
    torch.testing.assert_close(found.scores.double(), 1 - share, rtol=0, atol=1e-5)
    assert set(PLANTED) <= set(found.latents)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "magic"}, r"rule='magic' is not a rule .* auroc"),
        ({"n": 0}, "n=0 must be at least 1"),
        ({"images": None}, "give images="),
        ({"clean": None}, "say which images lack what is looked for"),
        ({"labels": None}, "attribution compares each image .* labels="),
        ({"texts": None}, "texts="),
        ({"rule": "class_difference", "labels": None}, "compares images of one class: give labels"),
        ({"labels": [0] * 3}, "labels= has 3 entries for 80 images"),
        ({"wrong": [40] * 80}, "wrong= names a class that texts= has no row for"),
        ({"clean": None, "present": [True] * 80}, "has one value only"),
        ({"clean": None, "present": [True] * 3}, "present= has 3 entries for 80"),
        ({"tokens": "random:2"}, "look at other tokens in every pass"),
        ({"rule": "list", "latents": [128]}, "latent 128 is out of range: .* another SAE"),
        ({"rule": "name", "names": ["a"], "words": ["a"]}, "1 names for the SAE's 128 latents"),
        ({"rule": "name"}, "give names= and words="),
        ({"rule": "list"}, "give latents="),
    ],
)
def test_what_is_missing_is_said_in_a_sentence(world, options, message) -> None:
    arguments = {
        "images": world.marked, "clean": world.clean, "labels": world.labels,
        "wrong": world.wrong, "texts": world.texts, **options,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        find_latents(world.model, world.sae, arguments.pop("images"), **arguments)
