"""A damaged shard is a named error, and never a wrong tensor."""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.activations._stores import MLP, RESID
from vision_plugin.activations import ActivationStore, ShardError, StoreError, verify

pytestmark = pytest.mark.usefixtures("one_thread")

SHARD, OTHER = "shard-00001.safetensors", "shard-00002.safetensors"


def reads(folder: Path) -> list[torch.Tensor | str]:
    """What each way of reading everything gives: the tensor, or the error."""

    def mapped(name: str) -> Callable[[], torch.Tensor]:
        return lambda: ActivationStore(folder).activations(name)

    def batched() -> torch.Tensor:
        batches = ActivationStore(folder).batches([RESID, MLP], 340)
        found = batches.next_batch()
        order = (found.images * 17 + found.rows).argsort()
        return torch.cat([found.activations[name][order] for name in (RESID, MLP)], dim=1)

    results: list[torch.Tensor | str] = []
    for read in (mapped(RESID), mapped(MLP), batched):
        try:
            results.append(read())
        except StoreError as error:
            results.append(str(error))
    return results


@pytest.fixture(scope="module")
def truth(sound_store: Path) -> list[torch.Tensor]:
    found = reads(sound_store)
    assert all(isinstance(tensor, torch.Tensor) for tensor in found)
    return found  # type: ignore[return-value]


def check(folder: Path, truth: list[torch.Tensor], shard: str = SHARD) -> int:
    """No read gives a wrong tensor, every error names the shard; the number of errors."""
    found = reads(folder)
    for result, right in zip(found, truth, strict=True):
        if isinstance(result, str):
            assert shard in result
            assert "expected" in result
        else:
            assert torch.equal(result, right)
    report = verify(folder)
    assert [problem.file for problem in report.problems] == [shard]
    assert shard in str(report)
    return sum(isinstance(result, str) for result in found)


def header_length(raw: bytes) -> int:
    return 8 + int(struct.unpack("<Q", raw[:8])[0])


def regions(raw: bytes) -> dict[str, int]:
    """A place in each region of a shard."""
    start = header_length(raw)
    return {
        "length": 3,
        "header": start // 2,
        "first tensor": start + 5,
        "second tensor": len(raw) - 700,
        "last byte": len(raw) - 1,
    }


@pytest.mark.parametrize(
    "region", ["length", "header", "first tensor", "second tensor", "last byte"]
)
def test_truncated(store_path: Path, truth: list[torch.Tensor], region: str) -> None:
    path = store_path / SHARD
    os.truncate(path, regions(path.read_bytes())[region])
    assert check(store_path, truth) == 3


def test_emptied_grown_and_gone(store_path: Path, truth: list[torch.Tensor]) -> None:
    path = store_path / SHARD
    raw = path.read_bytes()
    for content in (b"", raw + b"\0", raw * 2):
        path.write_bytes(content)
        assert check(store_path, truth) == 3
    path.unlink()
    assert check(store_path, truth) == 3


