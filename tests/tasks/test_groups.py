"""The background and attribute tasks: planted nuisances, and figures against plain loops."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

import vision_plugin as vp
from vision_plugin import Edit
from vision_plugin.demo import SHAPES, Scene, draw, render
from vision_plugin.demo.groups import CONFOUNDS, group_data
from vision_plugin.metrics import ControlDictionary, random_dictionary
from vision_plugin.models import VisionBridge
from vision_plugin.tasks import (
    GroupData,
    GroupSettings,
    GroupSplit,
    TaskResult,
    attribute,
    background,
)

HOOK = "blocks.1.hook_resid_post"
PLANTED = (101, 7)
"""Latents that stand for both values of the planted nuisance."""
AMPLITUDE = 40.0
STEP = 1e-4
"""A mark is written in an image's first pixel, too faint for the model to see."""


@dataclass
class World:
    """A model in which a nuisance is planted, a dictionary that has it as latents, and images."""

    model: VisionBridge
    sae: ControlDictionary
    data: GroupData

    def repair(self, data: GroupData | None = None, **options: object) -> TaskResult:
        settings = {
            "rules": ("difference",), "sizes": (2,), "tokens": ("cls",), "random_seeds": 2,
            "methods": ("none", "sae", "random_latents", "balanced"), **options,
        }  # fmt: skip
        return background(
            self.model, self.sae, data or self.data, settings=GroupSettings(**settings)
        )


def marked(model: VisionBridge, sizes: tuple[int, ...], seed: int) -> GroupSplit:
    """Circles and squares; both values of the nuisance are marks on the same scenes."""
    pixels, labels, nuisance = [], [], []
    for group, n in enumerate(sizes):
        y, a = group // 2, group % 2
        scenes = draw(n, seed=seed).scenes
        images = [render(replace(scene, shape=("circle", "square")[y])) for scene in scenes]
        prepared = model.preprocess(images)
        prepared[:, 0, 0, 0] = STEP * (a + 1)
        pixels.append(prepared)
        labels += [y] * n
        nuisance += [a] * n
    return GroupSplit(torch.cat(pixels), torch.tensor(labels), torch.tensor(nuisance))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    model = vp.load_model("demo")
    scenes = draw(40, seed=5).scenes
    with torch.no_grad():
        stars, hearts = (
            model(model.preprocess([render(replace(s, shape=shape)) for s in scenes]),
                  stop_at_layer=2)[:, 0].mean(0)
            for shape in ("star", "heart")
        )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    first = torch.stack([stars - hearts, stars + hearts])
    rest = torch.randn(126, 128, generator=generator)
    q = torch.linalg.qr(torch.cat([first, rest]).double().T).Q.T.float()
    basis = torch.empty(128, 128)
    others = [row for row in range(128) if row not in PLANTED]
    basis[list(PLANTED)], basis[others] = q[:2], q[2:]
    seen: list[Tensor] = []

    def read_mark(pixels: Tensor, hook: object) -> None:
        seen[:] = [(pixels[:, 0, 0, 0] / STEP).round().long() - 1]

    def plant(x: Tensor, hook: object) -> Tensor:
        x = x.clone()
        x[:, 0] -= x[:, 0] @ q[:2].T @ q[:2]
        x[:, 0] += AMPLITUDE * q[:2][seen[0]]
        return x

    with model.hooks(fwd_hooks=[("embed.hook_in", read_mark), (HOOK, plant)]):
        sae = ControlDictionary("planted", basis).at(HOOK, tokens="cls")
        train = marked(model, (50, 4, 4, 50), seed=11)
        validation, test = (marked(model, (n,) * 4, seed=s) for n, s in ((12, 12), (30, 13)))
        data = GroupData(
            "shape", "mark", ("circle", "square"), ("first", "second"), train, validation, test,
            balanced=marked(model, (32,) * 4, seed=14),
        )  # fmt: skip
        yield World(model, sae, data)


@pytest.mark.slow
def test_planted_latents_are_found_exactly_and_suppressing_them_is_perfect(world) -> None:
    for rule in ("auroc", "attribution"):
        (change,) = world.repair(rules=(rule,), methods=("none", "sae")).edit.changes
        assert sorted(change.targets) == sorted(PLANTED), rule
    result = world.repair()
    (change,) = result.edit.changes
    assert sorted(change.targets) == sorted(PLANTED)
    none, sae = (result.row(m, kind="shape").figures for m in ("none", "sae"))
    random, balanced = (result.row(m, kind="shape").figures for m in ("random_latents", "balanced"))
    assert none["worst_group"].value < 0.6
    assert sae["worst_group"].value >= balanced["worst_group"].value
    assert sae["worst_group_over_none"].low > 0
    assert sae["worst_group_over_random_latents"].low > 0
    assert random["worst_group"].value == pytest.approx(none["worst_group"].value, abs=0.1)
    for shape in ("circle", "square"):  # the mark makes no difference any more
        first, second = (sae[f"accuracy ({shape}, {mark})"].value for mark in ("first", "second"))
        assert first == pytest.approx(second, abs=1e-9)
    assert sae["refit_worst_group"].value >= sae["worst_group"].value - 0.1


