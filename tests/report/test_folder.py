"""The folder: the same bytes every time, whole or not at all, and nobody else's files."""

from __future__ import annotations

import hashlib
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time

import pytest

import vision_plugin as vp
from tests._processes import ended, in_child, kill_at_change
from tests.report.conftest import draw_images, topk_sae
from tests.report.test_content import read_data
from vision_plugin.models import Harvester
from vision_plugin.report import _resume, _views
from vision_plugin.report._folder import new_folder, write_marker
from vision_plugin.report._resume import Checkpoint


def digest(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def small_report(folder, text):
    with new_folder(folder) as made:
        (made / "index.html").write_text(text)
        write_marker(made, {})


def test_two_builds_are_the_same_byte_for_byte(tmp_path, model, sae, images):
    for name in "ab":
        vp.report(
            sae,
            model,
            images,
            tmp_path / name,
            scores={"s": range(40)},
            concepts=["a red circle", "a blue square"],
        )
    first, second = digest(tmp_path / "a"), digest(tmp_path / "b")
    assert len(first) > 40
    assert first == second


@pytest.mark.slow
def test_batches_do_not_change_the_report(tmp_path, model, sae, images, monkeypatch):
    vp.report(sae, model, images, tmp_path / "a")
    monkeypatch.setattr("vision_plugin.report._encoding.CHUNK_ELEMENTS", 1)
    vp.report(sae, model, images, tmp_path / "b")
    whole, parts = read_data(tmp_path / "a"), read_data(tmp_path / "b")
    assert whole["images"] == parts["images"]
    for first, second in zip(whole["values"], parts["values"], strict=True):
        plain = [[-1.0 if v is None else v for v in values] for values in (first, second)]
        assert plain[0] == pytest.approx(plain[1], rel=1e-4)


def test_an_earlier_report_is_replaced(tmp_path, model, sae, images):
    out = tmp_path / "r"
    vp.report(sae, model, images, out, features=range(20))
    vp.report(sae, model, images, out, features=[1])
    assert [p.name for p in (out / "features").iterdir()] == ["1.html"]
    assert [p.name for p in tmp_path.iterdir()] == ["r"]
    assert not (out / "heat.part").exists()


def test_an_empty_folder_and_missing_parents_will_do(tmp_path, model, sae, images):
    (tmp_path / "empty").mkdir()
    vp.report(sae, model, images[:4], tmp_path / "empty", features=[1])
    vp.report(sae, model, images[:4], tmp_path / "a" / "b" / "c", features=[1])
    assert (tmp_path / "a/b/c/index.html").is_file()
    assert stat.S_IMODE((tmp_path / "a/b/c").stat().st_mode) & 0o500 == 0o500
    assert (tmp_path / "a/b/c").stat().st_mode == (tmp_path / "a/b").stat().st_mode


@pytest.mark.parametrize("marker", [None, "{}", '{"kind": "other"}', "not json", "[" * 9000])
def test_a_folder_that_is_no_report_is_left_alone(tmp_path, model, sae, images, marker):
    out = tmp_path / "thesis"
    out.mkdir()
    (out / "chapter.txt").write_text("years of work")
    if marker is not None:
        (out / "report.json").write_text(marker)
    before = digest(out)
    with pytest.raises(FileExistsError, match="not a report of vision_plugin"):
        vp.report(sae, model, images, out)
    assert digest(out) == before
    assert [p.name for p in tmp_path.iterdir()] == ["thesis"]


def test_notes_inside_a_report_are_not_lost(tmp_path):
    out = tmp_path / "r"
    small_report(out, "one")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"'notes\.txt' in it was not written by"):
        small_report(out, "two")
    assert (out / "index.html").read_text() == "one"
    assert (out / "notes.txt").read_text() == "mine"


