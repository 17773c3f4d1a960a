"""Reading what nobody vouches for ends soon, in little memory, with one sentence."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests._cost import cost_of
from vision_plugin._untrusted import MAX_JSON_DEPTH, parse_json, read_json, read_regular


def pipe(path: Path) -> Path:
    os.mkfifo(path)
    return path


def unix_socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as held:
        held.bind(str(path))
    return path


def folder(path: Path) -> Path:
    path.mkdir()
    return path


def link_to_zeros(path: Path) -> Path:
    path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (pipe, "a named pipe"),
        (unix_socket, "a socket"),
        (folder, "a folder"),
        (link_to_zeros, "a character device"),
    ],
)
def test_only_regular_files_are_opened(
    make: Callable[[Path], Path], kind: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "it")
    cost = cost_of(lambda: read_regular(path, 10**12))
    assert cost.error.startswith(f"ValueError: {path} is {kind}, not a regular file")
    assert cost.is_small


@pytest.mark.parametrize("name", ["self/pagemap", "self/maps", "kmsg", "kcore"])
def test_a_file_that_the_system_makes_up_is_empty_or_refused(name: str) -> None:
    path = Path("/proc") / name
    if not os.access(path, os.R_OK):
        pytest.skip(f"{path} cannot be read here")
    cost = cost_of(lambda: len(read_regular(path, 10**9)) == 0 or 1 / 0)
    assert cost.error == "" or cost.error.startswith(f"ValueError: {path} "), cost.error
    assert cost.is_small


def test_a_file_up_to_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "it"
    path.write_bytes(b"12345")
    assert read_regular(path, 5) == b"12345"
    with pytest.raises(ValueError, match=r"it has 5 bytes, above the limit of 4: make it smaller"):
        read_regular(path, 4)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "other", 5)


def test_json_is_read_as_the_standard_library_reads_it(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True, "é\U0001f600"], "b": {"c": {}}}
    path = tmp_path / "it.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    assert read_json(path) == value
    path.write_text(json.dumps(value), encoding="utf-8-sig")
    assert read_json(path, strict=True) == value


@pytest.mark.parametrize("text", ["", "{", "[1,]", "'a'", "\xff", '{"a": 1} {"b": 2}', "9" * 10**4])
def test_what_is_not_json_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=r"^it is not JSON \(.*\): mend it or write it again$"):
        parse_json(text.encode("latin-1"), "it")


@pytest.mark.parametrize("text", ['{"a": 1, "a": 2}', "[NaN]", "[-Infinity]"])
def test_strict_json_has_neither_repeated_keys_nor_nan(text: str) -> None:
    parse_json(text.encode(), "it")
    with pytest.raises(ValueError, match="it is not JSON"):
        parse_json(text.encode(), "it", strict=True)


def test_nesting_ends_at_the_limit() -> None:
    deepest = MAX_JSON_DEPTH
    assert parse_json(b"[" * deepest + b"]" * deepest, "it")
    with pytest.raises(ValueError, match="it is nested more than 64 deep"):
        parse_json(b"[" * (deepest + 1) + b"]" * (deepest + 1), "it")
    assert parse_json(json.dumps({"a": ["[" * 1000]}).encode(), "it") == {"a": ["[" * 1000]}


MB = 1_000_000
HOSTILE: dict[str, Callable[[], bytes]] = {
    "deep lists": lambda: b"[" * (60 * MB),
    "deep lists, few enough": lambda: b"[" * 1_900_000,
    "deep objects": lambda: b'{"a":' * 1_900_000,
    "empty lists": lambda: b"[" + b"[]," * (20 * MB) + b"1]",
    "small objects, few enough": lambda: b"[" + b'{"a":1},' * 900_000 + b"1]",
    "a huge integer": lambda: b"9" * (60 * MB),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_json_costs_little(name: str) -> None:
    content = HOSTILE[name]()
    cost = cost_of(lambda: parse_json(content, "it"))
    assert cost.error == "" or cost.error.startswith("ValueError: it ")
    assert len(cost.error) < 300
    assert cost.is_small, cost