@pytest.mark.slow
def test_shuffled_labels_find_nothing_better_than_random(world) -> None:
    """The nuisance is shuffled within the classes, so the groups keep their sizes."""
    train = world.data.train
    nuisance = train.nuisance.clone()
    generator = torch.Generator().manual_seed(1)
    for y in (0, 1):
        rows = (train.labels == y).nonzero().flatten()
        nuisance[rows] = nuisance[rows[torch.randperm(len(rows), generator=generator)]]
    data = replace(world.data, train=GroupSplit(train.pixels, train.labels, nuisance))
    result = world.repair(data, rules=("auroc",))
    found = [entry for entry in result.search if entry["method"] == "sae"]
    assert found
    for change in result.edit.changes:
        assert not set(change.targets) & set(PLANTED)
    # Nor does any candidate do on validation what the planted latents do.
    right = world.repair(world.data, rules=("auroc",))
    best = max(e["worst_group"] for e in right.search if e["method"] == "sae")
    assert max(entry["worst_group"] for entry in found) < best - 0.1
    sae = result.row("sae", kind="shape").figures
    none = result.row("none", kind="shape").figures
    assert sae["worst_group"].value < none["worst_group"].value + 0.15


# ---------------------------------------------------------------------- the drawn world


@pytest.fixture(scope="module")
def drawn(world) -> GroupData:
    return group_data(
        vp.load_model("demo"), "background", usual=30, unusual=4, validation=8, test=30
    )


@pytest.fixture(scope="module")
def plain() -> VisionBridge:
    return vp.load_model("demo")


@pytest.fixture(scope="module")
def result(plain, drawn) -> TaskResult:
    sae = random_dictionary(128, 60, k=None, seed=0).at(HOOK)
    settings = GroupSettings(
        sizes=(20,), rules=("attribution",), tokens=("cls",),
        methods=("none", "sae", "diff_mean", "leace", "reweighted", "balanced"),
    )  # fmt: skip
    return attribute(plain, sae, drawn, settings=settings)


def embedded(model: VisionBridge, pixels: Tensor, edit: Edit) -> np.ndarray:
    with torch.no_grad(), model.edit(edit):
        return model.encode_image(pixels).double().numpy()


def test_the_drawn_groups_are_what_they_say(plain) -> None:
    data = group_data(plain, "attribute", usual=5, unusual=2, validation=1, test=30)
    assert data.train.sizes == (5, 2, 2, 5)
    assert data.validation.sizes == (1, 1, 1, 1)
    assert data.test.sizes == (30,) * 4
    assert data.group_names[1] == "striped, purple"
    assert set(data.test.others) == {"shape", "background"}
    assert int(data.test.others["shape"].max()) < len(SHAPES)
    of = CONFOUNDS["attribute"]
    scene = draw(14, seed=2000).scenes[6]  # the sixth image has the first class, the other value
    expected = replace(scene, **{of.label: of.classes[0], of.nuisance: of.values[1]})
    assert isinstance(expected, Scene)
    torch.testing.assert_close(data.train.pixels[6:7], plain.preprocess([render(expected)]))
    assert group_data(
        plain, "background", usual=2, validation=1, test=30
    ).train.sizes == (2, 16, 16, 2)  # fmt: skip


@pytest.mark.parametrize("method", ["none", "diff_mean", "leace"])
def test_figures_are_those_of_a_plain_loop(plain, drawn, result, method) -> None:
    """The probe by scikit-learn, on whole passes under the saved edit, group by group."""
    edit = result.edits["shape", method]
    probe = LogisticRegression(max_iter=1000)
    probe.fit(embedded(plain, drawn.train.pixels, Edit()), drawn.train.labels.numpy())
    after = embedded(plain, drawn.test.pixels, edit)
    labels, groups = drawn.test.labels.numpy(), drawn.test.groups.numpy()
    right = probe.predict(after) == labels
    row = result.row(method, kind="shape").figures
    each = [right[groups == group].mean() for group in range(4)]
    assert row["worst_group"].value == pytest.approx(min(each), abs=0.034)
    assert row["accuracy"].value == pytest.approx(right.mean(), abs=0.02)
    for name, share in zip(drawn.group_names, each, strict=True):
        assert row[f"accuracy ({name})"].value == pytest.approx(share, abs=0.034)
    again = LogisticRegression(max_iter=1000)
    again.fit(embedded(plain, drawn.train.pixels, edit), drawn.train.labels.numpy())
    refit = again.predict(after) == labels
    each = [refit[groups == group].mean() for group in range(4)]
    assert row["refit_worst_group"].value == pytest.approx(min(each), abs=0.034)
    before = embedded(plain, drawn.test.pixels, Edit())
    moved = np.linalg.norm(after - before, axis=1).mean()
    assert row["moved"].value == pytest.approx(moved, abs=1e-4)
    usual = (groups == 0) | (groups == 3)
    was, now = probe.predict_proba(before)[usual], probe.predict_proba(after)[usual]
    kl = (was * np.log(was / now)).sum(1).mean()
    assert row["kl"].value == pytest.approx(kl, abs=1e-3)


