"""What is stored is what the bridge computes, whichever way the work was done."""

from __future__ import annotations

import fcntl
import io
import json
import logging
import os
import random
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from tests._processes import ended, in_child, kill_at_change
from tests.activations._stores import (
    D_MLP,
    D_MODEL,
    MLP,
    N_TOKENS,
    RESID,
    Z,
    config,
    content,
    images,
    make_store,
    tiny_model,
)
from vision_plugin.activations import (
    ActivationStore,
    ExtractionConfig,
    StoreError,
    StoreLockedError,
    StoreMismatchError,
    TooManyBadImagesError,
    extract,
    verify,
)
from vision_plugin.activations._decoding import batch_tasks, decode
from vision_plugin.activations._extract import settle_plan, write_manifest
from vision_plugin.activations._making import _images_per_shard, make_plan
from vision_plugin.activations._plan import ShardTask
from vision_plugin.activations._running import ShardRunner
from vision_plugin.images import open_images
from vision_plugin.models import TokenLayout, UnknownHookError

IMAGE = datasets.Features(image=datasets.Image())

pytestmark = pytest.mark.usefixtures("one_thread")


def cached(hook_name: str, n: int) -> torch.Tensor:
    """The bridge's own activations, [n, rows, d_in]."""
    model = tiny_model()
    with torch.no_grad():
        _, cache = model.run_with_cache(model.preprocess(list(images(n))))
    activation: torch.Tensor = cache[hook_name]
    return activation.flatten(2)


