"""Hostile Parquet files and saved data sets."""

from __future__ import annotations

import io
import json
import random
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.faults._corpus import _readers as readers
from tests.faults._corpus import _samples as samples
from tests.faults._corpus._case import Rule
from tests.faults._corpus._mutate import BYTES, CANARY, as_json, edited, json_bomb

FEATURES = {
    "info": {
        "features": {
            "image": {"_type": "Image"},
            "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
            "name": {"dtype": "string", "_type": "Value"},
        }
    }
}


def table(images: Any = None, labels: Any = (0, 1), features: bytes | None = None) -> pa.Table:
    """A table of two images as ``datasets`` writes it."""
    if images is None:
        encoded = (samples.image(), samples.image("jpg"))
        images = pa.array([{"bytes": one, "path": f"{i}.png"} for i, one in enumerate(encoded)])
    columns = {"image": images, "label": pa.array(labels), "name": pa.array(["a", "b"])}
    stored = as_json(FEATURES) if features is None else features
    return pa.table(columns).replace_schema_metadata({b"huggingface": stored})


def encoded(made: pa.Table, **options: Any) -> bytes:
    """Return a table as a Parquet file."""
    stream = io.BytesIO()
    pq.write_table(made, stream, **options)
    return stream.getvalue()


@cache
def valid(compression: str) -> bytes:
    """A sound file."""
    return encoded(table(), compression=compression)


def put(data: bytes, folder: Path) -> Path:
    """Write a file and return it."""
    return samples.put({"hostile.parquet": data}, folder) / "hostile.parquet"


def damaged(how: str, folder: Path, rng: random.Random) -> Path:
    """Damaged bytes anywhere."""
    return put(BYTES[how](valid(rng.choice(("NONE", "SNAPPY", "ZSTD"))), rng), folder)


def footer(folder: Path, rng: random.Random) -> Path:
    """Damaged bytes in the description at the end, whose length stays right."""
    data = valid("NONE")
    length = int.from_bytes(data[-8:-4], "little")
    start = len(data) - 8 - length
    description = rng.choice(tuple(BYTES.values()))(data[start:-8], rng)
    announced = len(description) if rng.random() < 0.9 else rng.choice((0, 2**31, 2**32 - 1))
    return put(data[:start] + description + announced.to_bytes(4, "little") + b"PAR1", folder)


def pages(folder: Path, rng: random.Random) -> Path:
    """Damaged bytes in the first kilobyte of pages, where their headers are."""
    data = bytearray(valid(rng.choice(("NONE", "SNAPPY", "ZSTD", "GZIP"))))
    for _ in range(rng.choice((1, 2, 6))):
        data[4 + rng.randrange(min(len(data) - 500, 3000))] ^= rng.randrange(1, 256)
    return put(bytes(data), folder)


def features(folder: Path, rng: random.Random) -> Path:
    """Hostile notes by ``datasets`` inside a sound file."""
    if rng.random() < 0.8:
        stored = as_json(edited(FEATURES, rng, times=rng.choice((1, 1, 3))))
    else:
        stored = json_bomb(as_json(FEATURES), rng)
    return put(encoded(table(features=stored)), folder)


def cells(folder: Path, rng: random.Random) -> Path:
    """Cells of the image column that are no images."""
    paths = (
        *(
            "/dev/zero",
            "/etc/passwd",
            f"{CANARY}/keep.txt",
            "/proc/self/mem",
            "nosuch.png",
            "",
            ".",
        ),
        *("../" * 99, "x" * 5000, "a\0b", "http://localhost:1/x.png", "/dev/stdin"),
    )
    path = rng.choice(paths)
    made = rng.choice(
        (
            lambda: pa.array([{"bytes": None, "path": path}] * 2),
            lambda: pa.array([{"bytes": b"", "path": path}] * 2),
            lambda: pa.array([{"bytes": rng.randbytes(50), "path": None}] * 2),
            lambda: pa.array([None, {"bytes": samples.image(), "path": None}]),
            lambda: pa.array([path, path]),
            lambda: pa.array([b"", b"x"]),
            lambda: pa.array([1, 2]),
            lambda: pa.array([[1], [2, 3]]),
            lambda: pa.array([{"bytes": [1, 2], "path": 3}] * 2),
            lambda: pa.array([{"bytes": "text", "path": "x"}] * 2),
            lambda: pa.array([{"bytes": {"a": 1}, "path": {"b": 2}}] * 2),
            lambda: pa.array([samples.image()] * 2).dictionary_encode(),
            lambda: pa.array([samples.image()] * 2, pa.large_binary()),
            lambda: pa.nulls(2),
        )
    )()
    labels = rng.choice(
        (
            [0, 1],
            [-1, 7],
            [None, 1],
            ["a", None],
            [1.5, float("nan")],
            [[1], [2]],
            [2**62, 0],
            [b"a", b"\xff"],
        )
    )
    return put(encoded(table(made, labels)), folder)


