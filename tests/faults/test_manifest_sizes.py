"""Plans, manifests and markers that claim, or hold, more than can be: refused soon."""

from __future__ import annotations

import gc
import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vision_plugin.activations import ActivationStore, StoreError, info, verify

BIG = 60_000_000
DEEP = 40_000


def seal(document: dict[str, Any]) -> None:
    """Give a changed manifest the hash of the plan in it, as an attacker would."""
    own = ("plan_sha256", "n_images", "bad_images", "shards", "schema_version")
    plan = {name: value for name, value in document.items() if name not in own}
    order = ["format", "model", "preprocessing", "image_size", "hooks", "tokens", "dtype"]
    order += ["images", "seed", "batch_size", "images_per_shard", "images_per_chunk"]
    text = json.dumps({name: plan[name] for name in order}, indent=1) + "\n"
    document["plan_sha256"] = hashlib.sha256(text.encode()).hexdigest()


def put(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of one value."""

    def change(document: dict[str, Any]) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


def many_tiny_shards(document: dict[str, Any]) -> None:
    document["images"]["n_images"] = 10**12
    document["images_per_shard"] = 1


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "10^12 shards": many_tiny_shards,
    "10^12 images": put("images", "n_images", value=10**12),
    "10^15 images": put("images", "n_images", value=10**15),
    "a large grid": put("tokens", "grid", value=[2**26, 2**26]),
    "many registers": put("tokens", "n_registers", value=2**52),
    "a huge signature": put("model", "signature", value=[10**400]),
    "many hooks": put(
        "hooks",
        value=[
            {"name": f"h{i}", "d_in": 1, "rows_per_image": 1, "per_token": True}
            for i in range(10_001)
        ],
    ),
    "a deep source": put("images", "path", value=json.loads("[" * 70 + "]" * 70)),
    "a long source": put("images", "path", value=[[]] * 700_000),
    "a source of texts": put("images", "path", value=["abc"] * 500_000),
    "an id of megabytes": put("images", "ids_sha256", value="a" * 20_000_000),
    "a list for a text": put("preprocessing", value=[[]] * 700_000),
    "an object for a number": put("seed", value={str(i): i for i in range(20_000)}),
    "a huge seed": put("seed", value=10**4000),
    "wide rows": put("hooks", 0, "d_in", value=10_000_000),
}


@pytest.mark.slow
@pytest.mark.parametrize("file", ["plan.json", "manifest.json"])
@pytest.mark.parametrize("case", CHANGES)
def test_a_claim_that_cannot_be(case: str, file: str, store_path: Path) -> None:
    document = json.loads((store_path / file).read_text())
    CHANGES[case](document)
    if file == "manifest.json":
        seal(document)
    else:
        (store_path / "manifest.json").unlink()
    (store_path / file).write_text(json.dumps(document))
    refused_soon(store_path)


def test_the_seal_is_the_one_that_is_checked(store_path: Path) -> None:
    document = json.loads((store_path / "manifest.json").read_text())
    before = document["plan_sha256"]
    seal(document)
    assert document["plan_sha256"] == before


def refused_soon(folder: Path) -> None:
    """Every reader refuses a store with one sentence, in less than two seconds each."""
    gc.freeze()  # what the other tests left is not looked through again for every new object
    try:
        for reader in (ActivationStore, info, use):
            start = time.process_time()
            with pytest.raises(StoreError) as refused:
                reader(folder)
            assert time.process_time() - start < 2
            said = str(refused.value)
            assert "expected" in said
            assert len(said) < 1000 + len(str(folder))
        start = time.process_time()
        assert not verify(folder).ok
        assert time.process_time() - start < 2
    finally:
        gc.unfreeze()


def use(folder: Path) -> None:
    """Read something of every kind."""
    store = ActivationStore(folder)
    store.token_rows([0])
    store.batches(store.hook_names[0], 4)


# Each function is checked at every call while the tests run, which small objects would pay for.
CONTENT: dict[str, Callable[[], bytes]] = {
    "deep lists": lambda: b"[" * BIG,
    "deep objects": lambda: b'{"a":' * (BIG // 5),
    "empty lists": lambda: b"[" + b"[]," * (BIG // 3) + b"[]]",
    "objects": lambda: b"[" + b'{"a":1},' * (BIG // 8) + b"{}]",
    "a list of objects": lambda: b'{"a":[' + b"{}," * 15_000 + b"{}]}",
    "digits": lambda: b"1" * BIG,
    "space": lambda: b" " * BIG,
    "a text": lambda: b'"' + b"a" * BIG + b'"',
    "a key": lambda: b'{"' + b"a" * BIG + b'": 1}',
    "somewhat deep": lambda: b'{"format":' * DEEP + b"1" + b"}" * DEEP,
    "too large": lambda: b"{}" + b" " * 65_000_000,
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CONTENT)
def test_a_manifest_of_sixty_megabytes(case: str, store_path: Path) -> None:
    (store_path / "manifest.json").write_bytes(CONTENT[case]())
    refused_soon(store_path)


@pytest.mark.parametrize("file", ["plan.json", "manifest.json", "shard-00001.json"])
def test_a_pipe_or_a_device_in_place_of_a_file(file: str, store_path: Path) -> None:
    (store_path / file).unlink()
    os.mkfifo(store_path / file)
    start = time.process_time()
    assert not verify(store_path).ok
    (store_path / file).unlink()
    (store_path / file).symlink_to("/dev/zero")
    assert not verify(store_path).ok
    assert time.process_time() - start < 2