class TestValues:
    @pytest.mark.parametrize(("hook_name", "d_in"), [(RESID, D_MODEL), (MLP, D_MLP), (Z, D_MODEL)])
    def test_they_are_the_bridges(self, tmp_path: Path, hook_name: str, d_in: int) -> None:
        store = make_store(tmp_path / "s", 21, hook_names=[hook_name])
        assert store.d_in(hook_name) == d_in
        found = store.activations(hook_name)
        assert found.shape == (21, N_TOKENS, d_in)
        torch.testing.assert_close(found, cached(hook_name, 21), rtol=1e-5, atol=1e-5)

    def test_several_hooks_come_from_one_forward(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, passes = tiny_model(), []
        embed = model.native.vision_model.embeddings
        handle = embed.register_forward_hook(lambda *_: passes.append(1))
        try:
            store = make_store(tmp_path / "s", 8, hook_names=[RESID, MLP, Z])
        finally:
            handle.remove()
        assert len(passes) == 1 + 2  # the probe, and two batches of four
        for name in (RESID, MLP, Z):
            torch.testing.assert_close(
                store.activations(name), cached(name, 8), rtol=1e-5, atol=1e-5
            )

    @pytest.mark.parametrize(("tokens", "rows"), [("cls", [0]), ("patch", list(range(1, 17)))])
    def test_a_kind_of_token(self, tmp_path: Path, tokens: str, rows: list[int]) -> None:
        store = make_store(tmp_path / "s", 9, tokens=tokens)
        torch.testing.assert_close(
            store.activations(RESID), cached(RESID, 9)[:, rows], rtol=1e-5, atol=1e-5
        )
        assert store.token_rows([0, 8]).tolist() == [rows, rows]

    def test_random_tokens_are_recorded_and_follow_from_the_image(self, tmp_path: Path) -> None:
        store = make_store(tmp_path / "a", 20, tokens="random:5", seed=3)
        rows = store.token_rows()
        assert rows.shape == (20, 5)
        assert len({tuple(r) for r in rows.tolist()}) > 10
        picked = cached(RESID, 20)[torch.arange(20)[:, None], rows]
        torch.testing.assert_close(store.activations(RESID), picked, rtol=1e-5, atol=1e-5)
        other = make_store(tmp_path / "b", 20, tokens="random:5", seed=3, images_per_shard=5)
        assert torch.equal(other.token_rows(), rows)
        again = make_store(tmp_path / "c", 20, tokens="random:5", seed=4)
        assert not torch.equal(again.token_rows(), rows)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_narrow_types_are_rounded_once(self, tmp_path: Path, dtype: str) -> None:
        wide = make_store(tmp_path / "w", 8).activations(RESID)
        narrow = make_store(tmp_path / "n", 8, dtype=dtype).activations(RESID)
        assert narrow.dtype == getattr(torch, dtype)
        assert torch.equal(narrow, wide.to(narrow.dtype))

    def test_what_a_type_cannot_hold_is_an_error(self, tmp_path: Path) -> None:
        model = tiny_model(seed=1)
        bias = model.native.vision_model.encoder.layers[1].mlp.fc2.bias
        with torch.no_grad():
            bias.fill_(1e6)
        try:
            with pytest.raises(ValueError, match="float16 cannot hold them: use bfloat16"):
                extract(
                    config(tmp_path / "s", dtype="float16"),
                    model=model,
                    images=list(images(4)),
                )
        finally:
            with torch.no_grad():
                bias.zero_()

    def test_weights_that_are_broken_are_an_error(self, tmp_path: Path) -> None:
        model = tiny_model(seed=1)
        bias = model.native.vision_model.encoder.layers[0].mlp.fc2.bias
        with torch.no_grad():
            bias[0] = float("nan")
        try:
            with pytest.raises(ValueError, match=r"not finite\. Check the model's weights"):
                extract(config(tmp_path / "s"), model=model, images=list(images(4)))
        finally:
            with torch.no_grad():
                bias.zero_()


class TestSameBytes:
    def test_with_any_number_of_workers(self, tmp_path: Path) -> None:
        for n_workers in (0, 1, 2):
            make_store(tmp_path / str(n_workers), 20, n_workers=n_workers)
        assert content(tmp_path / "0") == content(tmp_path / "1") == content(tmp_path / "2")

    @pytest.mark.parametrize("yielding", [False, True])
    def test_workers_beside_a_model_on_the_same_cores_give_way_to_it(self, yielding: bool) -> None:
        source, tasks = open_images(list(images(4))), batch_tasks([ShardTask(0, 0, 4)], 2)
        batches = decode(
            source,
            lambda _: torch.full((2, 3, 1, 1), 1.0 * os.nice(0)),
            tasks,
            n_workers=1,
            yielding=yielding,
        )
        mine = os.nice(0)
        assert [int(batch.pixels.mean()) for batch in batches] == [
            min(19, mine + 19 * yielding)
        ] * 2
        assert os.nice(0) == mine

    def test_with_the_tasks_in_any_order_and_some_of_them_twice(self, tmp_path: Path) -> None:
        make_store(tmp_path / "plain", 20)
        folder = tmp_path / "mixed"
        folder.mkdir()
        source = open_images(list(images(20)))
        plan = settle_plan(folder, make_plan(config(folder), tiny_model(), source))
        tasks = list(plan.tasks())
        runners = [ShardRunner(plan, tiny_model(), source) for _ in range(2)]  # two processes
        for number, task in enumerate((tasks[2], tasks[0], tasks[2], tasks[1], tasks[0])):
            list(runners[number % 2].run([task], folder))
        write_manifest(folder, plan)
        (folder / ".lock").touch()
        assert content(folder) == content(tmp_path / "plain")

    def test_a_stream_gives_the_activations_of_its_dataset(self, tmp_path: Path) -> None:
        def png(i: int) -> dict[str, Any]:
            stream = io.BytesIO()
            images(10)[i].save(stream, "PNG")
            return {"bytes": stream.getvalue(), "path": None}

        rows = {"image": [png(i) for i in range(10)], "label": [i % 3 for i in range(10)]}
        features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
        whole = datasets.Dataset.from_dict(rows, features=features)
        streamed = extract(
            config(tmp_path / "a", n_images=9, n_workers=2),
            model=tiny_model(),
            images=whole.to_iterable_dataset(),
        )
        plain = extract(config(tmp_path / "b", n_images=9), model=tiny_model(), images=whole)
        assert torch.equal(streamed.activations(RESID), plain.activations(RESID))
        assert streamed.ids == plain.ids
        assert streamed.labels == plain.labels == ["0", "1", "2"] * 3

    def test_a_stream_that_ends_early_keeps_its_shards(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Run again with the number that the error gives, it makes a straight run's bytes."""

        def rows() -> Iterator[dict[str, Any]]:
            for i in range(20):
                stream = io.BytesIO()
                images(20)[i].save(stream, "PNG")
                yield {"image": {"bytes": stream.getvalue(), "path": None}, "label": i % 3}

        features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))

        def made(folder: str, n_images: int) -> None:
            stream = datasets.IterableDataset.from_generator(rows, features=features)
            extract(config(tmp_path / folder, n_images=n_images), model=tiny_model(), images=stream)

        made("plain", 20)
        with pytest.raises(ValueError, match=r"ends after 20 of the 50 .* use n_images=20, which"):
            made("a", 50)
        assert {"shard-00000.json", "shard-00001.json"} <= content(tmp_path / "a").keys()
        damaged = tmp_path / "a" / "shard-00001.safetensors"
        damaged.write_bytes(damaged.read_bytes()[:-1])
        with pytest.raises(StoreMismatchError, match=r"another extraction"):
            made("a", 60)
        caplog.set_level(logging.INFO)
        made("a", 20)
        assert "was planned for 50 images and has 20 now: 1 shards are kept" in caplog.text
        assert "shard-00001.safetensors will be made again" in caplog.text
        assert content(tmp_path / "a") == content(tmp_path / "plain")
        with pytest.raises(StoreMismatchError, match=r"another extraction"):
            made("a", 8)  # a complete store is not shortened

    def test_so_it_does_where_nobody_says_how_large_a_shard_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The size follows the number of images then; an overwriting run keeps shards as well."""
        monkeypatch.setattr("vision_plugin.activations._making.MIN_SHARD_BYTES", 1)
        whole = datasets.Dataset.from_dict({"image": images(200)}, features=IMAGE)
        caplog.set_level(logging.INFO)

        def made(n_images: int, **changes: Any) -> None:
            cfg = config(tmp_path, n_images=n_images, images_per_shard=None, **changes)
            extract(cfg, model=tiny_model(), images=whole.to_iterable_dataset())

        with pytest.raises(ValueError, match="ends after 200 of the 800"):
            made(800)
        made(200, overwrite=True)
        assert "shards are kept" in caplog.text
        assert ActivationStore(tmp_path).ids == [str(i) for i in range(200)]
        assert verify(tmp_path).ok

    def test_shards_are_kept_whenever_the_shortening_is_killed(self, tmp_path: Path) -> None:
        def stream() -> Any:
            whole = datasets.Dataset.from_dict({"image": images(20)}, features=IMAGE)
            return whole.to_iterable_dataset()

        def made(folder: Path, n_images: int) -> None:
            extract(config(folder, n_images=n_images), model=tiny_model(), images=stream())

        made(tmp_path / "plain", 20)
        for change in range(2, 200, 5):
            folder = tmp_path / str(change)
            with pytest.raises(ValueError, match="ends after 20"):
                made(folder, 50)

            def killed(folder: Path = folder, change: int = change) -> None:
                kill_at_change(change)
                made(folder, 20)

            done = ended(in_child(killed)) == 0
            made(folder, 20)
            assert content(folder) == content(tmp_path / "plain")
            if done:
                break
        assert done
        assert change > 20

    @pytest.mark.parametrize("kind", ["folder", "parquet", "tars"])
    def test_from_whatever_holds_the_images(self, tmp_path: Path, kind: str) -> None:
        """The shards of a list of images, with the collection's own ids and labels."""
        held = [image.convert("RGB") for image in images(6)]
        files = []
        for image in held:
            stream = io.BytesIO()
            image.save(stream, "PNG")
            files.append(stream.getvalue())
        if kind == "folder":
            (tmp_path / "photos").mkdir()
            for i, content_of in enumerate(files):
                (tmp_path / "photos" / f"{i}.png").write_bytes(content_of)
            source, ids = "photos", [f"{i}.png" for i in range(6)]
        elif kind == "parquet":
            rows = {"image": [{"bytes": file, "path": None} for file in files]}
            features = datasets.Features(image=datasets.Image())
            datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "t.parquet")
            source, ids = "t.parquet", [str(i) for i in range(6)]
        else:
            with tarfile.open(tmp_path / "t-000.tar", "w") as tar:
                for i, file in enumerate(files):
                    for name, data in ((f"{i}.png", file), (f"{i}.cls", b"%d" % (i % 2))):
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
            source, ids = "t-{000..000}.tar", [f"t-000.tar/{i}" for i in range(6)]
        settings = config(tmp_path / "s", images=str(tmp_path / source), n_workers=1)
        store = extract(settings, model=tiny_model())
        expected = extract(config(tmp_path / "list"), model=tiny_model(), images=held)
        assert torch.equal(store.activations(RESID), expected.activations(RESID))
        assert store.ids == ids
        assert store.labels == (["0", "1"] * 3 if kind == "tars" else None)

    def test_a_finished_store_is_left_alone(self, tmp_path: Path) -> None:
        def times() -> dict[str, int]:
            return {p.name: p.stat().st_mtime_ns for p in (tmp_path / "s").glob("[!.]*")}

        make_store(tmp_path / "s", 20)
        before = times()
        for n_workers in (0, 1):
            make_store(tmp_path / "s", 20, n_workers=n_workers)
        assert times() == before


