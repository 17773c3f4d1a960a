"""Files and folders that are put in place: whole, after any kill, and as safetensors says."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import resource
import signal
import stat
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests._processes import ended, in_child, kill_at_change
from vision_plugin._disk import (
    exchange,
    locked,
    remove_unfinished,
    whole_file,
    whole_folder,
    write_json,
    write_tensors,
)
from vision_plugin._ours import Kind, check_replaceable_file

MINE = Kind("a test's", "top.txt", None, re.compile(r"top\.txt|deep/below\.txt"))

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def fill(folder: Path, text: str) -> None:
    (folder / "deep").mkdir()
    for path in (folder / "top.txt", folder / "deep" / "below.txt"):
        with path.open("w") as stream:
            stream.write(text)


def content(folder: Path) -> list[str]:
    return [(folder / name).read_text() for name in ("top.txt", "deep/below.txt")]


def replace(folder: Path, text: str) -> None:
    with whole_folder(folder, replaces=MINE) as made:
        fill(made, text)


@pytest.fixture
def two_renamings(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that exchanges no names, as NFS."""
    monkeypatch.setattr("vision_plugin._disk.exchange", lambda one, other: False)


@pytest.mark.usefixtures("two_renamings")
@pytest.mark.parametrize("after", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_folder_is_the_old_or_the_new_one_after_a_kill_at_each_change(
    tmp_path: Path, after: bool
) -> None:
    survived, seen = False, set()
    for number in range(1, 60):
        folder = tmp_path / str(number) / "f"
        replace(folder, "old")

        def work(folder: Path = folder, number: int = number) -> None:
            kill_at_change(number, after=after)
            replace(folder, "new")

        survived = ended(in_child(work)) == 0
        remove_unfinished(folder.parent)
        assert content(folder) in (["old"] * 2, ["new"] * 2), number
        seen.add(content(folder)[0])
        assert [path.name for path in folder.parent.iterdir()] == ["f"], number
        if survived:
            break
    assert survived
    assert seen == {"old", "new"}


def test_names_are_exchanged_in_one_step_that_no_kill_and_no_reader_cuts(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        fill(folder, folder.name)
    if not exchange(one, other):
        pytest.skip(f"the file system of {tmp_path} exchanges no names")
    assert (content(one), content(other)) == (["other"] * 2, ["one"] * 2)
    assert not exchange(one, tmp_path / "missing")
    assert content(one) == ["other"] * 2
    folder = tmp_path / "f"
    for number in range(1, 60):
        replace(folder, "old")

        def work(number: int = number) -> None:
            kill_at_change(number)
            replace(folder, "new")

        survived = ended(in_child(work)) == 0
        assert content(folder) in (["old"] * 2, ["new"] * 2), number  # nothing has to come back
        if survived:
            break
    assert survived
    child = in_child(lambda: [replace(folder, "new") for _ in range(50)])
    looks, end = 0, (0, 0)
    while end == (0, 0):
        assert folder.exists()
        looks, end = looks + 1, os.waitpid(child, os.WNOHANG)
    assert end == (child, 0)
    assert looks > 50


@pytest.mark.usefixtures("two_renamings")
def test_what_was_replaced_is_there_again_when_the_next_one_begins(tmp_path: Path) -> None:
    folder, cut = tmp_path / "f", 0
    for number in range(1, 60):
        replace(folder, "old")

        def work(number: int = number) -> None:
            kill_at_change(number)
            replace(folder, "new")

        if ended(in_child(work)) == 0:
            break
        cut += not folder.exists()
        with pytest.raises(RuntimeError), whole_folder(folder, replaces=MINE):
            assert content(folder) in (["old"] * 2, ["new"] * 2), number
            raise RuntimeError
    assert cut  # a kill came between the two renames


def test_a_folder_that_another_process_fills_is_left_alone(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "f", replaces=MINE) as slow:
        assert ended(in_child(lambda: replace(tmp_path / "f", "quick"))) == 0
        assert ended(in_child(lambda: remove_unfinished(tmp_path))) == 0
        fill(slow, "slow")
    assert content(tmp_path / "f") == ["slow"] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_folders_of_other_people_that_look_alike_are_left_alone(tmp_path: Path) -> None:
    for name in ("f.part-1", ".f.part-2", ".g.part-3/lock"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "f.part-1" / "lock").write_text("mine")
    (tmp_path / ".f.part-2" / "notes").write_text("mine")
    replace(tmp_path / "f", "new")
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["f", "f.part-1", ".f.part-2", ".g.part-3"]
    )


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    replace(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    replace(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == ["new"] * 2


def test_files_that_a_library_keeps_to_their_owner_are_readable(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "f") as made:
        fill(made, "text")
        (made / "deep" / "below.txt").chmod(0o600)
    (tmp_path / "plain").touch()
    mode = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert stat.S_IMODE((tmp_path / "f" / "deep" / "below.txt").stat().st_mode) == mode


def test_a_failed_file_leaves_the_old_one_and_no_litter(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    with pytest.raises(RuntimeError), whole_file(tmp_path / "f") as stream:
        stream.write(b"half")
        raise RuntimeError
    assert (tmp_path / "f").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine
@given(
    st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=5
    )
)
def test_the_safetensors_library_reads_what_is_written(
    kinds: list[tuple[torch.dtype, list[int]]],
) -> None:
    tensors = {
        f"t{i}": torch.randint(0, 2, shape).to(kind) for i, (kind, shape) in enumerate(kinds)
    }
    stream = io.BytesIO()
    written = write_tensors(stream, tensors, {"format": "mine"})
    found = safetensors.torch.load(stream.getvalue())
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert written.bytes == len(stream.getvalue())
    assert written.sha256 == hashlib.sha256(stream.getvalue()).hexdigest()
    length = int.from_bytes(stream.getvalue()[:8], "little")
    assert json.loads(stream.getvalue()[8 : 8 + length])["__metadata__"] == {"format": "mine"}


def test_a_tensor_is_written_in_the_librarys_own_bytes_whatever_its_strides() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    stream = io.BytesIO()
    write_tensors(stream, {"sparsity": tensor.T})
    assert stream.getvalue() == safetensors.torch.save({"sparsity": tensor.T.contiguous()})


@pytest.mark.parametrize("name", ["notes.txt", "deep/more.txt", "other/top.txt"])
def test_a_folder_with_anything_else_in_it_is_not_replaced(name: str, tmp_path: Path) -> None:
    replace(tmp_path / "f", "old")
    mine = tmp_path / "f" / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    with pytest.raises(FileExistsError, match=re.escape(repr(name))):
        replace(tmp_path / "f", "new")
    mine.unlink()
    if name.startswith("other"):
        with pytest.raises(FileExistsError, match="'other'"):  # an empty folder may mean something
            replace(tmp_path / "f", "new")
        mine.parent.rmdir()
    assert content(tmp_path / "f") == ["old"] * 2
    replace(tmp_path / "f", "new")
    with pytest.raises(FileExistsError, match="left alone"), whole_folder(tmp_path / "f"):
        pass
    assert content(tmp_path / "f") == ["new"] * 2


def test_what_comes_into_the_place_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with (
        pytest.raises(FileExistsError, match=r"'photo\.png'"),
        whole_folder(tmp_path / "f", replaces=MINE) as made,
    ):
        fill(made, "new")
        (tmp_path / "f").mkdir()
        (tmp_path / "f" / "photo.png").write_text("mine")
    assert (tmp_path / "f" / "photo.png").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_processes_that_make_one_folder_take_turns(tmp_path: Path) -> None:
    texts = ["one", "two", "three"]

    def often(text: str) -> None:
        for _ in range(30):
            replace(tmp_path / "f", text)

    children = [in_child(lambda text=text: often(text)) for text in texts]
    seen = set()
    for child in children:
        assert ended(child) == 0
        seen.add(tuple(content(tmp_path / "f")))
    assert seen <= {(text, text) for text in texts}
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


@pytest.mark.parametrize("after", [False, True])
def test_a_json_file_is_the_old_or_the_new_one_after_a_kill_at_each_change(
    tmp_path: Path, after: bool
) -> None:
    path, survived = tmp_path / "scores.json", False
    for number in range(1, 20):
        write_json({"schema": "old"}, path)

        def work(number: int = number) -> None:
            kill_at_change(number, after=after)
            write_json({"schema": "new"}, path)

        survived = ended(in_child(work)) == 0
        assert json.loads(path.read_text())["schema"] in ("old", "new")
        write_json({"schema": "next"}, path)
        assert [left.name for left in tmp_path.iterdir()] == ["scores.json"], number
        if survived:
            break
    assert survived


def test_a_json_file_that_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    with whole_file(path) as slow:
        assert ended(in_child(lambda: write_json({"by": "quick"}, path))) == 0
        slow.write(b'{"by": "slow"}')
    assert json.loads(path.read_text()) == {"by": "slow"}
    for name in (".unfinished-x-scores.json", ".unfinished-12-other.json"):
        (tmp_path / name).write_text("mine")
    write_json({"by": "me"}, path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_full_disk_says_what_has_no_room(kind: str, tmp_path: Path) -> None:
    if kind == "folder":
        replace(tmp_path / "f", "old")
    else:
        write_json({"text": "old"}, tmp_path / "f")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        with pytest.raises(OSError, match=r"no room to write f .*: free some room and run"):
            if kind == "folder":
                replace(tmp_path / "f", "new" * 5000)
            else:
                write_json({"text": "new" * 5000}, tmp_path / "f")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    found = content(tmp_path / "f")[0] if kind == "folder" else (tmp_path / "f").read_text()
    assert "old" in found
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_files_of_one_schema_alone_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    check_replaceable_file(path, "mine/")
    write_json({"schema": "mine/1", "more": 1}, path)
    check_replaceable_file(path, "mine/")
    for text in ("", "{}", '{"a": 1, "schema": "mine/1"}', '{"schema": "other/1"}', "[1]"):
        path.write_text(text)
        with pytest.raises(FileExistsError, match="left alone"):
            check_replaceable_file(path, "mine/")
    with pytest.raises(FileExistsError, match="is a folder"):
        check_replaceable_file(tmp_path, "mine/")
    with pytest.raises(NotADirectoryError, match="is no folder"):
        check_replaceable_file(path / "below.json", "mine/")


def test_a_lock_ends_with_its_process_and_not_with_the_ones_that_it_forked(tmp_path: Path) -> None:
    """Decoding workers outlive a killed extraction for seconds, and the next one need not wait."""
    path, busy = tmp_path / ".lock", BlockingIOError("busy")
    read, write = os.pipe()

    def hold() -> None:
        with locked(path, busy):
            if os.fork() == 0:
                os.write(write, str(os.getpid()).encode())
            time.sleep(60)

    child = in_child(hold)
    worker = int(os.read(read, 20))
    try:
        with pytest.raises(BlockingIOError), locked(path, busy):
            pass
        os.kill(child, signal.SIGKILL)
        ended(child)
        os.kill(worker, 0)  # it is still there
        with locked(path, busy):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