def test_any_flipped_byte(
    sound_store: Path, truth: list[torch.Tensor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = Path(shutil.copytree(sound_store, tmp_path_factory.mktemp("flip") / "s"))
    raw = (folder / SHARD).read_bytes()
    start = header_length(raw)
    places = st.one_of(st.integers(0, start - 1), st.integers(start, len(raw) - 1))

    @given(place=places, bits=st.integers(1, 255))
    @settings(max_examples=60, deadline=None)
    def flip(place: int, bits: int) -> None:
        damaged = bytearray(raw)
        damaged[place] ^= bits
        (folder / SHARD).write_bytes(damaged)
        hit = check(folder, truth)
        assert hit >= (2 if place >= start else 0)

    flip()


def test_bytes_within_a_tensor_exchanged(store_path: Path, truth: list[torch.Tensor]) -> None:
    raw = (store_path / SHARD).read_bytes()
    (store_path / SHARD).write_bytes(raw[:-64] + raw[-32:] + raw[-64:-32])
    assert check(store_path, truth) == 2


def test_shards_swapped(store_path: Path, sound_store: Path, tmp_path: Path) -> None:
    first = "shard-00000.safetensors"
    assert (store_path / first).stat().st_size == (store_path / SHARD).stat().st_size
    (store_path / first).rename(tmp_path / "x")
    (store_path / SHARD).rename(store_path / first)
    (tmp_path / "x").rename(store_path / SHARD)
    for result in reads(store_path):
        assert isinstance(result, str)
        assert "'shard': '0'" in result
        assert "'shard': '1'" in result
    assert [problem.file for problem in verify(store_path).problems] == [first, SHARD]


def test_shards_swapped_with_their_markers(store_path: Path, tmp_path: Path) -> None:
    for suffix in ("safetensors", "json"):
        a, b = store_path / f"shard-00000.{suffix}", store_path / f"shard-00001.{suffix}"
        a.rename(tmp_path / "x")
        b.rename(a)
        (tmp_path / "x").rename(b)
    assert all(isinstance(result, str) for result in reads(store_path))
    found = [problem.file for problem in verify(store_path).problems]
    assert found == [f"shard-0000{i}.{s}" for i in (0, 1) for s in ("json", "safetensors")]


def test_a_shard_of_another_store_of_the_same_size(store_path: Path, tmp_path: Path) -> None:
    from tests.activations._stores import make_store

    make_store(tmp_path / "other", 20, hook_names=[RESID, MLP], seed=9)
    shutil.copy(tmp_path / "other" / SHARD, store_path / SHARD)
    with pytest.raises(ShardError, match="plan_sha256"):
        ActivationStore(store_path).activations(RESID)


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_what_is_not_a_plain_file_is_not_opened(
    store_path: Path, tmp_path: Path, truth: list[torch.Tensor], kind: str
) -> None:
    path = store_path / SHARD
    if kind == "link":
        path.rename(tmp_path / "real")
        path.symlink_to(tmp_path / "real")
    else:
        path.unlink()
        path.mkdir() if kind == "folder" else os.mkfifo(path)
    assert check(store_path, truth) == 3


class TestMarkers:
    MARKER = "shard-00001.json"

    def test_one_that_is_gone(self, store_path: Path) -> None:
        (store_path / self.MARKER).unlink()
        with pytest.raises(ShardError, match=r"shard-00001\.json: expected in"):
            ActivationStore(store_path).activations(RESID)
        assert [p.file for p in verify(store_path).problems] == [self.MARKER]

    def test_one_that_was_edited(self, store_path: Path) -> None:
        path = store_path / self.MARKER
        path.write_text(path.read_text().replace('"8"', '"9"'))
        with pytest.raises(ShardError, match="expected SHA-256"):
            ActivationStore(store_path).ids  # noqa: B018
        assert [p.file for p in verify(store_path).problems] == [self.MARKER]

    def test_one_that_is_a_link(self, store_path: Path, tmp_path: Path) -> None:
        path = store_path / self.MARKER
        path.rename(tmp_path / "real")
        path.symlink_to(tmp_path / "real")
        with pytest.raises(ShardError, match="found a symbolic link"):
            ActivationStore(store_path).activations(RESID)

    def test_a_broken_one_in_an_unfinished_store_names_itself(self, store_path: Path) -> None:
        (store_path / "manifest.json").unlink()
        (store_path / self.MARKER).write_text("{")
        with pytest.raises(StoreError, match=r"shard-00001\.json: expected JSON"):
            ActivationStore(store_path)
        assert [p.file for p in verify(store_path).problems] == [self.MARKER]


def test_verify_names_every_damaged_shard_and_what_is_hit(store_path: Path) -> None:
    for name in (SHARD, OTHER):
        raw = bytearray((store_path / name).read_bytes())
        raw[-1] ^= 1
        (store_path / name).write_bytes(raw)
    report = verify(store_path)
    assert not report.ok
    assert [problem.file for problem in report.problems] == [SHARD, OTHER]
    assert all(MLP in problem.message for problem in report.problems)
    assert "2 problems" in str(report)


def test_a_shard_too_many_is_noticed(store_path: Path) -> None:
    shutil.copy(store_path / SHARD, store_path / "shard-00003.safetensors")
    assert [problem.file for problem in verify(store_path).problems] == ["shard-00003.safetensors"]