def test_a_file_in_the_way_is_left_alone(tmp_path):
    (tmp_path / "r").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        small_report(tmp_path / "r", "two")
    assert (tmp_path / "r").read_text() == "mine"


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    small_report(tmp_path / "link", "one")
    small_report(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/index.html").read_text() == "two"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failed_build_leaves_the_earlier_report_and_no_litter(tmp_path, error):
    out = tmp_path / "r"
    small_report(out, "one")
    with pytest.raises(error), new_folder(out) as made:
        (made / "index.html").write_text("half")
        raise error
    assert (out / "index.html").read_text() == "one"
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


def test_a_swap_that_was_cut_in_two_is_undone(tmp_path, monkeypatch):
    monkeypatch.setattr("vision_plugin._disk.exchange", lambda one, other: False)  # as on NFS
    out, cut = tmp_path / "r", 0
    for number in range(1, 60):
        small_report(out, "one")

        def work(number=number):
            kill_at_change(number)
            small_report(out, "two")

        if ended(in_child(work)) == 0:
            break
        cut += not out.exists()
        with pytest.raises(RuntimeError), new_folder(out):
            assert (out / "index.html").read_text() in ("one", "two")
            raise RuntimeError
        assert [p.name for p in tmp_path.iterdir()] == ["r"]
    assert cut  # a kill came between the two renames


def test_a_running_build_beside_it_is_not_swept_away(tmp_path):
    out = tmp_path / "r"
    with new_folder(out) as slow:
        (slow / "index.html").write_text("slow")
        write_marker(slow, {})
        small_report(out, "quick")
        assert (slow / "index.html").read_text() == "slow"
    assert (out / "index.html").read_text() == "slow"
    assert [p.name for p in tmp_path.iterdir()] == ["r"]


KILLED = """
    import sys, time
    import torch
    torch.set_num_threads(1)
    import vision_plugin as vp
    from tests.report.conftest import draw_images, topk_sae
    from vision_plugin.report._pages import Pages

    write = Pages.write_features

    def stall(self, pages):
        write(self, pages)
        print("HALFWAY", flush=True)
        time.sleep(600)

    Pages.write_features = stall
    model = vp.load_model(sys.argv[1])
    vp.report(topk_sae(dead=(3, 17)), model, draw_images(12), sys.argv[2])
"""


def images_run(monkeypatch):
    """The number of images of every run of a model from now on."""
    found, run = [], Harvester.__call__

    def note(self, pixels, *args, **kwargs):
        found.append(len(pixels))
        return run(self, pixels, *args, **kwargs)

    monkeypatch.setattr(Harvester, "__call__", note)
    return found


@pytest.mark.slow
def test_a_build_that_was_stopped_goes_on_to_the_same_bytes(tmp_path, model, sae, monkeypatch):
    images, n_saved = draw_images(300), [0]
    vp.report(sae, model, images, tmp_path / "whole", n_image_pages=300)
    monkeypatch.setattr(_resume, "SAVE_EVERY_S", 0.0)
    save, n_run = Checkpoint.save, images_run(monkeypatch)

    def stop_after(self, name, state):
        save(self, name, state)
        n_saved[0] += 1
        if n_saved[0] in (3, 11):
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", stop_after)
    arguments = (sae, model, images, tmp_path / "r")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            vp.report(*arguments, n_image_pages=300)
        assert not (tmp_path / "r").exists()
    vp.report(*arguments, n_image_pages=300)
    assert digest(tmp_path / "r") == digest(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r", "whole"]
    # The model ran once on each image, although the build was stopped in both passes.
    assert sum(n_run) == 300


def test_a_build_killed_outright_goes_on_to_the_same_bytes(tmp_path, model, sae, monkeypatch):
    images = draw_images(300)
    vp.report(sae, model, images, tmp_path / "whole", n_image_pages=300)
    monkeypatch.setattr(_resume, "SAVE_EVERY_S", 0.0)
    save, saved = Checkpoint.save, [0]

    def build(kill_in, kill_at):
        def kill_after(self, name, state):
            save(self, name, state)
            saved[0] += name == kill_in
            if saved[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(Checkpoint, "save", kill_after)
        vp.report(sae, model, images, tmp_path / "r", n_image_pages=300)

    # One kill in the first pass, one in the second, each in a process of its own.
    for name, kill_at in (("counts", 4), ("maps", 1)):
        child = in_child(lambda name=name, kill_at=kill_at: build(name, kill_at))
        assert ended(child) == -signal.SIGKILL
        assert (tmp_path / ".r.going-on" / f"{name}.safetensors").is_file()
        assert not (tmp_path / "r").exists()
    n_run = images_run(monkeypatch)
    build("", -1)
    assert digest(tmp_path / "r") == digest(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r", "whole"]
    assert sum(n_run) == 0  # all maps were kept before the last kill


@pytest.mark.slow
def test_a_report_is_the_same_with_room_for_few_images(tmp_path, model, sae, monkeypatch):
    images, n_run = draw_images(120), images_run(monkeypatch)
    vp.report(sae, model, images, tmp_path / "all")
    monkeypatch.setattr(_views, "_MOST_BYTES", 20 * 32 * 32 * 3)
    vp.report(sae, model, images, tmp_path / "few")
    assert digest(tmp_path / "few") == digest(tmp_path / "all")
    assert sum(n_run) == 240  # once on each image, in either build


def test_what_a_build_of_another_report_left_is_not_gone_on_from(tmp_path, model, sae, monkeypatch):
    monkeypatch.setattr(_resume, "SAVE_EVERY_S", 0.0)
    save = Checkpoint.save

    def stop(self, name, state):
        save(self, name, state)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            vp.report(topk_sae(seed=5), model, draw_images(40), tmp_path / "r")
    assert (tmp_path / ".r.going-on").is_dir()
    vp.report(sae, model, draw_images(40), tmp_path / "r")
    vp.report(sae, model, draw_images(40), tmp_path / "clean")
    assert digest(tmp_path / "r") == digest(tmp_path / "clean")
    assert not (tmp_path / ".r.going-on").exists()


@pytest.mark.slow
def test_a_killed_build_leaves_the_earlier_report(tmp_path, tiny_clip, model, sae):
    out = tmp_path / "r"
    vp.report(sae, model, draw_images(12), out, features=[1, 2])
    before = digest(out)
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED), tiny_clip, str(out)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=os.fspath(vp.__path__[0] + "/.."),
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "HALFWAY"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert digest(out) == before
    left = [p.name for p in tmp_path.iterdir()]
    assert {name.partition("-")[0] for name in left} == {"r", ".r.part", ".r.going"}
    vp.report(sae, model, draw_images(12), out, features=[4])
    assert [p.name for p in tmp_path.iterdir()] == ["r"]
    assert [p.name for p in (out / "features").iterdir()] == ["4.html"]


def test_a_hundred_features_are_quick_and_small(tmp_path, model, images):
    start = time.perf_counter()
    vp.report(topk_sae(d_sae=100), model, images, tmp_path / "r")
    assert time.perf_counter() - start < 20
    sizes = {
        str(p.relative_to(tmp_path / "r")): p.stat().st_size for p in (tmp_path / "r").rglob("*")
    }
    assert len(list((tmp_path / "r/images").iterdir())) <= len(images)
    assert len(list((tmp_path / "r/thumbs").iterdir())) == 1
    assert max(s for n, s in sizes.items() if n.startswith("features/")) < 60_000
    assert sizes["data.js"] < 20_000
    assert sizes["index.html"] < 40_000