def test_intervals_resample_each_group_within_itself(plain, drawn, result) -> None:
    probe = LogisticRegression(max_iter=1000)
    probe.fit(embedded(plain, drawn.train.pixels, Edit()), drawn.train.labels.numpy())
    groups, random = drawn.test.groups.numpy(), np.random.default_rng(0)
    right = {
        method: (
            probe.predict(embedded(plain, drawn.test.pixels, result.edits["shape", method]))
            == drawn.test.labels.numpy()
        )
        for method in ("none", "leace")
    }
    worst, gain, mean = [], [], []
    for _ in range(2000):
        rows = [random.choice(np.flatnonzero(groups == g), size=30) for g in range(4)]
        of = {m: min(r[row].mean() for row in rows) for m, r in right.items()}
        worst.append(of["leace"])
        gain.append(of["leace"] - of["none"])
        mean.append(np.mean([right["leace"][row].mean() for row in rows]))
    figures = result.row("leace", kind="shape").figures
    for name, drawn_values in (
        ("worst_group", worst), ("worst_group_over_none", gain), ("accuracy", mean),
    ):  # fmt: skip
        low, high = np.quantile(drawn_values, [0.025, 0.975])
        assert figures[name].low == pytest.approx(low, abs=0.05), name
        assert figures[name].high == pytest.approx(high, abs=0.05), name


def test_leace_mends_and_other_probes_stand_beside(result) -> None:
    none = result.row("none", kind="shape").figures["worst_group"].value
    for method in ("leace", "diff_mean", "balanced", "reweighted"):
        assert result.row(method, kind="shape").figures["worst_group"].value > none, method
    assert "refit_worst_group" not in result.row("balanced", kind="shape").figures
    assert result.row("reweighted", kind="shape").figures["moved"].value == 0
    assert "worst_group_over_leace" in result.row("sae", kind="shape").figures


def test_a_result_is_a_folder(plain, drawn, result, tmp_path: Path) -> None:
    out = result.save(tmp_path / "out")
    content = json.loads((out / "results.json").read_text())
    assert (content["schema"], content["task"]) == (1, "attribute")
    assert content["settings"]["images"]["train"]["circle, sand"] == 4
    for row in content["rows"]:
        assert (
            row["worst_group"]["low"] <= row["worst_group"]["value"] <= row["worst_group"]["high"]
        )
    assert {e["worst_group"] is not None for e in content["search"]} == {True}
    assert "worst group" in (out / "table.txt").read_text()
    assert {"methods.png", "search.png"} <= {path.name for path in out.iterdir()}
    loaded = Edit.load(out / "edits" / "shape-leace.json")
    before = embedded(plain, drawn.test.pixels[:4], result.edits["shape", "leace"])
    np.testing.assert_allclose(
        embedded(plain, drawn.test.pixels[:4], loaded), before, rtol=0, atol=1e-5
    )


def test_a_model_without_a_text_tower_is_repaired_too(drawn) -> None:
    torch.manual_seed(0)
    size = drawn.train.pixels.shape[-1]
    config = Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=size, patch_size=16
    )
    model = vp.wrap(Dinov2Model(config).eval())
    assert not model.adapter.has_joint_space
    sae = random_dictionary(32, 16, k=None, seed=0).at("blocks.0.hook_resid_post")
    settings = GroupSettings(
        sizes=(4,), rules=("attribution",), methods=("none", "sae", "neurons", "leace")
    )
    result = background(model, sae, drawn, settings=settings)
    with torch.no_grad():
        embeddings = [model.image_features(s.pixels).numpy() for s in (drawn.train, drawn.test)]
    probe = LogisticRegression(max_iter=1000).fit(embeddings[0], drawn.train.labels.numpy())
    right = probe.score(embeddings[1], drawn.test.labels.numpy())
    assert result.row("none", kind="shape").figures["accuracy"].value == pytest.approx(
        right, abs=0.02
    )
    assert {entry["layer"] for entry in result.search} == {0, 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ("magic",)}, "methods= has 'magic'"),
        ({"rules": ("magic",)}, "rules= has 'magic'"),
        ({"tokens": ("magic",)}, "tokens= has 'magic'"),
        ({"sizes": (0,)}, "must be numbers of latents"),
        ({"cap": 2.0}, "from 0 to 1"),
    ],
)
def test_settings_are_checked(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        GroupSettings(**change)


def test_bad_groups_are_refused(drawn) -> None:
    with pytest.raises(ValueError, match=r"no image of the group \(square, night\): .* all four"):
        replace(drawn, validation=drawn.validation.where(drawn.validation.groups != 2))
    few = drawn.test.where(torch.arange(120) < 100)
    with pytest.raises(ValueError, match=r"10 images of the group \(square, sand\), too few for"):
        replace(drawn, test=few)
    with pytest.raises(ValueError, match=r"labels= has 3 entries for 68 images"):
        replace(drawn.train, labels=torch.zeros(3).long())
    with pytest.raises(ValueError, match=r"nuisance= must be 0 or 1"):
        replace(drawn.train, nuisance=drawn.train.nuisance * 2)
