"""A manifest is never trusted: every edit is a named error, none a wrong tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.activations._stores import MLP, RESID
from vision_plugin.activations import ActivationStore, ManifestError, StoreError, verify
from vision_plugin.activations import _files as files
from vision_plugin.activations._plan import StorePlan

pytestmark = pytest.mark.usefixtures("one_thread")


def edit(path: Path, change: Any) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def opening_fails(folder: Path, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        ActivationStore(folder)
    report = verify(folder)
    assert not report.ok
    assert report.problems[0].file == "manifest.json"


@pytest.mark.parametrize("version", ["2.0", "0.9", "10.0", "99999999999999999999.0"])
def test_an_unknown_major_version(store_path: Path, version: str) -> None:
    edit(store_path / "manifest.json", lambda d: d.update(schema_version=version))
    opening_fails(store_path, rf"schema_version: expected 1\.x, found {version[:20]}")


def test_a_newer_minor_version_with_more_fields_is_read(store_path: Path) -> None:
    for name in ("manifest.json", "plan.json"):
        edit(store_path / name, lambda d: d.update(schema_version="1.7", further={"a": 1}))
    store = ActivationStore(store_path)
    assert store.activations(RESID).shape == (20, 17, 16)


@pytest.mark.parametrize("version", ["", "1", "one.zero", "1.x", "1.0.0", "²¹.0", 1.0, None, {}])
def test_a_version_that_is_none(store_path: Path, version: object) -> None:
    edit(store_path / "manifest.json", lambda d: d.update(schema_version=version))
    opening_fails(store_path, "schema_version: expected")


NAMES = [
    "../shard-00000.safetensors",
    "/etc/passwd",
    "..",
    "",
    "a/b.safetensors",
    "shard-00000.safetensors\0.txt",
    "shard-00001.safetensors",
    "C:\\shard",
    7,
    None,
]


@pytest.mark.parametrize("key", ["file", "marker"])
@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leads_elsewhere(store_path: Path, key: str, name: object) -> None:
    edit(store_path / "manifest.json", lambda d: d["shards"][0].update({key: name}))
    opening_fails(store_path, rf"shards\[0\]\.{key}: expected")


@pytest.mark.parametrize("name", [name for name in NAMES if isinstance(name, str)][:6])
def test_no_path_leaves_the_folder(store_path: Path, name: str) -> None:
    with pytest.raises(StoreError):
        files.open_regular(store_path / "nested", name)


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b'"x"', b"{", b"\xff\xfe", b"{}", b"NaN", b"\x80\x04N."]
)
def test_what_is_no_manifest(store_path: Path, content: bytes) -> None:
    (store_path / "manifest.json").write_bytes(content)
    opening_fails(store_path, "manifest.json: .*expected .*found")


def test_one_that_is_too_large_is_not_read(store_path: Path) -> None:
    with (store_path / "manifest.json").open("r+b") as stream:
        stream.truncate(files.MAX_JSON_BYTES + 1)
    opening_fails(store_path, "expected at most 67,108,864 bytes, found 67,108,865")


@pytest.mark.parametrize("bomb", [b"[" * 200_000, b'{"a":' * 200_000, b"1" * 100_000])
def test_one_that_is_too_deep_or_long(store_path: Path, bomb: bytes) -> None:
    (store_path / "manifest.json").write_bytes(bomb)
    opening_fails(store_path, "expected JSON")


def test_a_key_that_stands_there_twice(store_path: Path) -> None:
    path = store_path / "manifest.json"
    path.write_text(path.read_text().replace("{", '{"seed": 1,', 1))
    opening_fails(store_path, "a key occurs twice")


def test_a_link_in_place_of_the_manifest(store_path: Path, tmp_path: Path) -> None:
    path = store_path / "manifest.json"
    path.rename(tmp_path / "real.json")
    path.symlink_to(tmp_path / "real.json")
    with pytest.raises(StoreError, match=r"manifest\.json: .*found a symbolic link"):
        ActivationStore(store_path)


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Path of every value of a document."""
    found = [path] if path else []
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            found += leaves(value[key], (*path, key))
    return found


def read_everything(folder: Path) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    store = ActivationStore(folder)
    return store.activations(RESID), store.activations(MLP), store.ids


@pytest.mark.parametrize(
    "file", ["manifest.json", pytest.param("shard-00001.json", marks=pytest.mark.slow)]
)
def test_any_edit_of_any_field_is_an_error_or_changes_nothing(
    sound_store: Path, tmp_path: Path, file: str
) -> None:
    """Every field in turn is removed, or set to values of every type."""
    folder = Path(shutil.copytree(sound_store, tmp_path / "s"))
    right = read_everything(folder)
    original = (folder / file).read_text()
    accepted = unclear = 0
    for path in leaves(json.loads(original)):
        for value in (..., None, True, -1, 0, 3, 2**70, 1.5, "", "x", [], {}, [None], "../x"):
            document = json.loads(original)
            inner = document
            for key in path[:-1]:
                inner = inner[key]
            if value is ...:
                del inner[path[-1]]
            else:
                inner[path[-1]] = value
            if document == json.loads(original):
                continue
            (folder / file).write_text(json.dumps(document))
            try:
                found = read_everything(folder)
            except StoreError as error:
                unclear += "expected" not in str(error)
                continue
            assert all(torch.equal(a, b) for a, b in zip(found[:2], right[:2], strict=True))
            assert found[2] == right[2]
            accepted += 1
    assert unclear == 0
    assert accepted <= 40, "too many edits went unnoticed"


def test_any_damaged_bytes(sound_store: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(sound_store, tmp_path / "s"))
    right = read_everything(folder)
    original = (folder / "manifest.json").read_bytes()
    messages: list[str] = []

    @given(
        place=st.integers(0, len(original)),
        removed=st.integers(0, 20),
        added=st.binary(max_size=20),
    )
    @settings(max_examples=150, deadline=None)
    def damage(place: int, removed: int, added: bytes) -> None:
        content = original[:place] + added + original[place + removed :]
        (folder / "manifest.json").write_bytes(content)
        try:
            found = read_everything(folder)
        except StoreError as error:
            messages.append(str(error))
            return
        assert all(torch.equal(a, b) for a, b in zip(found[:2], right[:2], strict=True))
        assert found[2] == right[2]

    damage()
    assert len(messages) > 50
    assert all("expected" in message for message in messages)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(document=st.dictionaries(st.text(max_size=12), json_values, max_size=6))
@settings(max_examples=100, deadline=None)
def test_any_other_document_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(ManifestError):
        StorePlan.from_json(document, Path("plan.json"))


@pytest.mark.parametrize("name", ["plan.json", "manifest.json"])
def test_verify_reports_what_cannot_even_be_parsed(store_path: Path, name: str) -> None:
    (store_path / name).write_bytes(b"\0" * 50)
    report = verify(store_path)
    assert [problem.file for problem in report.problems] == [name]
