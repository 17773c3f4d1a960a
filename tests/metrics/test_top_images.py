"""Top images, and the two metrics built on them: uniqueness and hierarchy."""

from __future__ import annotations

import csv
import itertools
import json
import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from vision_plugin import metrics


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    n=st.integers(1, 40),
    n_top=st.integers(1, 20),
    batch=st.integers(1, 15),
    layout=st.sampled_from(["dense", "csr", "coo", "mixed"]),
)
def test_top_images_are_those_of_a_stable_sort(seed, n, n_top, batch, layout):
    rng = np.random.default_rng(seed)
    # Few distinct values, so that ties abound.
    latents = torch.from_numpy(rng.integers(0, 4, (n, 5)).astype(np.float32))
    metric = metrics.TopImages(n_features=5, n_top=n_top)
    for i, part in enumerate(torch.split(latents, batch)):
        kind = ["dense", "csr", "coo"][i % 3] if layout == "mixed" else layout
        metric.update(
            {"dense": part, "csr": part.to_sparse_csr(), "coo": part.to_sparse_coo()}[kind]
        )
    result = metric.compute()
    for k in range(5):
        column = latents[:, k].numpy()
        order = [i for i in np.argsort(-column, kind="stable")[:n_top] if column[i] > 0]
        expected = order + [-1] * (n_top - len(order))
        assert result.images[k].tolist() == expected
        assert result.values[k].tolist() == [column[i] if i >= 0 else 0 for i in expected]
    assert result.n_images == n


def test_top_images_merge_in_the_order_of_the_shards():
    latents = torch.rand(30, 4)
    shards = [metrics.TopImages(n_features=4, n_top=5) for _ in range(3)]
    for shard, part in zip(shards, torch.split(latents, 10), strict=True):
        shard.update(part)
    shards[1].merge_state(shards[2])
    shards[0].merge_state(shards[1])
    expected = metrics.top_images(latents, n_top=5)
    assert torch.equal(shards[0].compute().images, expected.images)


def loop_uniqueness(top):
    sets = [{i for i in row if i >= 0} for row in top.tolist()]
    used = [s for s in sets if s]
    jaccard = [len(a & b) / len(a | b) for a, b in itertools.combinations(used, 2)]
    return [sum(j > t / 10 for j in jaccard) / len(jaccard) for t in range(10)], jaccard, sets


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    k=st.integers(2, 25),
    n_images=st.integers(1, 30),
    n_top=st.integers(1, 16),
)
def test_uniqueness_is_the_loop_over_pairs(seed, k, n_images, n_top):
    rng = np.random.default_rng(seed)
    top = torch.from_numpy(rng.integers(-1, n_images, (k, n_top)))
    top[:2] = top[:2].clamp(min=0)
    shares, jaccard, sets = loop_uniqueness(top)
    result = metrics.uniqueness(top)
    np.testing.assert_allclose(result.share_above, shares, atol=1e-12)
    assert result.mean_jaccard == pytest.approx(np.mean(jaccard))
    assert result.n_pairs == len(jaccard)
    assert result.n_left_out == sum(not s for s in sets)
    for i, mine in enumerate(sets):
        others = [len(mine & o) / len(mine | o) for j, o in enumerate(sets) if j != i and mine]
        if mine:
            assert float(result.max_jaccard[i]) == pytest.approx(max(others))
        else:
            assert math.isnan(float(result.max_jaccard[i]))


def test_uniqueness_in_blocks_is_the_same(monkeypatch):
    top = torch.randint(0, 60, (200, 16), generator=torch.Generator().manual_seed(0))
    whole = metrics.uniqueness(top)
    monkeypatch.setattr("vision_plugin.metrics._uniqueness.PRODUCTS_AT_ONCE", 500)
    assert metrics.uniqueness(top).share_above == whole.share_above


def test_streamed_uniqueness_is_that_of_its_top_images():
    latents = torch.rand(50, 8) * (torch.rand(50, 8) < 0.5)
    metric = metrics.Uniqueness(n_features=8, n_top=6)
    for part in torch.split(latents, 20):
        metric.update(part.to_sparse_csr())
    expected = metrics.uniqueness(metrics.top_images(latents, n_top=6).images)
    assert metric.compute().share_above == expected.share_above
    assert metric.compute().summary()["share_above_0.5"] == expected.share_above[5]


def test_uniqueness_needs_a_pair():
    with pytest.raises(ValueError, match="1 of 3 have a top image"):
        metrics.uniqueness(torch.tensor([[1, 2], [-1, -1], [-1, -1]]))


PATHS = [("animal", "dog", "beagle"), ("animal", "dog", "pug"), ("animal", "cat"), ("tool",), ()]


def loop_depth(images, paths):
    depths = []
    for a, b in itertools.combinations(images, 2):
        depth = 0
        for x, y in zip(paths[a], paths[b], strict=False):
            if x != y:
                break
            depth += 1
        depths.append(depth)
    return sum(depths) / len(depths)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), k=st.integers(1, 8), n_top=st.integers(2, 8))
def test_hierarchy_is_the_loop_over_pairs(seed, k, n_top):
    rng = np.random.default_rng(seed)
    paths = [tuple(str(step) for step in rng.integers(0, 2, rng.integers(0, 5))) for _ in range(20)]
    top = torch.from_numpy(rng.integers(0, 20, (k, n_top)))
    result = metrics.hierarchy(top, paths)
    expected = [loop_depth(row, paths) for row in top.tolist()]
    np.testing.assert_allclose(result.depth.numpy(), expected, atol=1e-12)
    assert result.chance_depth == pytest.approx(loop_depth(range(20), paths))


