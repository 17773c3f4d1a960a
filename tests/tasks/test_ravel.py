"""Disentanglement: planted directions, whole swaps, learned rotations, and plain loops."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vision_plugin as vp
from tests._models import save_tiny_clip
from vision_plugin import Edit
from vision_plugin.demo import draw
from vision_plugin.metrics import ControlDictionary, random_dictionary
from vision_plugin.models import VisionBridge
from vision_plugin.tasks import (
    FactorData,
    FactorSplit,
    RavelSettings,
    TaskResult,
    ravel,
    read_factors,
)

HOOK = "blocks.2.hook_resid_post"
PLANTED = {"first": (9, 40, 17), "second": (3, 22)}
"""Latents that stand for the values of two planted factors."""
AMPLITUDE = 40.0
STEP = 1e-4
"""Both values are written in an image's first pixels, too faint for the model to see."""
FAST = {"sizes": (3,), "rules": ("attribution",), "ranks": (1, 2), "steps": 60, "random_seeds": 1}


@dataclass
class World:
    """A model behind whose last block two factors are planted, and a dictionary that has them."""

    model: VisionBridge
    sae: ControlDictionary
    data: FactorData
    directions: dict[str, Tensor]

    def run(self, **options: object) -> TaskResult:
        settings = RavelSettings(**{**FAST, **options})  # type: ignore[arg-type]
        return ravel(self.model, self.sae, self.data, settings=settings)


def split_of(pixels: Tensor, n: int, seed: int) -> FactorSplit:
    generator = torch.Generator().manual_seed(seed)
    values = {
        name: torch.randint(len(latents), (n,), generator=generator)
        for name, latents in PLANTED.items()
    }
    marked = pixels[torch.randint(len(pixels), (n,), generator=generator)].clone()
    for place, of in enumerate(values.values()):
        marked[:, place, 0, 0] = STEP * (of + 1)
    return FactorSplit(marked, values)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("clip")
    save_tiny_clip(folder)
    model = vp.load_model(str(folder))
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(40, 3, 32, 32, generator=generator)
    q = torch.linalg.qr(torch.randn(32, 32, generator=generator)).Q.T
    basis = torch.nn.functional.normalize(torch.randn(48, 32, generator=generator), dim=1)
    basis[:32] = q
    rows = [latent for latents in PLANTED.values() for latent in latents]
    order = [row for row in range(48) if row not in rows]
    placed = torch.empty_like(basis)
    placed[rows], placed[order] = basis[: len(rows)], basis[len(rows) :]
    directions = {name: placed[list(latents)] for name, latents in PLANTED.items()}
    span = torch.cat(list(directions.values()))
    seen: list[Tensor] = []

    def read_marks(x: Tensor, hook: object) -> None:
        seen[:] = [(x[:, :2, 0, 0] / STEP).round().long() - 1]

    def plant(x: Tensor, hook: object) -> Tensor:
        x = x.clone()
        x[:, 0] -= x[:, 0] @ span.T @ span
        for place, of in enumerate(directions.values()):
            x[:, 0] += AMPLITUDE * of[seen[0][:, place]]
        return x

    hooks = [("embed.hook_in", read_marks), (HOOK, plant)]
    with model.hooks(fwd_hooks=hooks):
        sizes = (("train", 120), ("validation", 60), ("test", 60), ("readers", 150))
        splits = {name: split_of(pixels, n, 10 + place) for place, (name, n) in enumerate(sizes)}
        names = {
            name: tuple(f"{name} {i}" for i in range(len(latents)))
            for name, latents in PLANTED.items()
        }
        data = FactorData(
            names, splits["train"], splits["validation"], splits["test"], splits["readers"]
        )
        sae = ControlDictionary("planted", placed).at(HOOK, tokens="cls")
        yield World(model, sae, data, directions)


@pytest.fixture(scope="module")
def result(world: World) -> TaskResult:
    return world.run(sizes=(2, 3))


@pytest.mark.slow
def test_swapping_planted_latents_is_perfect(result: TaskResult) -> None:
    for factor, latents in PLANTED.items():
        row = result.row("sae", kind=factor)
        assert row.figures["cause"].value == 1.0
        assert row.figures["isolate"].value == 1.0
        (change,) = result.edits[factor, "sae"].changes
        assert set(change.targets) <= set(latents)
    assert result.row("sae", kind="mean of all").figures["disentangle"].value == 1.0
    random = result.row("random_latents", kind="first").figures
    assert random["disentangle"].value < 0.7


@pytest.mark.slow
def test_no_swap_keeps_everything_and_a_whole_swap_takes_everything(result: TaskResult) -> None:
    for factor in PLANTED:
        none = result.row("none", kind=factor).figures
        assert (none["cause"].value, none["isolate"].value) == (0.0, 1.0)
        assert none["moved"].value == 0.0
        whole = result.row("full_swap", kind=factor).figures
        assert (whole["cause"].value, whole["isolate"].value) == (1.0, 0.0)


