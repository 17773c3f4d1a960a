"""A store in object storage, over HTTP: the same bytes as in a folder, whatever is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pyarrow.fs import FileSelector, S3FileSystem

from tests._processes import ended, in_child
from tests._s3 import s3_server
from tests.activations._stores import RESID, config, content, images, make_store, tiny_model
from tests.sae import _runs
from vision_plugin.activations import (
    ActivationStore,
    RemoteFolder,
    StoreError,
    StoreMismatchError,
    extract,
    holds_store,
    verify,
)
from vision_plugin.cli import main
from vision_plugin.images import open_images
from vision_plugin.sae import VisionSAETrainingRunner

N = 60


pytestmark = pytest.mark.slow  # a server of object storage starts for them


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from s3_server(tmp_path_factory.mktemp("moto"))


@pytest.fixture
def bucket(address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3FileSystem:
    """The server's bucket, seen without the code under test; the user's cache is a new folder."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return S3FileSystem(endpoint_override=address.removeprefix("http://"), scheme="http")


def copied(bucket: S3FileSystem, place: str, to: Path) -> dict[str, str]:
    """Hash of every object below a place, by name."""
    to.mkdir()
    for entry in bucket.get_file_info(FileSelector(place)):
        with bucket.open_input_stream(entry.path) as stream:
            (to / entry.base_name).write_bytes(stream.read())
    return content(to)


def make(url: str, **changes: Any) -> ActivationStore:
    source = open_images(list(images(N)))
    return extract(config(Path(), output_path=url, **changes), model=tiny_model(), images=source)


def local(folder: Path) -> dict[str, str]:
    make_store(folder, N)
    return {name: found for name, found in content(folder).items() if name != ".lock"}


def test_a_store_in_a_bucket_has_the_objects_and_values_of_a_folder(
    bucket: S3FileSystem, tmp_path: Path
) -> None:
    store = make("s3://bucket/acts")
    assert copied(bucket, "bucket/acts", tmp_path / "copy") == local(tmp_path / "local")
    assert not list(tmp_path.glob("cache/vision-plugin/stores/*/*.safetensors")), "a shard stayed"
    rows = ActivationStore(tmp_path / "local").activations(RESID, [0, 9, N - 1])
    assert torch.equal(store.activations(RESID, [0, 9, N - 1]), rows)
    assert holds_store("s3://bucket/acts")
    assert not holds_store("s3://bucket/nothing")
    assert verify("s3://bucket/acts").ok
    assert main(["verify", "s3://bucket/acts"]) == main(["info", "s3://bucket/acts"]) == 0


@pytest.mark.usefixtures("bucket")
def test_an_sae_trains_from_a_bucket_as_from_a_folder(tmp_path: Path) -> None:
    make("s3://bucket/trained")
    make_store(tmp_path / "local", N)
    for name, place in (("a", "s3://bucket/trained"), ("b", str(tmp_path / "local"))):
        VisionSAETrainingRunner(_runs.config(tmp_path / name, images=place)).run()
    assert _runs.weights(tmp_path / "a") == _runs.weights(tmp_path / "b")


def test_a_killed_extraction_goes_on_and_writes_no_object_again(
    bucket: S3FileSystem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between a shard and its marker: the shard's object is there, and is not counted."""

    def killed() -> None:
        write, markers = RemoteFolder.write, []

        def writing(self: RemoteFolder, name: str, sent: bytes) -> None:
            if name.startswith("shard") and name.endswith("json"):
                markers.append(name)
                if len(markers) == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
            write(self, name, sent)

        monkeypatch.setattr(RemoteFolder, "write", writing)
        make("s3://bucket/killed")

    assert ended(in_child(killed)) == -signal.SIGKILL
    there = {e.base_name: e for e in bucket.get_file_info(FileSelector("bucket/killed"))}
    assert {"plan.json", "shard-00001.json", "shard-00002.safetensors"} <= there.keys()
    assert "shard-00002.json" not in there
    assert "manifest.json" not in there
    assert not ActivationStore("s3://bucket/killed").complete
    sent: list[str] = []
    write = RemoteFolder.write
    monkeypatch.setattr(
        RemoteFolder, "write", lambda self, name, b: (sent.append(name), write(self, name, b))[1]
    )
    make("s3://bucket/killed")
    assert not {"shard-00000.json", "shard-00001.safetensors"} & set(sent), "made again"
    assert copied(bucket, "bucket/killed", tmp_path / "copy") == local(tmp_path / "local")


def test_damage_and_another_plan_in_a_bucket_are_found(bucket: S3FileSystem) -> None:
    make("s3://bucket/damaged")
    with pytest.raises(StoreMismatchError, match="dtype"):
        make("s3://bucket/damaged", dtype="float16")
    name = "shard-00001.safetensors"
    with bucket.open_input_stream(f"bucket/damaged/{name}") as stream:
        whole = bytearray(stream.read())
    whole[-5] ^= 1
    with bucket.open_output_stream(f"bucket/damaged/{name}") as stream:
        stream.write(bytes(whole))
    found = verify("s3://bucket/damaged")
    assert [problem.file for problem in found.problems] == [name]


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("s3://nobody/acts", "does not let us .*check the bucket, the keys and the endpoint"),
        ("ftp://host/acts", "is no place for a store: name a folder, or s3://"),
        ("s3://", "is no place for a store"),
    ],
)
@pytest.mark.usefixtures("bucket")
def test_a_place_that_takes_no_store_is_one_sentence(url: str, said: str) -> None:
    with pytest.raises((StoreError, ValueError), match=said) as error:
        make(url)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("bucket")
def test_nothing_in_a_bucket_is_replaced() -> None:
    with pytest.raises(ValueError, match="nothing is replaced"):
        make("s3://bucket/acts", overwrite=True)
