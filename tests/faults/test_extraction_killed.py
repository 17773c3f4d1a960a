"""An extraction is killed at any moment; run again, it ends with the same bytes."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests._processes import ended, in_child, kill_at_change
from tests.activations._stores import RESID, content, make_store, tiny_model
from vision_plugin.activations import ActivationStore, StoreError, StoreLockedError, verify
from vision_plugin.activations._decoding import end_with
from vision_plugin.activations._extract import check_folder

pytestmark = pytest.mark.usefixtures("one_thread")

N, SETTINGS = 60, {"images_per_shard": 6, "batch_size": 3}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store as it is without interruption."""
    torch.set_num_threads(1)
    tiny_model()
    folder = tmp_path_factory.mktemp("straight") / "s"
    make_store(folder, N, **SETTINGS)
    return folder


def opens_to_what_is_complete(folder: Path, whole: ActivationStore) -> int:
    """Check every shard that an interrupted store shows; their number."""
    if not (folder / "plan.json").exists():
        return 0
    store = ActivationStore(folder)
    places = store.image_indices
    if len(store):
        assert torch.equal(store.activations(RESID), whole.activations(RESID, places))
    assert verify(folder).ok
    return len(store.shards)


@pytest.mark.slow
def test_twenty_kills_at_random_moments(straight: Path, tmp_path: Path) -> None:
    whole, kills, seen = ActivationStore(straight), 0, set()
    start = time.monotonic()
    make_store(tmp_path / "timed", N, **SETTINGS)
    duration = time.monotonic() - start
    moments = random.Random(4)
    folder = tmp_path / "s0"
    while kills < 20:
        child = in_child(lambda at=folder: make_store(at, N, **SETTINGS))
        time.sleep(moments.uniform(0.0, duration / 2))
        os.kill(child, signal.SIGKILL)
        killed = ended(child) == -signal.SIGKILL
        kills += killed
        seen.add(opens_to_what_is_complete(folder, whole))
        if not killed:
            assert content(folder) == content(straight)
            folder = tmp_path / f"s{kills}"
    make_store(folder, N, **SETTINGS)
    assert content(folder) == content(straight)
    assert len(seen) > 2, f"every kill came at the same moment: {seen}"


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_each_step_of_writing(tmp_path: Path, after: bool) -> None:
    """Opening, syncing, renaming, of the plan, of shards and markers, of the manifest."""
    whole = make_store(tmp_path / "straight", 6, **SETTINGS)
    survived = False
    for step in range(1 + after, 60, 2):
        folder = tmp_path / str(step)

        def work(folder: Path = folder, step: int = step) -> None:
            kill_at_change(step, after=after)
            make_store(folder, 6, **SETTINGS)

        survived = ended(in_child(work)) == 0
        opens_to_what_is_complete(folder, whole)
        make_store(folder, 6, **SETTINGS)
        assert content(folder) == content(tmp_path / "straight"), f"killed {after=} at {step=}"
        if survived:
            break
    assert survived, "there are more steps than were tried"


def test_workers_do_not_outlive_a_killed_extraction(tmp_path: Path) -> None:
    child = in_child(lambda: make_store(tmp_path / "s", N, n_workers=1, **SETTINGS))
    workers: list[int] = []
    deadline = time.monotonic() + 20
    while not workers and time.monotonic() < deadline and not _zombie(child):
        workers = _children(child)
    os.kill(child, signal.SIGKILL)
    ended(child)
    deadline = time.monotonic() + 120  # a worker that is still importing ends after that
    while any(map(_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_alive, workers))