@pytest.mark.slow
def test_latents_that_are_given_are_measured_in_place_of_those_that_rules_find(world) -> None:
    methods = ("none", "sae", "random_latents", "full_swap")
    result = world.run(methods=methods, latents=PLANTED["second"])
    seen = {e["kind"]: e for e in result.search if e["method"] == "sae"}
    assert sum(e["method"] == "sae" for e in result.search) == len(PLANTED)
    assert {(e["how"], e["size"]) for e in seen.values()} == {("given, cls", 2)}
    row = result.row("sae", kind="second")
    (change,) = result.edits["second", "sae"].changes
    assert (row.how, row.size, change.targets) == ("given, cls", 2, PLANTED["second"])
    assert (row.figures["cause"].value, row.figures["isolate"].value) == (1.0, 1.0)
    assert row.figures["disentangle_over_none"].low > 0
    assert row.figures["disentangle_over_random_latents"].low > 0
    # They swap the second factor alone, so none of the first.
    assert (seen["first"]["cause"], seen["first"]["isolate"]) == (0.0, 0.0)
    assert result.row("sae", kind="first").how == "no swap does better than none"
    assert result.settings["latents"] == list(PLANTED["second"])


@pytest.mark.parametrize("method", ["das", "mdas"])
@pytest.mark.slow
def test_a_learned_rotation_finds_the_planted_subspace(world, result, method: str) -> None:
    for factor in PLANTED:
        figures = result.row(method, kind=factor).figures
        assert figures["disentangle"].value > 0.95, factor
        # What tells the values apart, differences of the planted directions, lies in the subspace.
        (change,) = result.edits[factor, method].changes
        found = change.basis.vectors
        torch.testing.assert_close(found @ found.T, torch.eye(len(found)), atol=1e-4, rtol=0)
        planted = world.directions[factor]
        apart = torch.nn.functional.normalize(planted[1:] - planted[:1], dim=-1)
        assert (apart @ found.T).norm(dim=-1).min() > 0.8


@torch.no_grad()
@pytest.mark.slow
def test_figures_are_those_of_a_plain_loop(world: World) -> None:
    """The latents' swap of the first factor, image by image, by hooks written here."""
    result = world.run(methods=("none", "neurons"), sizes=(12,))
    model, data = world.model, world.data
    embedded = model.encode_image(data.readers.pixels).double()
    from sklearn.linear_model import LogisticRegression

    probes = {
        name: LogisticRegression(max_iter=1000).fit(embedded, values)
        for name, values in data.readers.values.items()
    }
    test = data.test
    before = model.encode_image(test.pixels).double()
    read = {name: torch.from_numpy(probe.predict(before)) for name, probe in probes.items()}
    known = [i for i in range(len(test)) if all(read[n][i] == test.values[n][i] for n in probes)]
    assert result.settings["read_right"]["test"] == pytest.approx(len(known) / len(test))
    edit = result.edits["first", "neurons"]
    (change,) = edit.changes
    where = list(change.targets)
    _, cache = model.run_with_cache(test.pixels, names_filter=HOOK)
    cause: list[float] = []
    isolate: list[float] = []
    for base in known:
        # Every source with both values different, where the task draws two of them.
        sources = [
            source
            for source in known
            if all(test.values[n][base] != test.values[n][source] for n in probes)
        ]
        theirs = cache[HOOK][sources]

        def swap(x: Tensor, hook: object, theirs: Tensor = theirs) -> Tensor:
            x = x.clone()
            for place in where:
                x[:, 0, place] = theirs[:, 0, place]
            return x

        own = test.pixels[base].expand(len(sources), -1, -1, -1)
        with model.hooks(fwd_hooks=[(HOOK, swap)]):
            after = model.encode_image(own).double()
        first, second = (torch.from_numpy(probes[n].predict(after)) for n in ("first", "second"))
        cause.append(float((first == test.values["first"][sources]).double().mean()))
        isolate.append(float((second == test.values["second"][base]).double().mean()))
    row = result.row("neurons", kind="first").figures
    for name, found in (("cause", cause), ("isolate", isolate)):
        exact = sum(found) / len(found)
        # Two sources of each base stand for all of them.
        assert row[name].value == pytest.approx(exact, abs=0.08), name
    middle = (row["cause"].value + row["isolate"].value) / 2
    assert row["disentangle"].value == pytest.approx(middle)
    assert row["disentangle"].low <= middle <= row["disentangle"].high