class TestBadImages:
    @pytest.fixture
    def spoiled(self, folder: Path) -> Path:
        """Six images, of which the second is cut short and the fifth is no image."""
        cut = folder / "cat" / "1.png"
        cut.write_bytes(cut.read_bytes()[:100])
        (folder / "dog" / "1.png").write_text("hello")
        return folder

    def test_they_are_counted_listed_and_left_out(
        self, tmp_path: Path, spoiled: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING):
            store = extract(config(tmp_path / "s"), model=tiny_model(), images=spoiled)
        assert "2 of 6 images could not be read" in caplog.text
        assert store.ids == ["cat/0.png", "cat/2.png", "dog/0.png", "dog/2.png"]
        assert store.labels == ["cat", "cat", "dog", "dog"]
        assert store.image_indices.tolist() == [0, 2, 3, 5]
        manifest = json.loads((tmp_path / "s" / "manifest.json").read_text())
        assert [bad["id"] for bad in manifest["bad_images"]] == ["cat/1.png", "dog/1.png"]
        assert "not an image in a known format" in manifest["bad_images"][1]["reason"]
        assert manifest["n_images"] == 4
        good = open_images(spoiled)
        model = tiny_model()
        with torch.no_grad():
            _, cache = model.run_with_cache(model.preprocess([good[i] for i in (0, 2, 3, 5)]))
        torch.testing.assert_close(store.activations(RESID), cache[RESID], rtol=1e-5, atol=1e-5)

    def test_above_the_cap_the_run_stops_and_can_go_on(self, tmp_path: Path, spoiled: Path) -> None:
        tight = config(tmp_path / "s", max_bad_images=1, images_per_shard=3)
        with pytest.raises(TooManyBadImagesError, match=r"max_bad_images=1.*cat/1\.png"):
            extract(tight, model=tiny_model(), images=spoiled)
        assert not ActivationStore(tmp_path / "s").complete
        extract(
            config(tmp_path / "s", max_bad_images=2, images_per_shard=3),
            model=tiny_model(),
            images=spoiled,
        )
        straight = config(tmp_path / "t", images_per_shard=3)
        extract(straight, model=tiny_model(), images=spoiled)
        assert content(tmp_path / "s") == content(tmp_path / "t")

    def test_finished_shards_count_towards_the_cap(self, tmp_path: Path, spoiled: Path) -> None:
        loose = config(tmp_path / "s", images_per_shard=3)
        extract(loose, model=tiny_model(), images=spoiled)
        with pytest.raises(TooManyBadImagesError):
            extract(
                config(tmp_path / "s", max_bad_images=0, images_per_shard=3),
                model=tiny_model(),
                images=spoiled,
            )

    def test_a_shard_of_nothing_but_bad_images(self, tmp_path: Path, folder: Path) -> None:
        for path in (folder / "cat").iterdir():
            path.write_bytes(b"")
        store = extract(
            config(tmp_path / "s", images_per_shard=3), model=tiny_model(), images=folder
        )
        assert len(store) == 3
        assert verify(tmp_path / "s").ok
        assert next(store.batches(RESID, 10)).shape == (10, D_MODEL)
        assert store.labels == ["dog"] * 3


