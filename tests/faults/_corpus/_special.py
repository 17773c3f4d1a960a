"""What is no plain file: pipes, devices, links in circles, sockets, files of the system."""

from __future__ import annotations

import os
import random
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.faults._corpus import _parquets as parquets
from tests.faults._corpus import _readers as readers
from tests.faults._corpus import _samples as samples
from tests.faults._corpus import _tables as tables
from tests.faults._corpus._archives import valid as tar
from tests.faults._corpus._case import Read, Rule


def pipe(path: Path) -> None:
    """Put a named pipe there that nobody writes to."""
    os.mkfifo(path)


def link(target: str, path: Path) -> None:
    """Put a link there."""
    path.symlink_to(target)


def unix_socket(path: Path) -> None:
    """Put a socket there that nobody answers."""
    with socket.socket(socket.AF_UNIX) as made:
        here = Path.cwd()
        os.chdir(path.parent)
        try:
            made.bind(path.name)
        finally:
            os.chdir(here)


def sparse(size: int, path: Path) -> None:
    """Put a file there that is huge and takes no room."""
    with path.open("wb") as stream:
        stream.truncate(size)


def empty(path: Path) -> None:
    """Put an empty file there."""
    path.touch()


WAYS = {
    "named pipe": pipe,
    "socket": unix_socket,
    "folder": Path.mkdir,
    "empty": empty,
    "link to itself": lambda path: link(path.name, path),
    "link to nothing": partial(link, "nosuch"),
    "link to the folder above": partial(link, ".."),
    "/dev/zero": partial(link, "/dev/zero"),
    "/dev/random": partial(link, "/dev/random"),
    "/dev/null": partial(link, "/dev/null"),
    "/dev/tty": partial(link, "/dev/tty"),
    "/dev/stdin": partial(link, "/dev/stdin"),
    "/proc/self/mem": partial(link, "/proc/self/mem"),
    "/proc/self/environ": partial(link, "/proc/self/environ"),
    "/proc/self/pagemap": partial(link, "/proc/self/pagemap"),
    "file of 10 GB": partial(sparse, 10 << 30),
    "file of 900 MB": partial(sparse, 900 << 20),
    "file of 1 TB": partial(sparse, 1 << 40),
}
"""Things that can lie where a file should, each with what puts it there."""


@dataclass(frozen=True)
class Place:
    """A file of an input that is replaced."""

    files: Callable[[], dict[str, bytes]]
    replaced: str
    read: Read
    opened: str = ""


def nothing() -> dict[str, bytes]:
    """No other files."""
    return {}


def table() -> dict[str, bytes]:
    """Images and a table of them."""
    return {"metadata.jsonl": tables.LINES} | samples.photos()


def masks() -> dict[str, bytes]:
    """Masks of two images."""
    return {"names.txt": b"a\nb\n", "cat/0.png": b"", "dog/1.png": b""}


native = partial(samples.native, "topk")
with_json = partial(samples.foreign, "visaebench-topk")
with_yaml = partial(samples.foreign, "visaebench-oc-batchtopk")
PLACES = {
    "image": Place(samples.photos, "cat/0.png", readers.images),
    "folder of images": Place(samples.photos, "cat", readers.images),
    "metadata.jsonl": Place(table, "metadata.jsonl", readers.images),
    "metadata.csv": Place(samples.photos, "metadata.csv", readers.images),
    "Parquet": Place(nothing, "x.parquet", readers.images, "x.parquet"),
    "Parquet in a folder": Place(nothing, "x.parquet", readers.images),
    "tar": Place(nothing, "x.tar", readers.images, "x.tar"),
    "tar in a folder": Place(lambda: {"a.tar": tar()}, "b.tar", readers.images),
    "state.json": Place(parquets.saved, "state.json", readers.images),
    "dataset_info.json": Place(parquets.saved, "dataset_info.json", readers.images),
    "checkpoint": Place(nothing, "sae.pt", readers.sae, "sae.pt"),
    "checkpoint in a folder": Place(nothing, "ae.pt", readers.sae),
    "config.json": Place(with_json, "config.json", readers.sae),
    "config.yaml": Place(with_yaml, "config.yaml", readers.sae),
    "cfg.json": Place(native, "cfg.json", readers.sae),
    "sae_weights.safetensors": Place(native, "sae_weights.safetensors", readers.sae),
    "manifest.json": Place(samples.store, "manifest.json", readers.store),
    "plan.json": Place(samples.store, "plan.json", readers.store_check),
    "shard": Place(samples.store, "shard-00001.safetensors", readers.store_check),
    "marker": Place(samples.store, "shard-00001.json", readers.store_facts),
    "taxonomy": Place(nothing, "taxonomy.json", readers.taxonomy, "taxonomy.json"),
    "concepts": Place(nothing, "concepts.txt", readers.concepts, "concepts.txt"),
    "names of masks": Place(masks, "names.txt", readers.masks),
    "mask": Place(masks, "cat/0.png", readers.masks),
    "evaluation": Place(nothing, "evaluation.json", readers.scores, "evaluation.json"),
}


def special(place: str, way: str, folder: Path, rng: random.Random) -> Path:
    """An input with something else in the place of one of its files."""
    where = PLACES[place]
    samples.put(where.files(), folder)
    path = folder / where.replaced
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    WAYS[way](path)
    return folder / where.opened if where.opened else folder


RULES = tuple(
    Rule("special file", f"{way} as {place}", 1, partial(special, place, way), PLACES[place].read)
    for place in PLACES
    for way in WAYS
)
