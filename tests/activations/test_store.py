"""A store reads lazily, joins with others, and tells what is in it."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.activations._stores import D_MODEL, MLP, N_TOKENS, RESID, content, make_store
from vision_plugin.activations import ActivationStore, StoreMismatchError, info, verify

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("stores") / "s"
    make_store(folder, 20, hook_names=[RESID, MLP])
    return folder


def test_the_shards_are_plain_safetensors_files(path: Path) -> None:
    shards = [load_file(file) for file in sorted(path.glob("*.safetensors"))]
    store = ActivationStore(path)
    for name in (RESID, MLP):
        assert torch.equal(torch.cat([shard[name] for shard in shards]), store.activations(name))


@pytest.mark.parametrize(
    "images",
    [0, -1, slice(3, 7), slice(6, 18), slice(None, None, 3), [19, 0, 8, 7, 7], torch.tensor([5])],
)
def test_any_images_can_be_asked_for(path: Path, images: object) -> None:
    store = ActivationStore(path)
    whole = store.activations(RESID)
    found = store.activations(RESID, images)
    expected = whole[[images]] if isinstance(images, int) else whole[images]
    assert torch.equal(found, expected)


def test_no_image_is_an_empty_tensor(path: Path) -> None:
    assert ActivationStore(path).activations(RESID, []).shape == (0, N_TOKENS, D_MODEL)


@pytest.mark.parametrize("images", [20, -21, [3, 20]])
def test_a_image_that_is_not_there(path: Path, images: object) -> None:
    with pytest.raises(IndexError, match="of a store of 20"):
        ActivationStore(path).activations(RESID, images)


def test_opening_reads_no_shard(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vision_plugin.activations import _shards

    monkeypatch.setattr(_shards.Shard, "open", lambda self: pytest.fail("opened"))
    store = ActivationStore(path)
    assert len(store) == len(store.ids) == 20
    assert store.n_rows(RESID) == 20 * N_TOKENS


def test_reading_touches_only_the_shards_it_needs(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in path.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "shard-00001.safetensors").unlink()
    store = ActivationStore(copy)
    assert torch.equal(
        store.activations(RESID, [0, 19]), ActivationStore(path).activations(RESID, [0, 19])
    )


def test_writing_into_a_tensor_never_reaches_the_file(path: Path) -> None:
    before = content(path)
    tensor = ActivationStore(path).activations(RESID, slice(0, 4))
    tensor.fill_(7.0)
    assert content(path) == before
    assert not torch.equal(ActivationStore(path).activations(RESID, slice(0, 4)), tensor)


def test_a_store_travels_to_other_processes(path: Path) -> None:
    store = ActivationStore(path)
    store.activations(RESID, 0)
    other: ActivationStore = pickle.loads(pickle.dumps(store))  # noqa: S301
    assert torch.equal(other.activations(RESID), store.activations(RESID))


class TestConcatenation:
    def test_images_stand_behind_one_another(self, tmp_path: Path) -> None:
        a = make_store(tmp_path / "a", 11)
        b = make_store(tmp_path / "b", 7, images_per_shard=4, batch_size=2)
        both = ActivationStore.concatenate([a, b])
        assert len(both) == 18
        assert both.ids == a.ids + b.ids
        expected = torch.cat([a.activations(RESID), b.activations(RESID)])
        assert torch.equal(both.activations(RESID), expected)
        assert torch.equal(both.activations(RESID, [12, 0, 17]), expected[[12, 0, 17]])
        seen = torch.cat([next(both.batches(RESID, N_TOKENS * 18))])
        assert torch.equal(seen.sort(dim=0).values, expected.flatten(0, 1).sort(dim=0).values)

    def test_only_what_was_made_alike_joins(self, tmp_path: Path) -> None:
        a = make_store(tmp_path / "a", 4)
        for place, changes in enumerate(
            ({"tokens": "cls"}, {"dtype": "float16"}, {"hook_names": [MLP]})
        ):
            b = make_store(tmp_path / str(place), 4, **changes)
            with pytest.raises(StoreMismatchError, match="cannot be put behind"):
                ActivationStore.concatenate([a, b])
        with pytest.raises(ValueError, match="no stores"):
            ActivationStore.concatenate([])


class TestOpening:
    def test_a_folder_that_is_no_store(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="no activation store"):
            ActivationStore(tmp_path)
        with pytest.raises(FileNotFoundError, match="not a folder"):
            ActivationStore(tmp_path / "nowhere")

    def test_an_unfinished_store_opens_to_what_is_complete(
        self, path: Path, tmp_path: Path
    ) -> None:
        for name in ("plan.json", "shard-00001.json", "shard-00001.safetensors"):
            (tmp_path / name).write_bytes((path / name).read_bytes())
        (tmp_path / "shard-00002.safetensors").write_bytes(b"half of")
        store = ActivationStore(tmp_path)
        assert not store.complete
        assert torch.equal(
            store.activations(RESID), ActivationStore(path).activations(RESID, slice(8, 16))
        )
        report = verify(tmp_path)
        assert report.ok
        assert not report.complete
        assert info(tmp_path)["complete"] is False


def test_info_is_json_and_says_what_is_inside(path: Path) -> None:
    found = json.loads(json.dumps(info(path)))
    assert found["complete"] is True
    assert found["model"]["name"] == "tiny"
    assert found["hooks"][RESID] == {"d_in": 16, "rows_per_image": 17, "rows": 340}
    assert found["n_images"] == 20
    assert found["shards"] == 3
    assert found["bytes"] == sum(f.stat().st_size for f in path.glob("*.safetensors"))


def test_a_sound_store_verifies(path: Path) -> None:
    report = verify(path)
    assert report.ok
    assert report.complete
    assert "no problem" in str(report)