@pytest.mark.slow
def test_intervals_draw_whole_bases(world: World) -> None:
    """More sources of each base are no more independent images: the interval stays as wide."""
    few, many = (
        world.run(methods=("none", "neurons"), sizes=(12,), sources=n)
        .row("neurons", kind="first")
        .figures["cause"]
        for n in (1, 8)
    )
    assert 0 < few.high - few.low < 0.5
    assert (many.high - many.low) > 0.4 * (few.high - few.low)


@pytest.mark.slow
def test_a_result_is_a_folder_with_swaps(world: World, result, tmp_path: Path) -> None:
    out = result.save(tmp_path / "out", sae="sae")
    content = json.loads((out / "results.json").read_text())
    assert (content["schema"], content["task"]) == (1, "ravel")
    assert {"cause", "isolate", "disentangle"} <= set(content["rows"][1])
    assert content["settings"]["factors"]["second"] == ["second 0", "second 1"]
    edit = Edit.load(out / "edits" / "first-sae.json", sae=world.sae)
    assert str(edit) == str(result.edits["first", "sae"])
    pixels = world.data.test.pixels
    with torch.no_grad(), world.model.edit(edit, source=pixels.flip(0)):
        assert torch.isfinite(world.model.encode_image(pixels)).all()
    assert (out / "methods.png").stat().st_size > 1000
    assert "mean of all" in (out / "table.txt").read_text()


@pytest.mark.slow
def test_hostile_input_is_one_sentence(world: World, tmp_path: Path) -> None:
    data = world.data
    one_value = replace(
        data.test, values={**data.test.values, "second": torch.zeros(len(data.test)).long()}
    )
    with pytest.raises(ValueError, match="every image of the test split has one value of 'second'"):
        replace(data, test=one_value)
    with pytest.raises(ValueError, match="1 factors: to swap one"):
        replace(data, factors={"first": data.factors["first"]})
    with pytest.raises(ValueError, match="nothing reads the factor 'first'"):
        replace(data, readers=None)
    with pytest.raises(ValueError, match="no values of the factor 'third'"):
        replace(data, factors={**data.factors, "third": ("a", "b")})
    with pytest.raises(ValueError, match="has 3 entries of first for 60 images"):
        replace(data.test, values={"first": torch.zeros(3).long()})
    with pytest.raises(ValueError, match="give the value of each image"):
        FactorSplit(data.test.pixels, {})
    few = FactorSplit(data.test.pixels[:20], {name: v[:20] for name, v in data.test.values.items()})
    with pytest.raises(ValueError, match="too few for an interval"):
        ravel(world.model, world.sae, replace(data, test=few))
    elsewhere = random_dictionary(32, 48, k=None, seed=0).at("blocks.9.hook_resid_post")
    with pytest.raises(ValueError, match=r"blocks\.9"):
        ravel(world.model, elsewhere, data)
    narrow = random_dictionary(16, 48, k=None, seed=0).at(HOOK)
    with pytest.raises(ValueError, match="16"):
        ravel(world.model, narrow, data)
    with pytest.raises(ValueError, match="latent 48 is out of range: the SAE has 48"):
        world.run(methods=("sae",), latents=(3, 48))
    given = RavelSettings(latents=(3,))
    with pytest.raises(ValueError, match="latents= are numbers of one SAE, and sae= has 2"):
        ravel(world.model, [world.sae, world.sae], data, settings=given)
    for bad, message in (
        ({"methods": ("magic",)}, "methods= has 'magic'"),
        ({"rules": ("magic",)}, "rules= has 'magic'"),
        ({"latents": (3,), "methods": ("none",)}, "by the method 'sae': name it in methods="),
        ({"sizes": (0,)}, "numbers from 1 up"),
        ({"sources": 0}, "at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            RavelSettings(**bad)


@pytest.mark.slow
def test_factors_come_from_columns(world: World, tmp_path: Path) -> None:
    folder = draw(160, seed=4).write(tmp_path / "drawn")
    sizes = {"readers": 50, "train": 40, "validation": 30, "test": 40, "least": 5}
    data = read_factors(world.model, str(folder), ("texture", "size"), **sizes)
    assert data.factors["size"] == ("large", "small")
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 40, "validation": 30, "test": 40, "readers": 50
    }  # fmt: skip
    asked = {"texture": "a {} thing", "size": "a {} thing"}
    zero = read_factors(world.model, str(folder), ("texture", "size"), prompts=asked, **sizes)
    assert zero.readers is None
    assert zero.prompts["size"] == ("a large thing", "a small thing")
    for factors, message in (
        (("texture",), "needs two: there are"),
        (("texture", "mood"), "mood"),
        (("texture", "caption"), "the column 'caption' .* leaves too few images"),
    ):
        with pytest.raises(ValueError, match=message):
            read_factors(world.model, str(folder), factors, **sizes)
    with pytest.raises(ValueError, match="no sentence for the factor 'size'"):
        read_factors(world.model, str(folder), ("texture", "size"), prompts={"texture": "a {}"})
