"""Every image is read, and what is not read is counted and said."""

from __future__ import annotations

import json
import os
from pathlib import Path

import datasets
import pytest

from tests._images import image
from tests.images.test_sources import dataset, png, same, write_tar
from vision_plugin.images import open_images


class TestLinks:
    def test_class_folders_that_are_links_are_read(self, folder: Path, tmp_path: Path) -> None:
        linked = tmp_path / "linked"
        linked.mkdir()
        (linked / "cat").symlink_to(folder / "cat")
        (linked / "dog").symlink_to(folder / "dog", target_is_directory=True)
        source = open_images(linked)
        assert source.ids == open_images(folder).ids
        assert source.labels == ["cat"] * 3 + ["dog"] * 3
        assert same(source[5], image(2))

    @pytest.mark.parametrize("kind", [".parquet", ".tar"])
    def test_so_are_folders_of_parquet_files_and_tars(self, kind: str, tmp_path: Path) -> None:
        real = tmp_path / "real"
        real.mkdir()
        write_tar(real / "0.tar", [("a.png", png(image()))])
        dataset(1).to_parquet(real / "0.parquet")
        (real / f"0{'.tar' if kind == '.parquet' else '.parquet'}").unlink()
        (tmp_path / "repository").mkdir()
        (tmp_path / "repository" / "data").symlink_to(real)
        assert len(open_images(tmp_path / "repository")) == 1

    def test_links_that_lead_in_circles_end(self, folder: Path) -> None:
        (folder / "cat" / "up").symlink_to(folder)
        (folder / "self").symlink_to(folder / "self")
        (folder / "cat" / "here").symlink_to(".")
        assert len(open_images(folder)) == 6

    def test_links_that_multiply_are_refused(self, tmp_path: Path) -> None:
        for level in range(20):
            below = tmp_path / f"level{level}"
            below.mkdir()
            for way in "ab":
                (below / way).symlink_to(tmp_path / f"level{level + 1}")
        (tmp_path / "level20").mkdir()
        with pytest.raises(ValueError, match="more than 25,000 links to folders"):
            open_images(tmp_path / "level0")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
    def test_a_folder_that_may_not_be_read_is_said(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (folder / "cat").chmod(0)
        assert len(open_images(folder)) == 3
        (folder / "cat").chmod(0o700)
        assert "cat is left out: it may not be read" in caplog.text


class TestOtherFiles:
    def test_images_of_other_formats_are_counted(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        for name in ("a.HEIC", "b.heic", "c.svg"):
            (folder / "cat" / name).write_bytes(b"")
        (folder / "notes.txt").write_text("hello")
        with caplog.at_level("INFO"):
            assert len(open_images(folder)) == 6
        said = "3 images are not read, as cat/a.HEIC: convert those that end in .heic, .svg"
        assert said in caplog.text
        assert "1 other files are not read, as notes.txt" in caplog.text

    @pytest.mark.parametrize(
        ("suffix", "format"),
        [("apng", "PNG"), ("dib", "BMP"), ("pnm", "PPM"), ("j2k", "JPEG2000"), ("avifs", "AVIF")],
    )
    def test_all_suffixes_of_the_formats_that_are_read(
        self, suffix: str, format: str, tmp_path: Path
    ) -> None:
        image().save(tmp_path / f"a.{suffix}", format)
        assert open_images(tmp_path)[0].size == (24, 20)


class TestRepositories:
    @pytest.mark.parametrize("kind", [".parquet", ".tar"])
    def test_a_logo_is_not_the_data_set(
        self, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "README.md").write_text("# Photos\n")
        image(99).save(tmp_path / "logo.png")
        path = tmp_path / "data" / f"train-00000-of-00001{kind}"
        if kind == ".parquet":
            dataset(5).to_parquet(path)
        else:
            write_tar(path, [(f"{i}.png", png(image(i))) for i in range(5)])
        source = open_images(tmp_path)
        assert len(source) == 5
        assert same(source[4], image(4))
        assert "1 image files beside the 1 files with the data set are not read" in caplog.text

    def test_parquet_files_without_images_beside_images_are_not_the_data_set(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        datasets.Dataset.from_dict({"score": [1.0]}).to_parquet(folder / "scores.parquet")
        with caplog.at_level("INFO"):
            assert len(open_images(folder)) == 6
        assert "1 other files are not read, as scores.parquet" in caplog.text

    def test_tars_beside_tables_about_them_are_the_data_set(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "00000.tar", [("a.png", png(image()))])
        datasets.Dataset.from_dict({"url": ["a"]}).to_parquet(tmp_path / "00000.parquet")
        assert open_images(tmp_path).ids == ["00000.tar/a"]

    def test_two_data_sets_in_one_folder_have_to_be_told_apart(self, tmp_path: Path) -> None:
        dataset(2).to_parquet(tmp_path / "all.parquet")
        for number in range(17):
            image(number).save(tmp_path / f"{number}.png")
        with pytest.raises(ValueError, match=r"1 Parquet files, 0 tars and 17 image files, all wi"):
            open_images(tmp_path)
        assert len(open_images(tmp_path / "all.parquet")) == 2


class TestMetadata:
    @pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
    def test_all_kinds_give_columns(self, kind: str, folder: Path) -> None:
        rows = [
            {"file_name": "./dog/1.png", "mood": "glad\u2028or not"},
            {"file_name": "cat/../cat/0.png", "mood": "sad, very"},
        ]
        write_metadata(folder / f"metadata.{kind}", rows)
        assert open_images(folder).column("mood") == [
            *("sad, very", None, None),
            *(None, "glad\u2028or not", None),
        ]

    @pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
    def test_a_table_in_a_sub_folder_is_about_the_images_there(
        self, kind: str, folder: Path
    ) -> None:
        write_metadata(
            folder / "cat" / f"metadata.{kind}", [{"file_name": "2.png", "mood": "glad"}]
        )
        assert open_images(folder).column("mood") == [None, None, "glad", None, None, None]

    def test_a_mark_at_the_beginning_is_no_part_of_a_name(self, folder: Path) -> None:
        text = "file_name,mood\r\ncat/0.png,glad\r\n"
        (folder / "metadata.csv").write_bytes(text.encode("utf-8-sig"))
        assert open_images(folder).column("mood")[0] == "glad"

    @pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
    @pytest.mark.parametrize("wrong", ["filename", "image"])
    def test_another_header_is_an_error(self, wrong: str, kind: str, folder: Path) -> None:
        write_metadata(folder / f"metadata.{kind}", [{wrong: "cat/0.png", "mood": "glad"}])
        with pytest.raises(ValueError, match=rf"has no file_name, but {wrong}, mood: name the col"):
            open_images(folder)

    @pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
    def test_a_table_about_other_images_is_an_error(self, kind: str, folder: Path) -> None:
        write_metadata(folder / f"metadata.{kind}", [{"file_name": "photos/cat/0.png", "n": "1"}])
        with pytest.raises(ValueError, match=r"none of the 1 rows .* 'photos/cat/0.png', and imag"):
            open_images(folder)

    def test_rows_and_images_that_do_not_match_are_counted(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        names = ["cat/0.png", "cat/9.png", "cat/0.png", "../cat/1.png"]
        write_metadata(folder / "metadata.csv", [{"file_name": n, "mood": n} for n in names])
        assert open_images(folder).column("mood") == ["cat/0.png", *[None] * 5]
        assert "3 of 4 rows are not used, the first is for cat/9.png" in caplog.text
        assert "5 of 6 images have no row in metadata.csv, the first is cat/1.png" in caplog.text

    def test_nothing_is_said_where_all_match(
        self, folder: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        rows = [{"file_name": id, "mood": "glad"} for id in open_images(folder).ids]
        write_metadata(folder / "metadata.csv", rows)
        assert open_images(folder).column("mood") == ["glad"] * 6
        assert not caplog.records

    def test_two_tables_in_one_folder_are_an_error(self, folder: Path) -> None:
        for kind in ("csv", "jsonl"):
            write_metadata(folder / f"metadata.{kind}", [{"file_name": "cat/0.png", "n": "1"}])
        with pytest.raises(
            ValueError, match=r"several metadata files in one folder, metadata\.csv"
        ):
            open_images(folder)


def write_metadata(path: Path, rows: list[dict[str, str]]) -> None:
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".jsonl":
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        path.write_text(text, encoding="utf-8")
    else:
        lines = [",".join(rows[0]), *(",".join(f'"{v}"' for v in row.values()) for row in rows)]
        path.write_text("\n".join(lines), encoding="utf-8")


class TestTars:
    def test_a_sample_with_two_images_asks_which(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar", [("0.jpg", png(image(0))), ("0.png", png(image(1)))])
        with pytest.raises(ValueError, match=r"sample 0 has several images, \.jpg and \.png: name"):
            open_images(tmp_path / "a.tar")
        assert same(open_images(tmp_path / "a.tar", column="png")[0], image(1))
        assert same(open_images(tmp_path / "a.tar", column="jpg")[0], image(0))

    def test_one_image_or_another_in_each_sample_is_no_question(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar", [("0.jpg", png(image(0))), ("1.png", png(image(1)))])
        assert len(open_images(tmp_path / "a.tar")) == 2

    def test_two_members_of_one_name_are_an_error(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar", [("0.png", png(image(0))), ("0.png", png(image(1)))])
        with pytest.raises(ValueError, match=r"two members 0\.png"):
            open_images(tmp_path / "a.tar")

    def test_other_suffixes_are_named(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "a.tar", [("0.seg.png", png(image(0)))])
        with pytest.raises(ValueError, match=r"members end in '\.seg\.png'\. Name the suffix"):
            open_images(tmp_path / "a.tar")
        assert len(open_images(tmp_path / "a.tar", column="seg.png")) == 1

    def test_samples_without_an_image_are_counted(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        write_tar(tmp_path / "a.tar", [("0.png", png(image(0))), ("1.cls", b"7"), ("2.txt", b"a")])
        assert len(open_images(tmp_path / "a.tar")) == 1
        assert "2 samples without an image are left out" in caplog.text

    def test_joined_tars_are_read_to_the_end(self, tmp_path: Path) -> None:
        for number in range(2):
            write_tar(tmp_path / f"{number}.tar", [(f"{number}.png", png(image(number)))])
        parts = [(tmp_path / f"{number}.tar").read_bytes() for number in range(2)]
        (tmp_path / "both.tar").write_bytes(b"".join(parts))
        source = open_images(tmp_path / "both.tar")
        assert source.ids == ["both.tar/0", "both.tar/1"]
        assert same(source[1], image(1))

    def test_a_damaged_header_is_not_taken_for_the_end(self, tmp_path: Path) -> None:
        path = tmp_path / "a.tar"
        write_tar(path, [(f"{i}.png", png(image(i))) for i in range(3)])
        content = bytearray(path.read_bytes())
        content[content.index(b"2.png")] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read as a tar file \(there is no header"):
            open_images(path)

    def test_an_end_that_is_cut_off_is_said(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = tmp_path / "a.tar"
        write_tar(path, [("0.png", png(image(0)))])
        open_images(path)
        assert not caplog.records
        whole = path.read_bytes()
        path.write_bytes(whole[: 512 * -(-len(whole.rstrip(b"\0")) // 512)])
        assert len(open_images(path)) == 1
        assert "may have been cut short" in caplog.text


class TestUnlabelled:
    def test_no_label_is_no_class(self, tmp_path: Path) -> None:
        labels = [0, -1, None, 1]
        features = datasets.Features(
            image=datasets.Image(),
            label=datasets.ClassLabel(names=["even", "odd"]),
            text=datasets.Value("string"),
            number=datasets.Value("int64"),
            share=datasets.Value("float64"),
        )
        rows = {
            "image": [{"bytes": png(image(i)), "path": None} for i in range(4)],
            "label": labels,
            "text": ["even", "", None, "odd"],
            "number": [7, -1, None, 8],
            "share": [0.5, float("nan"), None, -1.0],
        }
        held = datasets.Dataset.from_dict(rows, features=features)
        held.to_parquet(tmp_path / "a.parquet")
        for given in (held, tmp_path / "a.parquet"):
            assert open_images(given).labels == ["even", "", "", "odd"]
            assert open_images(given, label_column="text").labels == ["even", "", "", "odd"]
            assert open_images(given, label_column="number").labels == ["7", "", "", "8"]
            assert open_images(given, label_column="share").labels == ["0.5", "", "", ""]

    def test_in_tars_and_metadata_too(self, folder: Path, tmp_path: Path) -> None:
        samples = [("0.png", png(image())), ("0.cls", b"-1\n"), ("1.png", png(image()))]
        write_tar(tmp_path / "a.tar", [*samples, ("1.cls", b"3\n"), ("2.png", png(image()))])
        assert open_images(tmp_path / "a.tar").labels == ["", "3", ""]
        (folder / "metadata.csv").write_text("file_name,label\ncat/0.png,-1\ncat/1.png,b\n")
        assert open_images(folder).labels == ["", "b", "", "", "", ""]