def expanding(folder: Path, rng: random.Random) -> Path:
    """Small files of many or huge values."""
    rows = rng.choice((3_000_000, 40_000_000))
    made = rng.choice(
        (
            lambda: pa.table({"image": pa.array([b"x" * 200] * 10).take(pa.array([0] * 200_000))}),
            lambda: pa.table({"image": pa.array([bytes(250 << 20)], pa.large_binary())}),
            lambda: pa.table({"image": _repeated(bytes(100 << 20), 20)}),
            lambda: pa.table(
                {"image": [samples.image()] * 20, "label": _repeated("x" * (90 << 20), 20)}
            ),
            lambda: pa.table({"image": pa.nulls(rows, pa.binary())}),
            lambda: pa.table({f"c{i}": [1] for i in range(5_000)}),
            lambda: pa.table({"image": [samples.image()], "deep": [_deep(60)]}),
            lambda: table(features=b'{"info": ' + b" " * (40 << 20) + b"}"),
            lambda: pa.table({"image": [samples.image()], "x": [list(range(3_000_000))]}),
        )
    )()
    options: dict[str, Any] = {"row_group_size": 1} if made.num_rows < 5 else {}
    options |= {"write_statistics": False, "dictionary_pagesize_limit": 1 << 30}
    return put(encoded(made, compression="ZSTD", **options), folder)


def _repeated(one: Any, times: int) -> pa.Array:
    """One value many times, which is held and written once."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * times), pa.array([one]))


def _deep(depth: int) -> Any:
    return {"a": _deep(depth - 1)} if depth else 1


@cache
def saved() -> dict[str, bytes]:
    """The files of a data set that ``save_to_disk`` wrote."""
    import datasets

    made = datasets.Dataset.from_dict(
        {"image": [{"bytes": samples.image(), "path": None}] * 2, "label": [0, 1]},
        features=datasets.Features(
            image=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"])
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        datasets.DatasetDict(train=made, test=made).save_to_disk(folder)
        return {
            name.removeprefix("train/"): content
            for name, content in samples.files_of(Path(folder)).items()
            if name.startswith("train/")
        }


def data_set(how: str, folder: Path, rng: random.Random) -> Path:
    """A saved data set with a hostile description or hostile rows."""
    files = dict(saved())
    names = [name for name in files if name.endswith(".json")]
    hit = rng.choice(names)
    if how == "edited":
        files[hit] = as_json(edited(json.loads(files[hit]), rng, times=rng.choice((1, 1, 3))))
    elif how == "bombs":
        files[hit] = json_bomb(files[hit], rng)
    elif how == "several":
        splits = as_json(edited({"splits": ["train", "test"]}, rng))
        files = {"dataset_dict.json": splits} | {f"train/{n}": c for n, c in files.items()}
    else:
        hit = rng.choice(list(files))
        files[hit] = rng.choice(tuple(BYTES.values()))(files[hit], rng)
    return samples.put(files, folder)


MADE: dict[str, tuple[int, Callable[[Path, random.Random], Path]]] = {
    "footer damaged": (300, footer),
    "pages damaged": (200, pages),
    "notes of datasets": (250, features),
    "cells": (200, cells),
    "bombs": (16, expanding),
}
RULES = (
    *(Rule("Parquet", how, 60, partial(damaged, how), readers.images) for how in BYTES),
    *(Rule("Parquet", name, count, make, readers.images) for name, (count, make) in MADE.items()),
    Rule("saved data set", "JSON edited", 250, partial(data_set, "edited"), readers.images),
    Rule("saved data set", "JSON bombs", 60, partial(data_set, "bombs"), readers.images),
    Rule("saved data set", "splits", 40, partial(data_set, "several"), readers.images),
    Rule("saved data set", "bytes damaged", 150, partial(data_set, "bytes"), readers.images),
)