def test_equal_steps_under_different_parents_are_different_nodes():
    paths = [("animal", "mouse"), ("device", "mouse")]
    assert metrics.hierarchy(torch.tensor([[0, 1]]), paths).depth.tolist() == [0.0]


def test_latents_with_a_short_list_are_left_out():
    top = torch.tensor([[0, 1], [0, -1], [3, 3]])
    result = metrics.hierarchy(top, PATHS)
    assert result.depth[[0, 2]].tolist() == [2.0, 1.0]
    assert result.depth[1].isnan()
    assert result.n_left_out == 1
    assert result.summary()["mean_depth"] == 1.5


def test_a_planted_matryoshka_shows_the_levels_of_its_taxonomy():
    levels = [(f"a{i // 32}", f"b{i // 8}", f"c{i // 2}") for i in range(128)]
    broad = torch.stack([torch.arange(128) // 32 == i for i in range(4)], 1)
    middle = torch.stack([torch.arange(128) // 8 == i for i in range(16)], 1)
    groups = metrics.matryoshka_groups([4, 20])
    metric = metrics.Hierarchy(n_features=20, taxonomy_paths=levels, groups=groups, n_top=8)
    generator = torch.Generator().manual_seed(0)
    latents = torch.cat([broad, middle], 1).float() * torch.rand(128, 20, generator=generator)
    for part in torch.split(latents, 50):
        metric.update(part)
    result = metric.compute()
    assert result.group_size == {0: 4, 1: 16}
    assert 1 <= result.group_depth[0] < 2 <= result.group_depth[1] < 3
    assert result.chance_depth < 1
    assert result.summary()["depth_group_1"] == result.group_depth[1]


def test_groups_by_width_and_by_frequency():
    assert metrics.matryoshka_groups([2, 5]).tolist() == [0, 0, 1, 1, 1]
    with pytest.raises(ValueError, match="positive and growing"):
        metrics.matryoshka_groups([5, 2])
    frequency = torch.tensor([0.5, 0.05, 0.001, 0.0])
    assert metrics.frequency_groups(frequency).tolist() == [-1, -2, -3, -99]


def test_hierarchy_wants_a_path_per_image():
    with pytest.raises(ValueError, match="image 7 is among the top images"):
        metrics.hierarchy(torch.tensor([[0, 7]]), PATHS)
    with pytest.raises(ValueError, match="bare string"):
        metrics.hierarchy(torch.tensor([[0, 1]]), ["animal", "tool"])
    with pytest.raises(ValueError, match="groups= has shape"):
        metrics.hierarchy(torch.tensor([[0, 1]]), PATHS, torch.tensor([0, 1]))


def test_taxonomies_from_columns_json_and_csv_agree(tmp_path):
    rows = [path + (None,) * (3 - len(path)) for path in PATHS]
    table = dict(zip(["kingdom", "kind", "breed"], map(list, zip(*rows, strict=True)), strict=True))
    assert metrics.taxonomy_from_columns(table, ["kingdom", "kind", "breed"]) == tuple(PATHS)
    ids = [f"image {i}" for i in range(len(PATHS))]
    in_order, by_id, lines = (tmp_path / name for name in ("list.json", "ids.json", "t.csv"))
    in_order.write_text(json.dumps(PATHS))
    by_id.write_text(json.dumps(dict(zip(ids, PATHS, strict=True))))
    with lines.open("w", newline="") as file:
        csv.writer(file).writerows(
            [["id", *table], *([i, *r] for i, r in zip(ids, rows, strict=True))]
        )
    assert metrics.read_taxonomy(in_order) == tuple(PATHS)
    assert metrics.read_taxonomy(lines) == tuple(PATHS)
    backwards = tuple(PATHS[::-1])
    assert metrics.read_taxonomy(by_id, image_ids=ids[::-1]) == backwards
    assert metrics.read_taxonomy(lines, image_ids=ids[::-1]) == backwards
    assert metrics.read_taxonomy(lines, columns=["kingdom"])[0] == ("animal",)


def test_taxonomy_files_that_do_not_fit_are_named(tmp_path):
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json is not JSON"):
        metrics.read_taxonomy(bad)
    bad.write_text('{"a": ["x"]}')
    with pytest.raises(ValueError, match="pass image_ids"):
        metrics.read_taxonomy(bad)
    with pytest.raises(ValueError, match="no entry for 1 images, such as 'b'"):
        metrics.read_taxonomy(bad, image_ids=["a", "b"])
    bad.write_text('[["x"], ["y"], ["z"]]')
    with pytest.raises(ValueError, match=r"bad\.json lists 3 paths, but there are 2 images"):
        metrics.read_taxonomy(bad, image_ids=["a", "b"])
    bad.write_text('["x"]')
    with pytest.raises(ValueError, match="list of paths"):
        metrics.read_taxonomy(bad)
    table = tmp_path / "t.csv"
    table.write_text("id,kind\n1,dog\n")
    with pytest.raises(ValueError, match=r"\['breed'\] are not among"):
        metrics.read_taxonomy(table, columns=["breed"])
    with pytest.raises(ValueError, match=r"neither \.json nor \.csv"):
        metrics.read_taxonomy(tmp_path)
