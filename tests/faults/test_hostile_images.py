"""Hostile images, tables and archives: one sentence, soon, in little memory, and nothing hangs."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests._cost import Cost, cost_of
from tests._images import image, photo_folder
from tests.images.test_sources import dataset, png, same, write_tar
from vision_plugin.images import BadImageError, ImageSource, open_images
from vision_plugin.images._pages import expanded_bytes
from vision_plugin.metrics import read_taxonomy

MB = 1_000_000


def use(given: object) -> None:
    """Open a source, read its first image, its labels and every column."""
    source = open_images(given)
    try:
        source[0]
    finally:
        assert source.labels is None or len(source.labels) == len(source)
        for name in source.column_names:
            source.column(name)


def refused(given: object) -> Cost:
    """What it costs to open and read a source that is refused, after checks of the sentence."""
    cost = cost_of(lambda: use(given))
    assert cost.error.startswith(("ValueError: ", "BadImageError: ")), cost.error
    assert len(cost.error) < 1000
    assert "\n" not in cost.error
    assert cost.is_small, cost
    return cost


class TestOtherThanFiles:
    """Pipes and devices, wherever the name of a file can stand."""

    @pytest.fixture(params=["pipe", "zeros"])
    def make(self, request: pytest.FixtureRequest) -> Callable[[Path], None]:
        if request.param == "pipe":
            return os.mkfifo
        return lambda path: path.symlink_to("/dev/zero")

    def test_as_an_image_in_a_folder(self, make: Callable[[Path], None], tmp_path: Path) -> None:
        make(tmp_path / "a.png")
        assert "not a regular file" in refused(tmp_path).error

    @pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
    def test_as_metadata(self, kind: str, make: Callable[[Path], None], tmp_path: Path) -> None:
        image().save(tmp_path / "a.png")
        make(tmp_path / f"metadata.{kind}")
        assert "not a regular file" in refused(tmp_path).error

    @pytest.mark.parametrize("name", ["a.parquet", "a.tar"])
    def test_as_a_table_or_an_archive(
        self, name: str, make: Callable[[Path], None], tmp_path: Path
    ) -> None:
        make(tmp_path / name)
        for given in (tmp_path, tmp_path / name):
            assert "not a regular file" in refused(given).error

    def test_as_what_a_cell_names(self, make: Callable[[Path], None], tmp_path: Path) -> None:
        make(tmp_path / "a.png")
        cells = [{"bytes": None, "path": "a.png"}]
        pq.write_table(pa.table({"image": cells}), tmp_path / "a.parquet")
        assert "not a regular file" in refused(tmp_path / "a.parquet").error
        features = datasets.Features(image=datasets.Image())
        cells = [{"bytes": None, "path": str(tmp_path / "a.png")}]
        held = datasets.Dataset.from_dict({"image": cells}, features=features)
        assert "not a regular file" in refused(held).error

    @pytest.mark.parametrize(
        "name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"]
    )
    def test_in_a_saved_data_set(
        self, name: str, make: Callable[[Path], None], tmp_path: Path
    ) -> None:
        dataset().save_to_disk(tmp_path / "saved")
        (tmp_path / "saved" / name).unlink()
        make(tmp_path / "saved" / name)
        cost = cost_of(lambda: use(tmp_path / "saved"))
        assert cost.error.startswith("ValueError: "), cost.error
        assert cost.is_small

    def test_as_what_is_opened(self, make: Callable[[Path], None], tmp_path: Path) -> None:
        make(tmp_path / "it")
        assert "neither Parquet nor a tar" in refused(tmp_path / "it").error

    def test_as_a_member_of_a_tar(self, tmp_path: Path) -> None:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name, kind in (("a.png", tarfile.FIFOTYPE), ("b.png", tarfile.CHRTYPE)):
                member = tarfile.TarInfo(name)
                member.type, member.size = kind, 10**9
                tar.addfile(member)
        assert "holds no images" in refused(tmp_path / "a.tar").error

    @pytest.mark.parametrize("name", ["self/pagemap", "self/maps", "kmsg"])
    def test_files_that_the_system_makes_up(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "a.png").symlink_to(f"/proc/{name}")
        refused(tmp_path)

    @pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
    def test_what_the_system_cannot_read(self, name: str, tmp_path: Path) -> None:
        photo_folder(tmp_path)
        (tmp_path / name).symlink_to("/proc/self/mem")
        assert f"{name} cannot be read (Input/output error)" in refused(tmp_path).error


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """The header of a member of a tar, with its size as it is to stand there."""
    fields = [name.encode().ljust(100, b"\0"), b"0000644\0", b"0000000\0" * 2, size]
    fields += [b"00000000000\0", b" " * 8, kind, bytes(100), b"ustar\x0000", bytes(247)]
    block = b"".join(fields)
    assert len(block) == 512
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def octal(size: int) -> bytes:
    return b"%011o\0" % size


def base_256(size: int) -> bytes:
    return (
        b"\x80" + size.to_bytes(11, "big") if size >= 0 else size.to_bytes(12, "big", signed=True)
    )


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def pax(records: bytes) -> bytes:
    return header("pax", octal(len(records)), b"x") + padded(records)


PIXEL = png(Image.new("RGB", (1, 1)))
WHOLE = header("a.png", octal(len(PIXEL))) + padded(PIXEL)
TARS: dict[str, bytes] = {
    "negative size": header("a.png", base_256(-512)) + bytes(1024),
    "negative size that leads back": WHOLE + header("b.png", base_256(-1024)) + bytes(1024),
    "huge size": header("a.png", base_256(2**80)) + bytes(1024),
    "size of eight gigabytes": header("a.png", octal(2**33 - 1)) + bytes(1024),
    "size that is no number": header("a.png", b"12345678910\0".replace(b"8", b"x")) + bytes(1024),
    "pax size negative": pax(b"13 size=-512\n") + WHOLE,
    "pax size huge": pax(b"30 size=99999999999999999999\n".replace(b"30", b"29")) + WHOLE,
    "pax length that leads nowhere": pax(b"0 path=a\n") + WHOLE,
    "pax length too large": pax(b"999999 path=a\n") + WHOLE,
    "pax without end": header("pax", octal(2**33 - 1), b"x") + WHOLE,
    "pax of digits": pax(b"1" * 900_000) + WHOLE,
    "pax of two megabytes": pax(b"2000000 path=" + b"a" * 1_999_986 + b"\n") + WHOLE,
    "long name without end": header("name", octal(2**33 - 1), b"L") + WHOLE,
    "sparse map without end": header("a.png", octal(1), b"S")[:482] + b"\1" + bytes(29),
    "nothing": b"",
    "noise": bytes(range(256)) * 8,
}


@pytest.mark.parametrize("name", TARS)
def test_tars_with_hostile_headers(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(TARS[name])
    assert "a.tar cannot be read as a tar file (" in refused(tmp_path / "a.tar").error


def test_a_thousand_headers_before_a_member_are_no_recursion(tmp_path: Path) -> None:
    many = pax(b"12 path=b.p\n") * 5000
    (tmp_path / "a.tar").write_bytes(many + pax(b"14 path=c.png\n") + WHOLE + bytes(1024))
    assert open_images(tmp_path / "a.tar").ids == ["a.tar/c"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_that_the_standard_library_finds(format: int, tmp_path: Path) -> None:
    names = ["a.png", "ä/b.png", "/".join(["folder"] * 13) + "/c.png", "d" * 90 + ".png"]
    if format != tarfile.USTAR_FORMAT:
        names.append("e" * 300 + "/" + "f" * 200 + ".png")
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=format) as tar:
        tar.add(tmp_path, "folder", recursive=False)
        for number, name in enumerate(names):
            content = png(image(number))
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 1.5
            tar.addfile(member, io.BytesIO(content))
    source = open_images(path)
    with tarfile.open(path) as tar:
        found = [member.name for member in tar if member.isfile()]
    assert source.ids == [f"a.tar/{name.removesuffix('.png')}" for name in found]
    assert all(same(source[number], image(number)) for number in range(len(names)))


NESTED = b"[" * 100_000
JSON: dict[str, bytes] = {
    "deep": NESTED,
    "deep and closed": NESTED + b"]" * 100_000,
    "deep within": b'{"file_name": "a.png", "x": ' + b"[" * 900 + b"]" * 900 + b"}",
    "list": b'["a.png"]',
    "number": b"7",
    "null": b"null",
    "text": b'"a.png"',
    "half": b'{"file_name": ',
    "not UTF-8": b'{"file_name": "\xff\xfe"}',
    "huge number": b'{"file_name": ' + b"9" * 5000 + b"}",
    "no name": b"{}",
    "a list as name": b'{"file_name": ["a.png"]}',
}


@pytest.mark.parametrize("name", JSON)
def test_json_lines_about_a_folder(name: str, tmp_path: Path) -> None:
    image().save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "a.png"}\n' + JSON[name] + b"\n")
    assert "metadata.jsonl, line 2 " in refused(tmp_path).error


@pytest.mark.parametrize("name", [n for n in JSON if n not in ("no name", "a list as name")])
def test_json_members_of_a_tar(name: str, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.png", PIXEL), ("a.json", JSON[name])])
    assert "the json member of a.tar/a " in refused(tmp_path / "a.tar").error


def test_a_json_member_above_the_limit(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.png", PIXEL), ("a.json", b" " * 17_000_000)])
    assert "above the limit of 16,777,216" in refused(tmp_path / "a.tar").error


CSV: dict[str, bytes] = {
    "a field above the limit": b"file_name,x\na.png," + b"y" * 200_000 + b"\n",
    "an open quote": b'file_name,x\na.png,"' + b"y,\n" * 100_000,
    "a line above the limit": b"file_name,x\n" + b"," * 60_000_000,
    "many columns": b"file_name," + b",".join(b"c%d" % i for i in range(100_000)) + b"\na.png\n",
    "a column twice": b"file_name,x,x\na.png,1,2\n",
    "more fields than columns": b"file_name,x\na.png,1,2,3\n",
    "UTF-16": "file_name,x\na.png,1\n".encode("utf-16"),
    "zero bytes": b"\0" * 100_000,
    "only a carriage return": b"file_name,x\ra.png,1\r",
}


@pytest.mark.parametrize("name", CSV)
def test_csv_about_a_folder(name: str, tmp_path: Path) -> None:
    image().save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_bytes(CSV[name])
    assert "metadata.csv, line " in refused(tmp_path).error


HUGGING_FACE: dict[str, bytes] = {
    **{name: JSON[name] for name in ("deep", "deep and closed", "half", "not UTF-8")},
    "list": b"[1]",
    "number": b"7",
    "features a list": b'{"info": {"features": [1]}}',
    "info a number": b'{"info": 7}',
    "no names": b'{"info": {"features": {"label": {"_type": "ClassLabel"}}}}',
    "names a number": b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": 7}}}}',
    "names of numbers": b'{"info": {"features": {"label": {"_type": "ClassLabel", "names": [7]}}}}',
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_metadata_within_parquet(name: str, tmp_path: Path) -> None:
    table = pa.table({"image": [PIXEL], "label": [0]})
    table = table.replace_schema_metadata({b"huggingface": HUGGING_FACE[name]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert "the Hugging Face metadata in " in refused(tmp_path / "a.parquet").error


class TestParquet:
    def test_a_dictionary_is_held_once(self, tmp_path: Path) -> None:
        """A megabyte that is repeated ten thousand times, in a file of some hundred bytes."""
        content = encoded(Image.new("L", (1000, 1000)), "BMP")
        once = pa.array([content], pa.binary())
        for with_schema in (True, False):
            indices = pa.array(np.zeros(10_000, np.int32))
            table = pa.table({"image": pa.DictionaryArray.from_arrays(indices, once)})
            pq.write_table(
                table,
                tmp_path / "a.parquet",
                compression="zstd",
                dictionary_pagesize_limit=1 << 30,
                store_schema=with_schema,
            )
            source = open_images(tmp_path / "a.parquet")
            assert len(source) == 10_000
            cost = cost_of(partial(self.read, source))
            assert cost.error == ""
            assert cost.bytes < 100 * MB

    @staticmethod
    def read(source: ImageSource) -> None:
        for index in range(0, len(source), 5000):
            source[index]

    def test_so_are_texts(self, tmp_path: Path) -> None:
        indices = pa.array(np.zeros(10_000, np.int32))
        texts = pa.DictionaryArray.from_arrays(indices, pa.array(["a" * MB]))
        table = pa.table({"image": [PIXEL] * 10_000, "text": texts})
        pq.write_table(table, tmp_path / "a.parquet", dictionary_pagesize_limit=1 << 30)
        cost = cost_of(lambda: use(tmp_path / "a.parquet"))
        assert cost.error == ""
        assert cost.bytes < 100 * MB

    @pytest.mark.parametrize("column", ["image", "text"])
    def test_pages_that_expand_are_refused(
        self, column: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("vision_plugin.images._parquet.EXPANSION_FLOOR_BYTES", 8 * MB)
        zeros = [b"\0" * (30 * MB)]
        columns = {"image": [PIXEL], "text": pa.array([b"a"], pa.string())} | {column: zeros}
        if column == "text":
            columns["text"] = pa.array(zeros, pa.binary()).cast(pa.string())
        pq.write_table(pa.table(columns), tmp_path / "a.parquet", compression="zstd")
        assert (tmp_path / "a.parquet").stat().st_size < MB
        error = refused(tmp_path / "a.parquet").error
        assert f"its column '{column}' expand to 30," in error

    def test_a_footer_that_says_less_is_not_believed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("vision_plugin.images._parquet.EXPANSION_FLOOR_BYTES", 8 * MB)
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table({"image": [b"\0" * (30 * MB)]}), path, compression="zstd")
        claimed = pq.read_metadata(path).row_group(0).column(0).total_uncompressed_size
        content = path.read_bytes()
        start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
        assert varint(claimed) in content[start:]
        footer = content[start:].replace(varint(claimed), varint(1_100_000))
        path.write_bytes(content[:start] + footer)
        lying = pq.read_metadata(path).row_group(0).column(0)
        assert lying.total_uncompressed_size == 1_100_000
        assert "its column 'image' expand to 30," in refused(path).error

    @pytest.mark.parametrize("version", ["1.0", "2.0"])
    @pytest.mark.parametrize("statistics", [True, False])
    def test_pages_are_counted_as_the_writer_counted_them(
        self, version: str, statistics: bool, tmp_path: Path
    ) -> None:
        path = tmp_path / "a.parquet"
        values = [bytes(100 + i) for i in range(3000)] + [None, b"a"] * 1000
        numbers = list(range(5000))
        pq.write_table(
            pa.table({"image": values, "n": numbers, "lists": [[i, i] for i in numbers]}),
            path,
            compression="zstd",
            data_page_size=2000,
            data_page_version=version,
            write_statistics=statistics,
            row_group_size=1500,
        )
        about = pq.read_metadata(path)
        descriptor = os.open(path, os.O_RDONLY)
        for group in range(about.num_row_groups):
            for place in range(about.num_columns):
                column = about.row_group(group).column(place)
                first = min(column.dictionary_page_offset or 10**9, column.data_page_offset)
                size = column.total_compressed_size
                found = expanded_bytes(descriptor, first, size)
                # The writer counts the headers too.
                assert 0 <= column.total_uncompressed_size - found < size
        os.close(descriptor)

    def test_dictionary_encoded_bytes_are_images(self, tmp_path: Path) -> None:
        """As pyarrow writes them, alone and in the struct that datasets uses."""
        values = pa.array([png(image(i)) for i in (0, 1, 0)], pa.binary()).dictionary_encode()
        paths = pa.array([None] * 3, pa.string())
        for column in (values, pa.StructArray.from_arrays([values, paths], ["bytes", "path"])):
            pq.write_table(pa.table({"image": column, "n": [1, 2, 3]}), tmp_path / "a.parquet")
            source = open_images(tmp_path / "a.parquet")
            assert all(same(source[i], image(i % 2)) for i in range(3))
            assert source.column("n") == [1, 2, 3]

    @pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
    def test_bytes_of_every_type_are_images(self, kind: pa.DataType, tmp_path: Path) -> None:
        contents = [png(image(i)) for i in range(3)]
        pq.write_table(pa.table({"image": pa.array(contents, kind)}), tmp_path / "a.parquet")
        source = open_images(tmp_path / "a.parquet")
        assert all(same(source[i], image(i)) for i in range(3))

    @pytest.mark.parametrize("place", range(8, 800, 60))
    def test_a_damaged_footer_is_a_sentence(self, place: int, tmp_path: Path) -> None:
        dataset(3).to_parquet(tmp_path / "a.parquet")
        content = bytearray((tmp_path / "a.parquet").read_bytes())
        content[-place - 8 : -place] = b"\xff" * 8
        (tmp_path / "a.parquet").write_bytes(content)
        cost = cost_of(lambda: use(tmp_path / "a.parquet"))
        assert cost.error == "" or cost.error.startswith(("ValueError: ", "BadImageError: "))
        assert "\n" not in cost.error
        assert cost.is_small

    @pytest.mark.parametrize("held", ["text", 10**10, [1, 2], {"a": 1}])
    def test_bytes_that_are_none(self, held: object, tmp_path: Path) -> None:
        """A number of bytes would be so many zeros."""
        cells = pa.array([{"bytes": held, "path": "0.png"}])
        pq.write_table(pa.table({"image": cells}), tmp_path / "t.parquet")
        kind = type(held).__name__
        cost = refused(tmp_path / "t.parquet")
        assert cost.error == f"BadImageError: image 0: its bytes are of type {kind}"

    def test_damaged_pages_cost_their_images_alone(self, tmp_path: Path) -> None:
        dataset(6).to_parquet(tmp_path / "a.parquet", batch_size=3)
        whole = open_images(tmp_path / "a.parquet")
        content = bytearray((tmp_path / "a.parquet").read_bytes())
        content[4:40] = b"\xff" * 36
        (tmp_path / "a.parquet").write_bytes(content)
        source = open_images(tmp_path / "a.parquet")
        with pytest.raises(BadImageError, match=r"row group 0 of .*a\.parquet cannot be read: "):
            source[0]
        assert same(source[5], whole[5]) is same(source[5], image(5)) is True

    def test_files_with_other_class_names_are_not_joined(self, tmp_path: Path) -> None:
        for number, names in enumerate((["cat", "dog"], ["dog", "cat"])):
            features = datasets.Features(
                image=datasets.Image(), label=datasets.ClassLabel(names=names)
            )
            rows = {"image": [{"bytes": PIXEL, "path": None}], "label": [0]}
            held = datasets.Dataset.from_dict(rows, features=features)
            held.to_parquet(tmp_path / f"{number}.parquet")
        with pytest.raises(ValueError, match=r"1\.parquet has other class names than .*0\.parquet"):
            open_images(tmp_path)


def varint(value: int) -> bytes:
    """A number as the footer of a Parquet file holds it."""
    value *= 2
    groups = [value >> shift & 127 for shift in range(0, max(1, value.bit_length()), 7)]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


def encoded(picture: Image.Image, format: str) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format)
    return stream.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def zeros(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG of nothing but zeros, in a few kilobytes."""
    squeeze = zlib.compressobj(9)
    row = bytes(1 + width * depth * {0: 1, 2: 3}[colour] // 8)
    body = b"".join(squeeze.compress(row) for _ in range(height)) + squeeze.flush()
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def icon(content: bytes) -> bytes:
    """An icon that says it is small."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 32, len(content), 22) + content


def tiled(side: int) -> bytes:
    """A TIFF of 16 by 16 pixels that is cut from one large tile of zeros."""
    squeeze = zlib.compressobj(1)
    data = b"".join(squeeze.compress(bytes(side)) for _ in range(side)) + squeeze.flush()
    tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1)]
    tags += [(322, side), (323, side), (324, 8 + 2 + 12 * 10 + 4), (325, len(data))]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


IMAGES: dict[str, Callable[[], bytes]] = {
    "more pixels than the limit": lambda: zeros(20_000, 5_001, 1, 0),
    "an icon with more pixels than it says": lambda: icon(zeros(20_000, 9_000, 1, 0)),
    "an icon with half as many": lambda: icon(zeros(10_008, 10_000, 1, 0)),
    "a tile with more pixels than the image": lambda: tiled(10_001),
    "a claim of more": lambda: b"P6 60000 60000 255\n",
    "a plain pixel map of nothing": lambda: b"P3 10000 9999 255\n" + b" " * MB,
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_that_expand(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(IMAGES[name]())
    refused(tmp_path)


def test_a_tile_as_large_as_its_image_needs_is_read() -> None:
    assert open_images([Image.new("L", (16, 16))])[0].tobytes() == bytes(768)
    with Image.open(io.BytesIO(tiled(64))) as small:
        assert open_images([small])[0].tobytes() == bytes(768)


def test_a_jpeg_of_very_many_scans(tmp_path: Path) -> None:
    content = io.BytesIO()
    image(0, (64, 64)).save(content, "JPEG", progressive=True)
    start = content.getvalue().index(b"\xff\xda")
    head, scans = content.getvalue()[:start], content.getvalue()[start:-2]
    (tmp_path / "sound.jpg").write_bytes(content.getvalue())
    (tmp_path / "hostile.jpg").write_bytes(head + scans * 20_000 + b"\xff\xd9")
    source = open_images(tmp_path)
    assert source[1].size == (64, 64)
    cost = cost_of(lambda: source[0])
    assert "hostile.jpg" in cost.error
    assert "scans are too many, above the limit of 150" in cost.error
    assert cost.is_small


def test_the_commands_say_it_in_a_sentence(
    tmp_path: Path, tiny_clip: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from vision_plugin.cli import main

    photos = photo_folder(tmp_path / "photos")
    (photos / "metadata.jsonl").write_bytes(NESTED)
    line = f"extract --model-name {tiny_clip} --hook-names blocks.1.hook_resid_post --n-workers 0"
    assert main([*line.split(), "--images", str(photos), "--output-path", f"{tmp_path}/out"]) != 0
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert "metadata.jsonl, line 1 is nested more than 64 deep" in said[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((f"{name}.json", JSON[name]) for name in ("deep", "deep and closed", "number", "half")),
        *((f"{name}.csv", CSV[name]) for name in ("a field above the limit", "UTF-16")),
    ],
)
def test_taxonomies(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    cost = cost_of(lambda: read_taxonomy(tmp_path / name, image_ids=["a.png"]))
    assert cost.error.startswith(f"ValueError: {tmp_path / name}"), cost.error
    assert cost.is_small


def test_a_pipe_is_no_taxonomy(tmp_path: Path) -> None:
    for name in ("a.json", "a.csv"):
        os.mkfifo(tmp_path / name)
        cost = cost_of(partial(read_taxonomy, tmp_path / name, image_ids=["a.png"]))
        assert "is a named pipe, not a regular file" in cost.error
