"""A split is found where names say it, and refused, with those there are, where they do not."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from tests._images import image, photo_folder
from tests.images.test_sources import dataset, png, same, write_tar
from vision_plugin.images import open_images
from vision_plugin.images._splits import splits_of_files


def write(path: Path, n: int) -> None:
    """Write a Parquet file or a tar with ``n`` images."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        dataset(n).to_parquet(path)
    else:
        write_tar(path, [(f"{path.stem}{i}.png", png(image(i))) for i in range(n)])


@pytest.fixture(params=[".parquet", ".tar"])
def kind(request: pytest.FixtureRequest) -> str:
    suffix: str = request.param
    return suffix


class TestFiles:
    def test_a_split_takes_its_own_files_alone(self, kind: str, tmp_path: Path) -> None:
        for name, n in (("train-0", 3), ("train-1", 4), ("train_hard-0", 5), ("test-0", 1)):
            write(tmp_path / f"{name}{kind}", n)
        sizes = {s: len(open_images(tmp_path, split=s)) for s in ("train", "train_hard", "test")}
        assert sizes == {"train": 7, "train_hard": 5, "test": 1}

    def test_several_splits_have_to_be_told_apart(self, kind: str, tmp_path: Path) -> None:
        for name in ("train-00000-of-00001", "validation-00000-of-00001"):
            write(tmp_path / "data" / f"{name}{kind}", 1)
        every = str(tmp_path / "data" / f"*{kind}")
        for given in (tmp_path, every):
            with pytest.raises(ValueError, match=r"the splits train, validation: name one with sp"):
                open_images(given)
            with pytest.raises(ValueError, match=r"the splits train, validation: name one with sp"):
                open_images(given, split="test")
            assert len(open_images(given, split="validation")) == 1

    def test_one_split_needs_no_name_and_takes_no_other(self, kind: str, tmp_path: Path) -> None:
        write(tmp_path / f"train-0{kind}", 2)
        one = tmp_path / f"train-0{kind}"
        for given in (tmp_path, one):
            assert len(open_images(given)) == len(open_images(given, split="train")) == 2
            with pytest.raises(ValueError, match="has the splits train"):
                open_images(given, split="test")

    def test_files_without_splits_are_read_together_and_take_none(
        self, kind: str, tmp_path: Path
    ) -> None:
        for number in range(2):
            write(tmp_path / f"shard-{number:03d}{kind}", 2)
        assert len(open_images(tmp_path)) == 4
        for given in (tmp_path, tmp_path / f"shard-000{kind}"):
            with pytest.raises(ValueError, match=r"has no splits: leave out split="):
                open_images(given, split="train")

    def test_a_folder_may_be_named_for_the_split(self, kind: str, tmp_path: Path) -> None:
        for name, n in (("train", 3), ("test", 2)):
            write(tmp_path / "default" / name / f"0000{kind}", n)
        assert len(open_images(tmp_path, split="test")) == 2
        assert len(open_images(tmp_path / "default" / "train" / f"0000{kind}", split="train")) == 3
        with pytest.raises(ValueError, match="the splits test, train"):
            open_images(tmp_path)

    def test_folders_above_what_is_named_say_nothing(self, kind: str, tmp_path: Path) -> None:
        for name in ("train-0", "test-0"):
            write(tmp_path / "val" / "x" / f"{name}{kind}", 1)
        with pytest.raises(ValueError, match="the splits test, train"):
            open_images(str(tmp_path / "val" / "x" / f"*{kind}"))

    def test_the_description_says_which_split(self, kind: str, tmp_path: Path) -> None:
        write(tmp_path / f"train-0{kind}", 1)
        assert open_images(tmp_path).description["split"] == "train"


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train.parquet", "test.parquet"], ["train", "test"]),
        (["imagenet-train-000.tar", "imagenet-val-000.tar"], ["train", "val"]),
        (["train-0.tar", "hard_train-0.tar"], ["train", "hard_train"]),
        (["data/train-00000-of-00002-0123456789abcdef.parquet"], ["train"]),
        (["train-0.tar", "extra-0.tar"], ["train", "extra"]),
        (["red-00000-of-00001.tar", "blue-00000-of-00001.tar"], ["red", "blue"]),
        (["part-00000-of-00002.tar", "part-00001-of-00002.tar"], [None, None]),
        (["trains-0.tar", "testament-0.tar"], [None, None]),
        (["TRAIN-0.tar"], ["TRAIN"]),
        (["a/train/0.tar", "b/train/0.tar"], ["train", "train"]),
    ],
)
def test_names_of_files_say_their_split(names: list[str], splits: list[str | None]) -> None:
    assert splits_of_files(names) == splits


