"""A store that is changed while it is open is noticed at the next read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from tests.activations._stores import RESID, images, make_store, tiny_model
from vision_plugin.activations import ActivationStore, ShardError

N = 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.set_num_threads(1)
    make_store(tmp_path / "s", N)
    return tmp_path / "s"


def overwrite(path: Path, place: int, value: bytes) -> None:
    """Change bytes of a file in place."""
    with path.open("r+b") as stream:
        stream.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        stream.write(value)


def by_the_model(image: int) -> torch.Tensor:
    """Activations of an image from the model itself."""
    model = tiny_model()
    _, cache = model.run_with_cache(model.preprocess([images(N)[image]]))
    return cache[RESID]


def test_a_mapped_shard_that_is_written_to_is_checked_again(folder: Path) -> None:
    store = ActivationStore(folder)
    before = store.activations(RESID, slice(0, 8)).clone()
    assert torch.allclose(before[3:4], by_the_model(3), atol=1e-5)
    overwrite(folder / "shard-00000.safetensors", -64, b"\x01" * 64)
    with pytest.raises(ShardError, match=r"expected checksum .* vision-plugin verify"):
        store.activations(RESID, slice(0, 8))
    with pytest.raises(ShardError):
        store.activations(RESID, [7])
    assert len(store.activations(RESID, slice(8, 16))) == 8


def test_a_mapped_shard_that_is_cut_short_is_not_read(folder: Path) -> None:
    store = ActivationStore(folder)
    store.activations(RESID, [0])
    os.truncate(folder / "shard-00000.safetensors", 1000)
    with pytest.raises(ShardError, match=r"expected .* bytes, found 1,000"):
        store.activations(RESID, [0])


def test_a_mapped_shard_that_is_gone_is_missed(folder: Path) -> None:
    store = ActivationStore(folder)
    store.activations(RESID, [0])
    (folder / "shard-00000.safetensors").unlink()
    with pytest.raises(ShardError, match="missing"):
        store.activations(RESID, [0])


def test_the_same_bytes_at_another_time_are_as_good(folder: Path) -> None:
    store = ActivationStore(folder)
    before = store.activations(RESID, slice(0, 8)).clone()
    shard = folder / "shard-00000.safetensors"
    copy = folder / "copy"
    copy.write_bytes(shard.read_bytes())
    copy.replace(shard)
    os.utime(shard, (1, 1))
    assert torch.equal(store.activations(RESID, slice(0, 8)), before)


def test_a_shard_of_another_extraction_is_refused(folder: Path, tmp_path: Path) -> None:
    store = ActivationStore(folder)
    store.activations(RESID, [0])
    make_store(tmp_path / "other", N, seed=1)
    for name in ("shard-00000.safetensors", "shard-00000.json"):
        (folder / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(ShardError, match="plan_sha256"):
        store.activations(RESID, [0])


def test_batches_of_a_shard_that_is_written_to_while_they_are_served(folder: Path) -> None:
    store = ActivationStore(folder)
    batches = store.batches(RESID, 16, n_batches_in_buffer=2)
    next(batches)
    for shard in sorted(folder.glob("*.safetensors")):
        for place in range(-4000, 0, 400):
            overwrite(shard, place, b"\x01" * 4)
    with pytest.raises(ShardError, match=r"expected checksum .* vision-plugin verify"):
        for _ in range(100):
            next(batches)
    batches.close()


def test_batches_of_a_store_that_lacks_a_shard_are_refused_at_once(folder: Path) -> None:
    store = ActivationStore(folder)
    os.truncate(folder / "shard-00002.safetensors", 10)
    with pytest.raises(ShardError, match="found 10"):
        store.batches(RESID, 16)
