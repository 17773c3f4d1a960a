"""`convert` writes a whole folder or nothing."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import pytest

from tests.formats.test_samples import DATA, assert_same_numbers, expected
from vision_plugin.formats import RefusedCheckpointError, convert, load_sae


def test_no_pickle_is_written(tmp_path: Path) -> None:
    out = convert(DATA / "patchsae-relu-pklgz", tmp_path / "out")
    assert {file.name for file in out.iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    assert list(tmp_path.iterdir()) == [out]
    assert (out / "sae_weights.safetensors").read_bytes()[8:9] == b"{"


def test_an_existing_folder_is_kept_unless_asked(tmp_path: Path) -> None:
    out = convert(DATA / "dl-topk", tmp_path / "out")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        convert(DATA / "dl-standard", out)
    assert_same_numbers(load_sae(out), expected("dl-topk"))
    convert(DATA / "dl-standard", out, overwrite=True)
    assert_same_numbers(load_sae(out), expected("dl-standard"))
    assert list(tmp_path.iterdir()) == [out]


def test_a_refusal_leaves_what_is_there_alone(tmp_path: Path) -> None:
    out = convert(DATA / "dl-topk", tmp_path / "out")
    with pytest.raises(RefusedCheckpointError):
        convert(DATA / "saev-topk", out, overwrite=True)
    with pytest.raises(RefusedCheckpointError):
        convert(DATA / "saev-topk", tmp_path / "other")
    assert_same_numbers(load_sae(out), expected("dl-topk"))
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_or_a_link_is_never_replaced(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("mine")
    (tmp_path / "elsewhere").mkdir()
    link.symlink_to(tmp_path / "elsewhere")
    for target in (file, link):
        with pytest.raises(FileExistsError, match="not a folder"):
            convert(DATA / "dl-topk", target, overwrite=True)
    assert file.read_text() == "mine"
    assert link.is_symlink()


def test_a_disk_that_takes_no_more_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    """The kernel refuses every write past 4 kB, in a process of its own."""
    out = convert(DATA / "dl-topk", tmp_path / "out")
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            convert(DATA / "dl-standard", out, overwrite=True)
        except Exception:
            os._exit(17)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 17
    assert_same_numbers(load_sae(out), expected("dl-topk"))
    assert list(tmp_path.iterdir()) == [out]
