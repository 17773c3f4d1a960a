"""Hostile text beside images: metadata, taxonomies, concepts, masks, evaluations."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults._corpus import _readers as readers
from tests.faults._corpus import _samples as samples
from tests.faults._corpus._case import Rule
from tests.faults._corpus._mutate import BYTES, CANARY, as_json, edited, json_bomb, value

RECORDS = [
    {"file_name": "cat/0.png", "label": "cat", "tags": ["a", "b"], "score": 0.5},
    {"file_name": "dog/1.jpg", "label": "dog", "tags": [], "score": None},
]
LINES = b"\n".join(map(as_json, RECORDS)) + b"\n"
TABLE = b"file_name,label,score\r\ncat/0.png,cat,0.5\r\ndog/1.jpg,dog,\r\n"
TAXONOMY = {"cat/0.png": ["animal", "mammal", "cat"], "dog/1.jpg": ["animal", "mammal", "dog"]}
TAXONOMY_TABLE = b"id,broad,narrow\ncat/0.png,animal,cat\ndog/1.jpg,animal,dog\n"


def json_lines(how: str, folder: Path, rng: random.Random) -> Path:
    """A folder of images with a hostile ``metadata.jsonl``."""
    if how == "edited":
        data = b"\n".join(as_json(edited(record, rng)) for record in RECORDS)
    elif how == "lines":
        data = LINES + as_json(value(rng)) + b"\n" + LINES
    elif how == "bombs":
        data = rng.choice((b"", LINES)) + json_bomb(LINES, rng)
    elif how == "names":
        path = rng.choice(PATHS)
        data = as_json({"file_name": path, "label": "x"}) + b"\n" + LINES
    else:
        data = rng.choice(tuple(BYTES.values()))(LINES, rng)
    return samples.put(samples.photos() | {"metadata.jsonl": data}, folder)


PATHS = (
    *(f"{CANARY}/keep.txt", "/etc/passwd", "/dev/zero", "..", ".", "", "cat", "CAT/0.PNG"),
    *("cat//0.png", "./cat/0.png", "cat\\0.png", "cat/0.png\0", "~/0.png", "x" * 5000, 7, None, []),
)


def comma_lines(how: str, folder: Path, rng: random.Random) -> Path:
    """A folder of images with a hostile ``metadata.csv``."""
    data = csv_bomb(TABLE, rng) if how == "bombs" else rng.choice(tuple(BYTES.values()))(TABLE, rng)
    return samples.put(samples.photos() | {"metadata.csv": data}, folder)


def csv_bomb(valid: bytes, rng: random.Random) -> bytes:
    """A table with fields, quotes, lines or headers that readers stumble over."""
    head, _, rows = valid.partition(b"\n")
    made: tuple[Callable[[], bytes], ...] = (
        lambda: valid + b"x" * 200_000 + b",y\n",
        lambda: valid + b'"' + b"x" * rng.choice((200_000, 3_000_000)),
        lambda: b"x" * 200_000 + b"\n" + rows,
        lambda: head + b"," + b"c," * rng.choice((10, 30_000)) + b"\n" + rows,
        lambda: head + b"\n" + b"a," * 100_000 + b"\n",
        lambda: head + b"\n" + rows.replace(b",", b",\0,"),
        lambda: b"\n" * 100_000 + valid,
        lambda: head + b"\n",
        lambda: rng.choice((b"", b"\n", b",", b'"', b"\0", b"file_name", b"id\n\n\n")),
        lambda: head.replace(b"label", b"file_name") + b"\n" + rows,
        lambda: head + b"\n" + rows.replace(b",", b",,,,,,"),
        lambda: head + b"\n" + rows.split(b",")[0] + b"\n",
        lambda: head + b"\r" + rows.replace(b"\n", b"\r"),
        lambda: b"\xef\xbb\xbf" + valid,
        lambda: valid.decode().encode("utf-16"),
        lambda: valid + b"\xff\xfe,x\n",
        lambda: head + b"\n" + b'"a""' * 50_000 + b"\n",
        lambda: head + b"\n" + rows * rng.choice((3, 20_000)),
        lambda: valid.replace(b",", b";").replace(b"\n", b"\n\n"),
        lambda: valid.replace(
            b"cat/0.png", rng.choice(("../x", "/etc/passwd", "\x1b[2J")).encode()
        ),
    )
    return rng.choice(made)()


def taxonomy_json(how: str, folder: Path, rng: random.Random) -> Path:
    """A hostile taxonomy as JSON."""
    valid: Any = rng.choice((TAXONOMY, list(TAXONOMY.values())))
    if how == "edited":
        data = as_json(edited(valid, rng))
    elif how == "bombs":
        data = json_bomb(as_json(valid), rng)
    else:
        data = rng.choice(tuple(BYTES.values()))(as_json(valid), rng)
    return samples.put({"taxonomy.json": data}, folder) / "taxonomy.json"


def taxonomy_csv(folder: Path, rng: random.Random) -> Path:
    """A hostile taxonomy as CSV."""
    damage = rng.choice((csv_bomb, *BYTES.values()))
    data = damage(TAXONOMY_TABLE, rng)
    return samples.put({"taxonomy.csv": data}, folder) / "taxonomy.csv"


def concept_file(folder: Path, rng: random.Random) -> Path:
    """A hostile text file of concepts."""
    valid = b"a red disc\na blue square\n"
    data = rng.choice(
        (
            lambda: b"",
            lambda: b"\n" * 100_000,
            lambda: b" \t\r\n",
            lambda: b"\xff\xfe" + valid,
            lambda: valid.decode().encode("utf-16"),
            lambda: b"\0" * 1000,
            lambda: valid + b"x" * 5_000_000,
            lambda: rng.randbytes(2000),
            lambda: b"\x1b[2J\n" + valid,
            lambda: b"\n".join(b"%d" % i for i in range(300_000)),
            lambda: rng.choice(tuple(BYTES.values()))(valid, rng),
        )
    )()
    return samples.put({"concepts.txt": data}, folder) / "concepts.txt"


def vocabulary_file(folder: Path, rng: random.Random) -> Path:
    """A hostile vocabulary."""
    valid = b"# remarks\nred\nblue square\n"
    data = rng.choice(
        (
            lambda: b"",
            lambda: b"# a remark alone\n" * 9,
            lambda: b" \t\r\n" * 1000,
            lambda: valid.decode().encode("utf-16"),
            lambda: valid + b"\xff\xfe\n",
            lambda: b"\0" * 1000,
            lambda: valid + b"x" * 5_000_000,
            lambda: rng.randbytes(2000),
            lambda: b"\x1b[2J\n" + valid,
            lambda: b"\n".join(b"%d" % i for i in range(600_000)),
            lambda: valid * 200_000,
            lambda: rng.choice(tuple(BYTES.values()))(valid, rng),
        )
    )()
    return samples.put({"words.txt": data}, folder) / "words.txt"


def mask_folder(folder: Path, rng: random.Random) -> Path:
    """A folder of masks with hostile names or images."""
    mask = io.BytesIO()
    from PIL import Image

    Image.new("L", (24, 20), 1).save(mask, "PNG")
    names, valid = b"disc\nsquare\n", mask.getvalue()
    how = rng.randrange(5)
    if how == 0:
        names = rng.choice((b"", b"\xff", b"\0", b"x" * 3_000_000, b"\n" * 9, rng.randbytes(99)))
    if how == 1:
        valid = rng.choice((samples.image("jpg"), samples.image(), b"", b"\x89PNG\r\n\x1a\n"))
    if how >= 2:
        valid = rng.choice(tuple(BYTES.values()))(valid, rng)
    made = {"names.txt": names, "cat/0.png": valid, "dog/1.png": valid}
    if rng.random() < 0.1:
        del made["dog/1.png"]
    return samples.put(made, folder)


def document(
    name: str, valid: Callable[[], Any], how: str, folder: Path, rng: random.Random
) -> Path:
    """A hostile JSON document that this package writes."""
    tree = valid()
    if how == "edited":
        data = as_json(edited(tree, rng, times=rng.choice((1, 1, 2, 4))))
    elif how == "bombs":
        data = json_bomb(as_json(tree), rng)
    else:
        data = rng.choice(tuple(BYTES.values()))(as_json(tree), rng)
    return samples.put({name: data}, folder) / name


evaluation = partial(document, "evaluation.json", samples.evaluation)
edit = partial(document, "edit.json", samples.edit)
names = partial(document, "names.json", samples.names)


def deep_names(folder: Path, rng: random.Random) -> Path:
    """Names whose columns are of the wrong length, type or size, or that are of other methods."""
    tree = json.loads(as_json(samples.names()))
    column = rng.choice(
        (
            *([], [1], ["x"] * 4, [[0.5]] * 4, [10**400] * 4, [True] * 4, {"0": 1}, "x" * 4),
            *(None, 0.5, ["\x1b[2J"] * 4, ["x" * 5_000] * 4, [""] * 4, ["a\nb"] * 4, [-1] * 4),
        )
    )
    of_method = tree["candidates"]["decoder"]
    where = rng.choice(("names", "made_by", "candidates", "of_method", "check", "fingerprint"))
    if where in ("names", "made_by"):
        tree[where] = column
    elif where == "candidates":
        tree["candidates"] = rng.choice(({}, {"other": of_method}, {"decoder": None}, [], column))
    elif where == "of_method":
        of_method[rng.choice(sorted(of_method))] = column
    elif where == "check":
        of_method["check"][rng.choice(sorted(of_method["check"]))] = column
    else:
        tree["sae"]["fingerprint"] = rng.choice(
            ({}, {"d_in": 3, "d_sae": 10**12}, {"d_in": -1, "d_sae": 4}, {"d_sae": "4"}, column)
        )
    return samples.put({"names.json": as_json(tree)}, folder) / "names.json"


def deep_evaluation(folder: Path, rng: random.Random) -> Path:
    """An evaluation whose scores are of the wrong length, type or size."""
    tree = json.loads(as_json(samples.evaluation()))
    latents = tree["per_latent"]
    column = rng.choice(
        (
            [],
            [1],
            ["x"] * 96,
            [[0.5]] * 96,
            [10**400] * 96,
            {"0": 1},
            "x" * 96,
            None,
            0.5,
            [True] * 96,
        )
    )
    where = rng.choice(("score", "top_concept", "concepts", "sae"))
    if where == "concepts":
        tree["concepts"] = rng.choice(([], None, "ab", {"a": 1}, [[1]], [None, 1], 7))
    elif where == "top_concept":
        latents["steerability"]["sae"]["top_concept"] = rng.choice(
            ([99] * 96, [-5] * 96, ["0"] * 96, [0.5] * 96, None, column)
        )
    elif where == "sae":
        latents["monosemanticity"] = rng.choice((None, [], {"neurons": {}}, {"sae": column}))
    else:
        latents["monosemanticity"]["sae"]["score"] = column
    return samples.put({"evaluation.json": as_json(tree)}, folder) / "evaluation.json"


RULES = (
    Rule("metadata.jsonl", "records edited", 300, partial(json_lines, "edited"), readers.images),
    Rule(
        "metadata.jsonl",
        "lines that are no object",
        150,
        partial(json_lines, "lines"),
        readers.images,
    ),
    Rule("metadata.jsonl", "JSON bombs", 100, partial(json_lines, "bombs"), readers.images),
    Rule("metadata.jsonl", "paths", 40, partial(json_lines, "names"), readers.images),
    Rule("metadata.jsonl", "bytes damaged", 200, partial(json_lines, "bytes"), readers.images),
    Rule("metadata.csv", "CSV bombs", 200, partial(comma_lines, "bombs"), readers.images),
    Rule("metadata.csv", "bytes damaged", 200, partial(comma_lines, "bytes"), readers.images),
    Rule("taxonomy", "JSON edited", 200, partial(taxonomy_json, "edited"), readers.taxonomy),
    Rule("taxonomy", "JSON bombs", 60, partial(taxonomy_json, "bombs"), readers.taxonomy),
    Rule("taxonomy", "JSON damaged", 80, partial(taxonomy_json, "bytes"), readers.taxonomy),
    Rule("taxonomy", "CSV bombs and damage", 150, taxonomy_csv, readers.taxonomy),
    Rule("concepts", "text", 80, concept_file, readers.concepts),
    Rule("masks", "names and images", 120, mask_folder, readers.masks),
    Rule("evaluation", "JSON edited", 400, partial(evaluation, "edited"), readers.scores),
    Rule("evaluation", "JSON bombs", 80, partial(evaluation, "bombs"), readers.scores),
    Rule("evaluation", "JSON damaged", 120, partial(evaluation, "bytes"), readers.scores),
    Rule("edit", "JSON edited", 400, partial(edit, "edited"), readers.edit),
    Rule("edit", "JSON bombs", 80, partial(edit, "bombs"), readers.edit),
    Rule("edit", "JSON damaged", 120, partial(edit, "bytes"), readers.edit),
    Rule("names", "JSON edited", 400, partial(names, "edited"), readers.names),
    Rule("names", "JSON bombs", 80, partial(names, "bombs"), readers.names),
    Rule("names", "JSON damaged", 120, partial(names, "bytes"), readers.names),
    Rule("names", "columns", 160, deep_names, readers.names),
    Rule("vocabulary", "text", 80, vocabulary_file, readers.vocabulary),
    Rule("evaluation", "columns", 120, deep_evaluation, readers.scores),
)