class TestFolders:
    @pytest.fixture
    def photos(self, tmp_path: Path) -> Path:
        for name in ("train", "test"):
            photo_folder(tmp_path / "photos" / name)
        image(99).save(tmp_path / "photos" / "test" / "cat" / "more.png")
        return tmp_path / "photos"

    def test_split_sub_folders_have_to_be_told_apart(self, photos: Path) -> None:
        for given in (photos, f"imagefolder:{photos}"):
            with pytest.raises(ValueError, match=r"photos has the splits test, train: name one"):
                open_images(given)
            source = open_images(given, split="test")
            assert source.ids[3] == "cat/more.png"
            assert set(source.labels or []) == {"cat", "dog"}
            assert len(source) == 7

    def test_they_are_found_at_any_level(self, tmp_path: Path) -> None:
        for thing in ("bottle", "cable"):
            for name in ("train", "test"):
                photo_folder(tmp_path / thing / name)
        with pytest.raises(ValueError, match="the splits test, train"):
            open_images(tmp_path)
        source = open_images(tmp_path, split="train")
        assert len(source) == 12
        assert all("/train/" in id for id in source.ids)
        assert source.description["split"] == "train"

    def test_a_class_may_have_a_name_that_splits_have(self, tmp_path: Path) -> None:
        for label in ("bus", "test_tube", "train"):
            (tmp_path / label).mkdir()
            image().save(tmp_path / label / "0.png")
        assert open_images(tmp_path).labels == ["bus", "test_tube", "train"]

    def test_a_split_that_is_not_there_lists_the_folders(self, folder: Path) -> None:
        with pytest.raises(ValueError, match=r"no split 'train', but the folders cat, dog"):
            open_images(folder, split="train")
        with pytest.raises(ValueError, match=r"no split '\.\./photos', but the folders cat, dog"):
            open_images(folder, split="../photos")
        with pytest.raises(ValueError, match=r"has no splits: leave out split="):
            open_images(folder / "cat", split="train")

    def test_metadata_above_the_splits_reaches_them(self, photos: Path) -> None:
        lines = ["file_name,mood", "train/cat/0.png,glad", "test/cat/0.png,sad"]
        (photos / "metadata.csv").write_text("\n".join(lines))
        assert open_images(photos, split="test").column("mood") == ["sad", *[None] * 6]


SOURCES = ["folder", "imagefolder", "list", "demo", "source", "dataset"]


@pytest.mark.parametrize("given", SOURCES)
def test_what_has_no_splits_refuses_one(given: str, folder: Path) -> None:
    source = opened(given, folder)
    with pytest.raises(ValueError, match=r"split='?"):
        open_images(source, split="train")


@pytest.mark.parametrize("given", SOURCES[:-1])
def test_what_has_no_columns_refuses_one(given: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no columns with images: leave out column='picture'"):
        open_images(opened(given, folder), column="picture")


def opened(given: str, folder: Path) -> object:
    sources = {
        "folder": lambda: folder,
        "imagefolder": lambda: f"imagefolder:{folder}",
        "list": lambda: [image()],
        "demo": lambda: "demo:3",
        "source": lambda: open_images(folder),
        "dataset": dataset,
    }
    return sources[given]()


def test_a_data_set_in_memory_knows_its_split() -> None:
    features, rows = dataset().features, dataset().to_dict()
    held = datasets.Dataset.from_dict(rows, features=features, split="test")
    assert len(open_images(held, split="test")) == 7
    with pytest.raises(ValueError, match="has the splits test"):
        open_images(held, split="train")
    both = datasets.DatasetDict(train=dataset(2), test=dataset(3))
    with pytest.raises(ValueError, match=r"DatasetDict has the splits train, test: name one"):
        open_images(both)
    assert len(open_images(both, split="test")) == 3


def test_a_source_that_is_open_may_be_named_as_it_was_opened() -> None:
    source = open_images(datasets.DatasetDict(train=dataset(2), test=dataset(3)), split="test")
    assert open_images(source, split="test", column="image") is source
    with pytest.raises(ValueError, match=r"is open already: leave out split='tr"):
        open_images(source, split="train")


def test_a_part_of_a_source_that_is_open(folder: Path) -> None:
    whole = open_images(folder)
    part = open_images(whole, n_images=2)
    assert part.ids == whole.ids[:2]
    assert same(part[1], whole[1])
    assert open_images(open_images(folder, n_images=2), n_images=5).ids == whole.ids[:2]
    with pytest.raises(ValueError, match="no column 'breed'"):
        open_images(whole, label_column="breed")


@pytest.mark.parametrize("suffix", ["", ".tar"])
def test_a_folder_that_is_open_may_be_named_as_it_was_opened(suffix: str, tmp_path: Path) -> None:
    for split, n in (("train", 2), ("test", 3)):
        if suffix:
            write(tmp_path / f"{split}-0{suffix}", n)
        else:
            photo_folder(tmp_path / split)
    source = open_images(tmp_path, split="test")
    assert open_images(source, split="test") is source
    assert open_images(open_images(source, n_images=1), split="test").ids == source.ids[:1]
    with pytest.raises(ValueError, match=r"is open already: leave out split='tr"):
        open_images(source, split="train")
