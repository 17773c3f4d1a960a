"""Hostile activation stores."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path

from tests.faults._corpus import _readers as readers
from tests.faults._corpus import _samples as samples
from tests.faults._corpus._case import Read, Rule
from tests.faults._corpus._checkpoints import safetensors_header
from tests.faults._corpus._mutate import BYTES, as_json, edited, everywhere, json_bomb

READERS: dict[str, Read] = {
    "read": readers.store,
    "described": readers.store_facts,
    "checked": readers.store_check,
}
DOCUMENTS = ("manifest.json", "plan.json", "shard-00001.json")


def document(how: str, folder: Path, rng: random.Random) -> Path:
    """A store with a hostile document; half of the time one that is not finished."""
    files = dict(samples.store())
    hit = rng.choice(DOCUMENTS)
    if hit != "manifest.json" and rng.random() < 0.6:
        del files["manifest.json"]  # which would notice that another document was changed
    valid = json.loads(files[hit])
    if how == "edited":
        files[hit] = as_json(edited(valid, rng, times=rng.choice((1, 1, 3))))
    elif how == "numbers":
        files[hit] = as_json(everywhere(valid, rng))
    elif how == "bombs":
        files[hit] = json_bomb(files[hit], rng)
    else:
        files[hit] = rng.choice(tuple(BYTES.values()))(files[hit], rng)
    return samples.put(files, folder)


def large(folder: Path, rng: random.Random) -> Path:
    """A store whose manifest is sound JSON of up to sixty megabytes."""
    files = dict(samples.store())
    hit = rng.choice(("manifest.json", "plan.json"))
    if hit == "plan.json":
        del files["manifest.json"]
    tree = json.loads(files[hit])
    lists = [name for name, inner in tree.items() if isinstance(inner, list | dict) and inner]
    name = rng.choice((*lists, "further"))
    inner = tree.get(name)
    if isinstance(inner, list):
        tree[name] = inner * rng.choice((1_000, 40_000))
    elif isinstance(inner, dict):
        tree[name] = inner | {f"k{i}": next(iter(inner.values())) for i in range(100_000)}
    else:
        tree[name] = rng.choice(
            ([[]] * 9_000_000, "x" * 50_000_000, {str(i): i for i in range(10**6)})
        )
    files[hit] = as_json(tree)[: 60 << 20]
    return samples.put(files, folder)


def shard(folder: Path, rng: random.Random) -> Path:
    """A store with a hostile shard."""
    files = dict(samples.store())
    name = f"shard-0000{rng.randrange(3)}.safetensors"
    damage = rng.choice((safetensors_header, *BYTES.values()))
    files[name] = damage(files[name], rng)
    if rng.random() < 0.2:
        del files["manifest.json"]
    if rng.random() < 0.1:
        del files[rng.choice([one for one in files if one.startswith("shard")])]
    return samples.put(files, folder)


RULES = tuple(
    Rule("store", f"{rule}, {way}", count, make, read)
    for way, read in READERS.items()
    for rule, count, make in (
        ("documents edited", 180, partial(document, "edited")),
        ("one number huge everywhere", 80, partial(document, "numbers")),
        ("JSON bombs", 40, partial(document, "bombs")),
        ("documents damaged", 60, partial(document, "bytes")),
        ("large documents", 5, large),
        ("shards", 100, shard),
    )
)
