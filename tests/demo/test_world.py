"""The images: always the same, one factor at a time, with exact masks and codes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vision_plugin import demo
from vision_plugin.demo import FACTORS, HELD_OUT, NO_WORD, WORDS, Scene, draw, render

SIZE = 64


def scenes() -> st.SearchStrategy[Scene]:
    values = {name: st.sampled_from(FACTORS[name]) for name in FACTORS if name != "word"}
    return st.builds(
        Scene,
        word=st.none() | st.sampled_from(WORDS),
        variation=st.integers(0, 2**32 - 1),
        **values,
    )


def pixels(scene: Scene, size: int = SIZE) -> np.ndarray:
    return np.asarray(render(scene, image_size=size)).astype(int)


def test_a_seed_names_one_sequence_of_images() -> None:
    first, again, other = (draw(6, seed=seed, words=0.5) for seed in (3, 3, 4))
    assert first.scenes == again.scenes
    assert first.scenes != other.scenes
    for image, same in zip(first.images, again.images, strict=True):
        assert image.tobytes() == same.tobytes()


def test_a_image_does_not_depend_on_how_many_are_drawn() -> None:
    few, many = draw(5, seed=11, words=0.5), draw(40, seed=11, words=0.5)
    assert many.scenes[:5] == few.scenes
    assert many.images[4].tobytes() == few.images[4].tobytes()
    assert len(set(many.scenes)) == 40


def test_words_change_nothing_but_the_label() -> None:
    plain = draw(30, seed=5)
    labelled = draw(30, seed=5, words=True, conflicting=True, naming="shape")
    assert all(scene.word is None for scene in plain.scenes)
    for bare, scene in zip(plain.scenes, labelled.scenes, strict=True):
        assert replace(scene, word=None) == bare
        assert scene.conflicting
        assert scene.word in demo.SHAPES


def test_the_share_of_printed_words_is_kept() -> None:
    printed = [scene.word for scene in draw(2000, seed=0, words=0.3).scenes if scene.word]
    assert 0.26 < len(printed) / 2000 < 0.34
    assert set(printed) == set(WORDS)


@pytest.mark.parametrize("kind", ["all", "training", "held out"])
def test_held_out_pairs_appear_only_where_they_may(kind: str) -> None:
    world = draw(1500, seed=2, combinations=kind)  # type: ignore[arg-type] # parametrised literal
    pairs = {(scene.shape, scene.colour) for scene in world.scenes}
    every = {(shape, colour) for shape in demo.SHAPES for colour in demo.COLOURS}
    assert pairs == {"all": every, "training": every - HELD_OUT, "held out": HELD_OUT}[kind]


def test_each_shape_holds_out_one_colour_and_every_colour_is_still_learned() -> None:
    assert sorted(shape for shape, _ in HELD_OUT) == sorted(demo.SHAPES)
    assert {colour for _, colour in HELD_OUT} == set(demo.COLOURS)


@settings(max_examples=40, deadline=None)
@given(scene=scenes(), colours=st.sampled_from(list(combinations(demo.COLOURS, 2))))
def test_recolouring_changes_exactly_the_masks_pixels(
    scene: Scene, colours: tuple[str, str]
) -> None:
    one, other = (pixels(replace(scene, colour=colour)) for colour in colours)
    changed = (one != other).any(-1)
    np.testing.assert_array_equal(changed, demo.object_mask(scene, image_size=SIZE))


@settings(max_examples=40, deadline=None)
@given(scene=scenes().filter(lambda scene: scene.word is not None))
def test_a_label_never_touches_the_object_and_lies_inside_the_image(scene: Scene) -> None:
    label = (pixels(scene, 128) != pixels(replace(scene, word=None), 128)).any(-1)
    assert label.any()
    assert not (label & demo.object_mask(scene)).any()
    assert not label[[0, -1]].any()
    assert not label[:, [0, -1]].any()


@settings(max_examples=30, deadline=None)
@given(scene=scenes(), factor=st.sampled_from(["shape", "texture", "background", "size"]))
def test_every_value_of_a_factor_looks_different(scene: Scene, factor: str) -> None:
    drawn = [pixels(replace(scene, **{factor: value})) for value in FACTORS[factor]]
    for one, other in pairwise(drawn):
        assert (one != other).any(-1).sum() >= 10


@settings(max_examples=30, deadline=None)
@given(scene=scenes())
def test_the_object_stands_in_its_cell(scene: Scene) -> None:
    rows, columns = np.nonzero(demo.object_mask(scene))
    middle = [(side.min() + side.max() + 1) / 2 / 128 for side in (rows, columns)]
    cell = [
        min(range(3), key=lambda k: abs(middle[axis] - (0.265, 0.5, 0.735)[k])) for axis in (0, 1)
    ]
    assert FACTORS["position"][3 * cell[0] + cell[1]] == scene.position


def test_the_same_scene_can_be_drawn_at_several_sizes() -> None:
    scene = draw(1, seed=0, words=True).scenes[0]
    small = render(scene, image_size=64)
    large = render(scene, image_size=256).resize((64, 64), Image.Resampling.BOX)
    apart = np.abs(np.asarray(small).astype(int) - np.asarray(large).astype(int))
    assert apart.mean() < 12


@pytest.mark.parametrize("factor", list(FACTORS))
def test_codes_are_one_hot_and_agree_with_the_scenes(factor: str) -> None:
    world = draw(300, seed=9, words=0.5)
    codes, names = demo.factor_codes(world.scenes, factor)
    assert codes.shape == (300, len(FACTORS[factor]))
    np.testing.assert_array_equal(codes.sum(1), 1)
    for row, scene in zip(codes, world.scenes, strict=True):
        assert names[int(row.argmax())] == (getattr(scene, factor) or NO_WORD)


def test_the_taxonomy_has_four_levels_and_one_parent_per_shape() -> None:
    world = draw(500, seed=1)
    paths = world.taxonomy_paths
    assert paths == demo.taxonomy(world.scenes)
    parent = {path[1]: path[0] for path in paths}
    for path, scene in zip(paths, world.scenes, strict=True):
        assert path == (parent[scene.shape], scene.shape, scene.colour, scene.texture)


def test_images_are_drawn_when_asked_for_and_can_be_sliced() -> None:
    world = draw(1000, seed=0)
    part = world.images[990:]
    assert len(part) == 10
    assert part[-1].tobytes() == world.images[999].tobytes()
    assert world.images[-1].mode == "RGB"
    assert world.masks[3].dtype == bool
    with pytest.raises(IndexError):
        world.images[1000]


def test_a_written_folder_reads_back_with_its_labels(tmp_path: Path) -> None:
    world = draw(5, seed=0, words=0.5)
    folder = world.write(tmp_path / "images")
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for index, line in enumerate(lines):
        stored = Image.open(folder / line.pop("file_name"))
        assert stored.tobytes() == world.images[index].tobytes()
        assert line.pop("caption") == world.captions[index]
        assert Scene(**line) == world.scenes[index]
    with pytest.raises(FileExistsError, match="not empty"):
        world.write(folder)


def test_wrong_arguments_are_named_with_what_would_be_right() -> None:
    with pytest.raises(ValueError, match=r"shape='circel'.*circle"):
        Scene(shape="circel", colour="red")
    with pytest.raises(ValueError, match=r"word='no word'.*or None"):
        Scene(shape="circle", colour="red", word=NO_WORD)
    with pytest.raises(ValueError, match=r"words=1.5"):
        draw(1, seed=0, words=1.5)
    with pytest.raises(ValueError, match="whole numbers"):
        draw(1, seed=-1)
    with pytest.raises(ValueError, match="image_size=8"):
        render(Scene(shape="circle", colour="red"), image_size=8)
    with pytest.raises(ValueError, match=r"factor='form'.*shape"):
        demo.factor_codes([], "form")


def test_importing_the_demo_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, vision_plugin.demo as d; d.draw(1, seed=0).images[0];"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'transformers', 'tokenizers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