def test_a_worker_ends_whenever_its_parent_is_killed(tmp_path: Path) -> None:
    """Also where PyTorch's own watch over the parent begins after that."""
    started = tmp_path / "started"

    def parent() -> None:
        mine = os.getpid()

        def worker() -> None:
            end_with(mine)
            started.write_text(str(os.getpid()))
            time.sleep(120)

        ended(in_child(worker))

    child = in_child(parent)
    deadline = time.monotonic() + 60
    while not (started.exists() and started.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    worker = int(started.read_text())
    assert _alive(worker)
    os.kill(child, signal.SIGKILL)
    ended(child)
    deadline = time.monotonic() + 60
    while _alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(worker)


def _children(process: int) -> list[int]:
    listed = Path(f"/proc/{process}/task/{process}/children")
    return [int(number) for number in listed.read_text().split()] if listed.exists() else []


def _alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _zombie(process: int) -> bool:
    return not _alive(process)


@pytest.mark.slow
def test_two_at_once_do_not_harm_each_other(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"

    def until_done() -> None:
        while True:
            try:
                make_store(folder, N, **SETTINGS)
                return
            except StoreLockedError:
                time.sleep(0.01)

    children = [in_child(until_done) for _ in range(3)]
    assert [ended(child) for child in children] == [0, 0, 0]
    assert content(folder) == content(straight)


def test_a_store_may_begin_while_its_folder_is_looked_at(
    straight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    listed = Path.iterdir

    def begun_by_another(path: Path) -> Iterator[Path]:
        if path == folder and not (folder / "plan.json").exists():
            shutil.copytree(straight, folder, dirs_exist_ok=True)
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", begun_by_another)
    check_folder(folder)
    (folder / "plan.json").unlink()
    monkeypatch.undo()
    with pytest.raises(StoreError, match=r"holds other things"):
        check_folder(folder)


@pytest.mark.parametrize("file", ["plan.json", "shard-00000.json", "shard-00000.safetensors"])
def test_no_room_is_a_clear_error_and_a_store_to_go_on_with(
    straight: Path, tmp_path: Path, file: str
) -> None:
    """A limit on the size of files stands in for the full disk; the system refuses the write."""
    folder, told = tmp_path / "s", tmp_path / "told.txt"
    limit = (straight / file).stat().st_size - 1

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            make_store(folder, N, **SETTINGS)
        except OSError as error:
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            )
            told.write_text(f"{type(error).__name__}: {error}")

    assert ended(in_child(work)) == 0
    assert told.read_text().startswith("StoreFullError")
    assert "no room to write" in told.read_text()
    assert "run the same command again" in told.read_text()
    assert not list(folder.glob(".partial-*"))
    opens_to_what_is_complete(folder, ActivationStore(straight))
    make_store(folder, N, **SETTINGS)
    assert content(folder) == content(straight)


def test_a_disk_that_is_really_full(straight: Path, tmp_path: Path) -> None:
    """A file system of 64 KiB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        made = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if made.returncode:
        pytest.skip("this process may not mount a file system")
    try:
        with pytest.raises(OSError, match="No space left") as caught:
            make_store(folder / "s", N, **SETTINGS)
        assert type(caught.value).__name__ == "StoreFullError"
        assert opens_to_what_is_complete(folder / "s", ActivationStore(straight)) > 0
        subprocess.run(["mount", "-o", "remount,size=1m", str(folder)], check=True)
        make_store(folder / "s", N, **SETTINGS)
        assert content(folder / "s") == content(straight)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_an_interrupt_from_the_keyboard_leaves_a_store_to_go_on_with(
    straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "s"
    child = in_child(lambda: make_store(folder, N, **SETTINGS))
    while not (folder / "shard-00001.json").exists():
        time.sleep(0.001)
    os.kill(child, signal.SIGINT)
    ended(child)
    assert opens_to_what_is_complete(folder, ActivationStore(straight)) >= 1
    make_store(folder, N, **SETTINGS)
    assert content(folder) == content(straight)


def test_a_damaged_shard_is_made_again_once_deleted(straight: Path, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    make_store(folder, N, **SETTINGS)
    shard = folder / "shard-00003.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 1
    shard.write_bytes(raw)
    (damaged,) = verify(folder).problems
    assert damaged.file == shard.name
    shard.unlink()
    (folder / "shard-00003.json").unlink()
    make_store(folder, N, **SETTINGS)
    assert content(folder) == content(straight)