class TestRefusals:
    def test_other_settings_in_the_same_folder(self, tmp_path: Path) -> None:
        make_store(tmp_path / "s", 20)
        before = content(tmp_path / "s")
        for changes, named in (
            ({"dtype": "float16"}, "dtype: 'float32' there, 'float16' here"),
            ({"hook_names": [MLP]}, "hooks"),
            ({"tokens": "cls"}, "tokens.selection: 'all' there, 'cls' here"),
            ({"n": 19}, "images.n_images: 20 there, 19 here"),
            ({"batch_size": 5}, "batch_size: 4 there, 5 here"),
        ):
            with pytest.raises(StoreMismatchError, match=named):
                make_store(tmp_path / "s", **{"n": 20, **changes})
        assert content(tmp_path / "s") == before

    def test_another_model_in_the_same_folder(self, tmp_path: Path) -> None:
        make_store(tmp_path / "s", 8)
        with pytest.raises(StoreMismatchError, match=r"model\.weights"):
            extract(config(tmp_path / "s"), model=tiny_model(seed=1), images=list(images(8)))

    def test_a_folder_with_other_things(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.tex").write_text("...")
        with pytest.raises(StoreError, match=r"holds other things \(thesis\.tex\)"):
            make_store(tmp_path)
        with pytest.raises(StoreError, match="is a file"):
            make_store(tmp_path / "thesis.tex")

    def test_a_second_extraction_into_the_same_folder(self, tmp_path: Path) -> None:
        folder = tmp_path / "s"
        folder.mkdir()
        with (folder / ".lock").open("w") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            with pytest.raises(StoreLockedError, match="another extraction is writing into"):
                make_store(folder)
        assert make_store(folder).complete

    def test_an_unknown_hook_lists_near_ones(self, tmp_path: Path) -> None:
        with pytest.raises(UnknownHookError, match="hook_resid_post"):
            make_store(tmp_path / "s", hook_names=["blocks.1.hook_resid_pots"])
        assert not (tmp_path / "s").exists()

    def test_a_hook_that_no_forward_forms(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="cannot be harvested"):
            make_store(tmp_path / "s", hook_names=["blocks.1.attn.hook_pattern"])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"hook_names": []}, "hook_names is empty"),
            ({"hook_names": [RESID, RESID]}, "names a hook twice"),
            ({"dtype": "int8"}, "use 'float32'"),
            ({"batch_size": 0}, "batch_size=0"),
            ({"max_bad_images": -1}, "max_bad_images=-1"),
            ({"n_workers": -1}, "n_workers=-1"),
        ],
    )
    def test_a_configuration_that_makes_no_sense(
        self, changes: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            config(Path("s"), **changes)

    def test_one_hook_name_may_stand_alone(self) -> None:
        assert ExtractionConfig("m", "i", RESID, "o").hook_names == (RESID,)


def test_a_store_knows_what_fits_it(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", 8, tokens="cls")
    metadata = store.metadata(RESID)
    store.check_fits(metadata)
    store.check_fits({"hook_name": RESID})
    for change in (
        {"d_in": 17},
        {"tokens": "patch"},
        {"preprocessing": "f" * 16},
        {"model_signature": [1.0] * 8},
        {"model_signature": None, "model_name": "another"},
    ):
        with pytest.raises(StoreMismatchError, match="expected"):
            store.check_fits({**metadata, **change})
    with pytest.raises(ValueError, match=r"no activations of 'blocks\.0\.hook_resid_post'"):
        store.check_fits({**metadata, "hook_name": "blocks.0.hook_resid_post"})


def test_the_layout_of_the_tokens_is_recorded(tmp_path: Path) -> None:
    tokens = make_store(tmp_path / "s", 4).plan.tokens
    assert TokenLayout(tokens.n_cls, tokens.n_registers, tokens.grid).n_tokens == N_TOKENS


def test_shuffled_task_lists_are_the_same_plan(tmp_path: Path) -> None:
    plan = make_plan(config(tmp_path), tiny_model(), open_images(list(images(50))))
    tasks = list(plan.tasks())
    assert [t.start for t in tasks] == list(range(0, 50, 8))
    assert tasks[-1].stop == 50
    random.Random(0).shuffle(tasks)
    assert sorted(tasks, key=lambda t: t.index) == list(plan.tasks())


def test_a_temporary_folder_with_a_long_path_makes_nobody_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers pass tensors on over a socket there, whose path holds 104 bytes."""
    make_store(tmp_path / "short", 5, n_workers=1)
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.warns(RuntimeWarning, match="TMPDIR to a folder with a shorter path"):
        make_store(tmp_path / "long", 5, n_workers=1)
    assert content(tmp_path / "short") == content(tmp_path / "long")


@pytest.mark.parametrize("n_workers", [0, 1])
def test_an_error_in_a_worker_comes_as_it_is(tmp_path: Path, n_workers: int) -> None:
    short = datasets.Dataset.from_dict(
        {"image": [None]}, features=datasets.Features(image=datasets.Image())
    ).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"^the stream IterableDataset ends after 1 of the 3 rows"):
        extract(
            config(tmp_path / "s", n_images=3, n_workers=n_workers),
            model=tiny_model(),
            images=short,
        )


@pytest.mark.parametrize(
    ("n_images", "expected"),
    [(64, 32 * 8), (1906, 32 * 8), (10_000, 32 * 39), (1_000_000, 32 * 128)],
)
def test_shards_are_an_eighth_of_a_small_store_and_128_mib_of_a_large_one(
    n_images: int, expected: int
) -> None:
    assert _images_per_shard(32 * 1024, 32, n_images) == expected


@pytest.mark.parametrize("name", ["batch_size", "images_per_shard"])
def test_more_images_than_a_shard_can_hold_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name}=99999999: use at most 500,000"):
        config(tmp_path / "s", **{name: 99_999_999})
