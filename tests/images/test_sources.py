"""Every kind of collection opens to the same images, or says in one sentence why not."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from tests._images import image
from vision_plugin.images import BadImageError, ImageSource, open_images

NOTO = Path(__file__).parents[3] / "shared" / "data" / "noto.parquet"


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.mode == b.mode == "RGB" and a.size == b.size and a.tobytes() == b.tobytes()


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def dataset(n: int = 7) -> datasets.Dataset:
    features = datasets.Features(
        image=datasets.Image(),
        label=datasets.ClassLabel(names=["even", "odd"]),
        n=datasets.Value("int64"),
    )
    rows = {
        "image": [{"bytes": png(image(i)), "path": None} for i in range(n)],
        "label": [i % 2 for i in range(n)],
        "n": list(range(n)),
    }
    return datasets.Dataset.from_dict(rows, features=features)


def write_tar(path: Path, samples: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in samples:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def tars(tmp_path: Path) -> str:
    for shard in range(2):
        samples = []
        for i in range(3):
            key = f"{3 * shard + i:04d}"
            samples += [
                (f"{key}.cls", str(i).encode()),
                (f"{key}.png", png(image(3 * shard + i))),
                (f"{key}.json", json.dumps({"n": 3 * shard + i}).encode()),
            ]
        write_tar(tmp_path / f"shard-{shard:03d}.tar", samples)
    return str(tmp_path / "shard-{000..001}.tar")


class TestFolders:
    def test_images_are_sorted_by_path_and_labelled_by_sub_folder(self, folder: Path) -> None:
        source = open_images(folder)
        assert source.ids == [f"{label}/{i}.png" for label in ("cat", "dog") for i in range(3)]
        assert source.labels == ["cat"] * 3 + ["dog"] * 3
        assert same(source[0], image(10))
        assert same(source[-1], image(2))

    def test_the_prefix_opens_the_same(self, folder: Path) -> None:
        assert open_images(f"imagefolder:{folder}/").ids == open_images(folder).ids

    def test_the_prefix_insists_on_labels(self, folder: Path) -> None:
        image().save(folder / "loose.png")
        assert open_images(folder).labels is None
        with pytest.raises(ValueError, match=r"loose\.png lies outside any label"):
            open_images(f"imagefolder:{folder}")

    def test_other_files_and_hidden_ones_are_left_out(self, folder: Path) -> None:
        (folder / "notes.txt").write_text("hello")
        (folder / "cat" / "._0.png").write_bytes(b"resource fork")
        (folder / ".thumbs").mkdir()
        image().save(folder / ".thumbs" / "t.png")
        assert len(open_images(folder)) == 6

    def test_a_metadata_file_gives_columns(self, folder: Path) -> None:
        lines = [{"file_name": "dog/1.png", "mood": "glad", "label": "x"}]
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        source = open_images(folder)
        assert source.column("mood") == [None, None, None, None, "glad", None]
        assert source.labels == ["", "", "", "", "x", ""]
        assert open_images(folder, label_column="folder").labels == ["cat"] * 3 + ["dog"] * 3

    def test_a_split_is_a_sub_folder(self, folder: Path) -> None:
        assert open_images(folder, split="dog").ids == ["0.png", "1.png", "2.png"]


class TestTables:
    def test_parquet_in_any_row_groups_gives_its_rows(self, tmp_path: Path) -> None:
        path = tmp_path / "table.parquet"
        dataset().to_parquet(path, batch_size=3)
        source = open_images(str(path))
        assert source.ids == [str(i) for i in range(7)]
        assert source.labels == ["even", "odd", "even", "odd", "even", "odd", "even"]
        assert source.column("n") == list(range(7))
        assert all(same(source[i], image(i)) for i in (6, 0, 3, 2))

    def test_one_pass_over_parquet_keeps_one_row_group_and_shuffled_reading_more(
        self, tmp_path: Path
    ) -> None:
        dataset().to_parquet(tmp_path / "table.parquet", batch_size=1)
        source = open_images(tmp_path / "table.parquet")
        for _ in source:
            assert len(source._images._cache) == 1
        for index in reversed(range(len(source))):
            source[index]
        assert len(source._images._cache) == len(source)

    def test_several_parquet_files_count_on(self, tmp_path: Path) -> None:
        for i in range(2):
            dataset(3 + i).to_parquet(tmp_path / f"train-{i}.parquet")
        dataset(1).to_parquet(tmp_path / "test-0.parquet")
        source = open_images(tmp_path, split="train")
        assert len(source) == 7
        assert same(source[3], image(0))
        assert source.column("n") == [0, 1, 2, 0, 1, 2, 3]

    def test_a_dataset_in_memory_saved_or_in_a_dict(self, tmp_path: Path) -> None:
        dataset().save_to_disk(tmp_path / "saved")
        wrapped = datasets.DatasetDict(test=dataset())
        for given in (dataset(), tmp_path / "saved", wrapped):
            source = open_images(given)
            assert source.labels is not None
            assert source.labels[1] == "odd"
            assert same(source[4], image(4))
        with pytest.raises(ValueError, match="has the splits test"):
            open_images(wrapped, split="train")

    def test_a_stream_is_read_in_order_and_can_start_over(self) -> None:
        source = open_images(dataset().to_iterable_dataset(), n_images=5)
        assert source.sequential
        assert len(source) == 5
        assert same(source[2], image(2))
        assert source.label(2) == "even"
        assert same(source[1], image(1))
        assert source.labels == ["even", "odd", "even", "odd", "even"]

    def test_a_stream_that_map_left_without_features(self) -> None:
        stream = dataset().to_iterable_dataset().map(lambda row: {"twice": 2 * row["n"]})
        assert stream.features is None
        source = open_images(stream, n_images=5)
        assert same(source[3], image(3))
        assert source.column("twice") == [0, 2, 4, 6, 8]
        resized = stream.map(lambda row: {"small": row["image"].resize((4, 4))})
        with pytest.raises(ValueError, match=r"several columns with images, image, small"):
            open_images(resized, n_images=5)
        assert open_images(resized, n_images=5, column="small")[4].size == (4, 4)

    def test_encoded_bytes_are_images_in_every_kind_of_data_set(self) -> None:
        encoded = dataset().map(lambda row: {"raw": png(image(row["n"]))}, remove_columns=["image"])
        for given in (encoded, encoded.to_iterable_dataset(), encoded.to_iterable_dataset().map()):
            source = open_images(given, n_images=3)
            assert all(same(source[i], image(i)) for i in range(3))

    def test_an_announced_length_is_not_believed_without_end(self) -> None:
        stream = dataset().to_iterable_dataset()
        stream.info.splits = datasets.SplitDict()
        stream.info.splits.add(datasets.SplitInfo("train", num_examples=10**12))
        with pytest.raises(ValueError, match=r"1,000,000,000,000 rows, above the limit"):
            open_images(datasets.IterableDatasetDict(train=stream))
        assert len(open_images(datasets.IterableDatasetDict(train=stream), n_images=7)) == 7

    def test_a_stream_of_unknown_length_asks_for_a_number(self) -> None:
        with pytest.raises(ValueError, match="give n_images"):
            open_images(dataset().to_iterable_dataset())

    def test_a_stream_that_ends_early_is_an_error(self) -> None:
        source = open_images(dataset(3).to_iterable_dataset(), n_images=5)
        with pytest.raises(ValueError, match=r"ends after 3 of the 5 rows .* use n_images=3"):
            source[4]

    def test_several_image_columns_have_to_be_told_apart(self) -> None:
        two = dataset().add_column("other", dataset()["n"]).cast_column("image", datasets.Image())
        two = two.map(lambda row: {"mask": row["image"]})
        with pytest.raises(ValueError, match=r"several columns .* image, mask.*column="):
            open_images(two)
        assert len(open_images(two, column="mask")) == 7

    @pytest.mark.skipif(not NOTO.is_file(), reason="the shared emoji images are not there")
    def test_emoji_come_on_white_with_their_names(self) -> None:
        source = open_images(NOTO, label_column="group", n_images=300)
        assert source[0].getpixel((0, 0)) == (255, 255, 255)
        assert source.column("name")[0] == "keycap: #"
        assert source.labels is not None
        assert set(source.labels) >= {"Symbols", "Flags"} or len(set(source.labels)) > 1


class TestTars:
    def test_samples_in_order_with_labels_and_fields(self, tars: str) -> None:
        source = open_images(tars)
        assert source.ids[:2] == ["shard-000.tar/0000", "shard-000.tar/0001"]
        assert source.labels == ["0", "1", "2"] * 2
        assert source.column("n") == list(range(6))
        assert same(source[4], image(4))

    def test_a_glob_and_a_folder_find_the_same(self, tars: str, tmp_path: Path) -> None:
        assert open_images(str(tmp_path / "shard-*.tar")).ids == open_images(tars).ids
        assert open_images(tmp_path).ids == open_images(tars).ids

    def test_a_truncated_tar_is_named(self, tars: str, tmp_path: Path) -> None:
        path = tmp_path / "shard-001.tar"
        path.write_bytes(path.read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"shard-001\.tar cannot be read as a tar"):
            open_images(tars)

    def test_a_compressed_tar_is_refused_with_advice(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "a.tar", "w:gz"):
            pass
        with pytest.raises(ValueError, match="unpack a compressed one"):
            open_images(tmp_path / "a.tar")

    def test_links_and_climbing_names_are_never_followed(self, tmp_path: Path) -> None:
        (tmp_path / "secret.png").write_bytes(png(image()))
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            link = tarfile.TarInfo("link.png")
            link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.png")
            tar.addfile(link)
        with pytest.raises(ValueError, match="holds no images"):
            open_images(tmp_path / "a.tar")


class TestOthers:
    def test_a_list_of_images(self) -> None:
        source = open_images([image(0), image(1).convert("L")])
        assert source.ids == ["0", "1"]
        assert source[1].mode == "RGB"

    def test_a_source_is_handed_back(self, folder: Path) -> None:
        source = open_images(folder)
        assert open_images(source) is source

    @pytest.mark.parametrize("kind", ["folder", "parquet", "dataset", "tar", "list"])
    def test_it_travels_to_other_processes(
        self, kind: str, folder: Path, tars: str, tmp_path: Path
    ) -> None:
        dataset().to_parquet(tmp_path / "t.parquet")
        given = {
            "folder": folder,
            "parquet": tmp_path / "t.parquet",
            "dataset": dataset(),
            "tar": tars,
            "list": [image(i) for i in range(4)],
        }[kind]
        source = open_images(given)
        source[1]
        other: ImageSource = pickle.loads(pickle.dumps(source))  # noqa: S301
        assert other.ids == source.ids
        assert same(other[3], source[3])

    def test_only_the_first_so_many(self, folder: Path) -> None:
        source = open_images(folder, n_images=4)
        assert len(source) == len(source.ids) == len(list(source)) == 4
        assert source.labels == ["cat"] * 3 + ["dog"]
        with pytest.raises(IndexError):
            source[4]

    def test_the_description_tells_collections_apart(self, folder: Path) -> None:
        whole, part = open_images(folder).description, open_images(folder, n_images=5).description
        assert whole["kind"] == "folder"
        assert whole["n_images"] == 6
        assert whole["ids_sha256"] != part["ids_sha256"]
        json.dumps(whole)


class TestErrors:
    @pytest.mark.parametrize(
        ("given", "error", "message"),
        [
            ("/no/such/place", FileNotFoundError, "/no/such/place does not exist"),
            ("./nowhere", FileNotFoundError, "nowhere does not exist"),
            ("nowhere/*.tar", FileNotFoundError, "no file matches"),
            ("nowhere-{0..2}.tar", FileNotFoundError, "nowhere-0.tar"),
            ("shard-{0..99999999}.tar", ValueError, "stands for more than"),
            ("imagefolder:nowhere", FileNotFoundError, "nowhere is not a folder"),
            ("demo:many", ValueError, "write 'demo:N'"),
            ("demo:0", ValueError, "write 'demo:N'"),
            ([], ValueError, "empty"),
            (7, ValueError, "from a int"),
        ],
    )
    def test_what_cannot_be_opened_is_one_clear_sentence(
        self, given: object, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message.replace("*", r"\*")):
            open_images(given)

    def test_a_name_unknown_to_the_hub(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        with pytest.raises(FileNotFoundError, match="neither a file or folder here nor a dataset"):
            open_images("no-such-user/no-such-set")

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="holds no images"):
            open_images(tmp_path)

    def test_a_table_without_images(self, tmp_path: Path) -> None:
        datasets.Dataset.from_dict({"a": [1]}).to_parquet(tmp_path / "a.parquet")
        with pytest.raises(ValueError, match="no column with images among a"):
            open_images(tmp_path / "a.parquet")

    def test_a_broken_parquet_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing more")
        with pytest.raises(ValueError, match=r"a\.parquet cannot be read as Parquet"):
            open_images(tmp_path / "a.parquet")

    def test_an_unknown_column_lists_those_there_are(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="no column 'breed': it has folder"):
            open_images(folder, label_column="breed")

    def test_an_empty_cell_is_a_bad_image(self) -> None:
        features = datasets.Features(image=datasets.Image())
        source = open_images(datasets.Dataset.from_dict({"image": [None]}, features=features))
        with pytest.raises(BadImageError, match="the cell holds NoneType"):
            source[0]

    def test_one_image_is_not_a_collection(self, folder: Path) -> None:
        with pytest.raises(ValueError, match="give the folder"):
            open_images(folder / "cat" / "0.png")

    def test_a_broken_metadata_file(self, folder: Path) -> None:
        (folder / "metadata.jsonl").write_text("{")
        with pytest.raises(ValueError, match="metadata file"):
            open_images(folder).labels  # noqa: B018


def test_grey_levels_survive_whatever_holds_them() -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    source = open_images([Image.fromarray(ramp)])
    assert np.array_equal(np.asarray(source[0])[..., 0], ramp)


def test_the_demo_world_comes_with_its_factors() -> None:
    source = open_images("demo:20@3")
    assert len(source) == 20
    assert source.labels == source.column("shape")
    assert {"caption", "colour", "word"} <= set(source.column_names)
    assert same(source[4], open_images("demo:9@3")[4])
    assert not same(source[4], open_images("demo:20")[4])
