"""Hostile and damaged checkpoints: nothing runs, nothing is built, and the error has a name."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pickle
import shutil
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.formats.test_samples import DATA, assert_same_numbers, expected
from vision_plugin.formats import (
    CheckpointError,
    CorruptCheckpointError,
    RefusedCheckpointError,
    UnknownFormatError,
    UnsafeCheckpointError,
    disk_converter,
    load_sae,
)

# Containers with a checksum over every byte of their weights.
CHECKED_FILES = ["prisma-gated-pt", "patchsae-relu-pklgz", "saev-batchtopk", "dl-matroyshka"]


def state_dict(d_in: int = 4, d_sae: int = 6) -> OrderedDict[str, torch.Tensor]:
    torch.manual_seed(0)
    return OrderedDict(
        W_enc=torch.randn(d_in, d_sae),
        b_enc=torch.randn(d_sae),
        W_dec=torch.randn(d_sae, d_in),
        b_dec=torch.randn(d_in),
    )


def patchsae(**changes: Any) -> dict[str, Any]:
    config = {"d_in": 4, "l1_coefficient": 0.1, "gated_sae": False, "block_layer": 3}
    return {"cfg": config | {"module_name": "resid"}, "state_dict": state_dict() | changes}


class Payload:
    """Pickles as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def write_torch(content: Any, path: Path) -> None:
    torch.save(content, path)


def write_legacy_torch(content: Any, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_gzipped_pickle(content: Any, path: Path) -> None:
    path.write_bytes(gzip.compress(pickle.dumps(content)))


def write_saev(content: Any, path: Path) -> None:
    archive = io.BytesIO()
    torch.save(content, archive)
    header = {"d_vit": 4, "exp_factor": 2}
    path.write_bytes(json.dumps(header).encode() + b"\n" + archive.getvalue())


WRITERS = [write_torch, write_legacy_torch, write_gzipped_pickle, write_saev]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("where", ["in place of the config", "as a tensor", "in the config", "all"])
@pytest.mark.parametrize("how", ["os.system", "eval", "open"])
def test_a_payload_leaves_no_trace(
    write: Callable[[Any, Path], None], where: str, how: str, tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    payload = {
        "os.system": Payload(os.system, f"touch {trace}"),
        "eval": Payload(eval, f"open({str(trace)!r}, 'w')"),
        "open": Payload(open, str(trace), "w"),
    }[how]
    content: Any = patchsae()
    if where == "in place of the config":
        content["cfg"] = payload
    elif where == "as a tensor":
        content["state_dict"]["W_enc"] = payload
    elif where == "in the config":
        content["cfg"]["lr"] = payload
    else:
        content = payload
    write(content, tmp_path / "sae.bin")

    with pytest.raises((UnsafeCheckpointError, RefusedCheckpointError)) as caught:
        load_sae(tmp_path / "sae.bin")
    assert not trace.exists()
    assert "sae.bin" in str(caught.value)

    # The payload is real: the reader that everyone else uses would have run it.
    if write is write_torch and where == "all":
        torch.load(tmp_path / "sae.bin", weights_only=False)
        assert trace.exists()


def test_a_foreign_class_is_never_imported_or_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace"
    for package in ("vit_prisma", "vit_prisma/sae", "src", "src/sae_training"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"open({str(trace)!r}, 'w')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("prisma-gated-pt", "patchsae-relu-pt", "patchsae-relu-pklgz"):
        assert_same_numbers(load_sae(DATA / name), expected(name))
    assert not trace.exists()
    assert not {"vit_prisma", "src"} & set(sys.modules)


def test_an_unknown_class_in_the_config_reads_as_an_inert_bag(tmp_path: Path) -> None:
    content = patchsae()
    content["cfg"]["dataset"] = Payload(Path, "images")
    write_torch(content, tmp_path / "sae.pt")
    assert load_sae(tmp_path / "sae.pt").cfg.d_in == 4


@pytest.mark.parametrize(
    "stream",
    [
        b"\x80\x04\x96" + struct.pack("<Q", 1 << 40) + b".",  # BYTEARRAY8 of a tebibyte
        b"\x80\x02K\x01r\xff\xff\xff\xff.",  # a memo index that would make a list of 64 GB
        b"\x80\x02\x8b\xff\xff\xff\x7f.",  # LONG4 of two gigabytes
        b"\x80\x02\x82\x01.",  # an extension code
        b"\x80\x02(cos\nsystem\no.",  # OBJ
        b"\x80\x02(S'true'\nios\nsystem\n.",  # INST
        b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
        b"\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.",  # BUILD on a callable
        b"\x80\x02ctorch.storage\n_load_from_bytes\nC\x04evil\x85R.",
        b"\x80\x02Q.",
        b"\x80\x02}(K\x01K\x02u.",
        b"\x80\x02" + b"(" * 50_000 + b"l" * 50_000 + b".",
        b"\x80\x02].",
        b"\x80\x02.",
        b"\x80",
        b"",
        b"not a checkpoint at all",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        b"{" + b" " * (2 << 20),
        b'{"schema": 5}\nnot a zip',
        b"[1]\n",
        b"PK\x03\x04 but not a zip",
        b"\x1f\x8b but not gzip",
        struct.pack("<Q", 1 << 60) + b"{",
    ],
)
def test_a_malformed_file_gives_a_named_error(stream: bytes, tmp_path: Path) -> None:
    (tmp_path / "sae.pt").write_bytes(stream)
    with pytest.raises(CheckpointError, match=r"sae\.pt"):
        load_sae(tmp_path / "sae.pt")


def test_a_gzip_bomb_is_stopped(tmp_path: Path) -> None:
    (tmp_path / "sae.pkl.gz").write_bytes(gzip.compress(bytes(80 << 20)))
    with pytest.raises(CorruptCheckpointError, match="expand"):
        load_sae(tmp_path)


def test_a_zip_bomb_is_stopped(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "sae.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("sae/data.pkl", b"\x80\x02}.")
        archive.writestr("sae/data/0", bytes(30 << 20))
    with pytest.raises(CorruptCheckpointError, match="announces more bytes"):
        load_sae(tmp_path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "sae.pt", "w") as archive:
        for content in (b"\x80\x02}.", b"\x80\x02]."):
            archive.writestr("sae/data.pkl", content)
    with pytest.raises(CorruptCheckpointError, match="two entries"):
        load_sae(tmp_path)


def rewritten(source: Path, target: Path, change: Callable[[bytes], bytes]) -> None:
    """Copy a torch archive with its pickle changed and its checksums right."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            is_pickle = entry.filename.endswith("data.pkl")
            new.writestr(entry.filename, change(content) if is_pickle else content)


def test_a_tensor_that_reaches_out_of_its_storage_is_refused(tmp_path: Path) -> None:
    torch.save(patchsae(), tmp_path / "good.pt")
    rewritten(
        tmp_path / "good.pt",
        tmp_path / "bad.pt",
        lambda data: data.replace(b"K\x00K\x04K\x06\x86", b"K\x09K\x04K\x06\x86"),  # offset 9
    )
    with pytest.raises(CorruptCheckpointError, match="reaches element"):
        load_sae(tmp_path / "bad.pt")


def test_a_storage_of_another_size_is_refused(tmp_path: Path) -> None:
    torch.save(patchsae(), tmp_path / "good.pt")
    rewritten(
        tmp_path / "good.pt",
        tmp_path / "bad.pt",
        lambda data: data.replace(b"FloatStorage", b"DoubleStorage"),
    )
    with pytest.raises(CorruptCheckpointError, match="does not hold"):
        load_sae(tmp_path / "bad.pt")


@pytest.mark.parametrize("name", [*CHECKED_FILES, "visaebench-topk-safetensors"])
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_gives_a_named_error(name: str, share: float, tmp_path: Path) -> None:
    file = copy_of(name, tmp_path)
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=file.name):
        load_sae(file)


@pytest.mark.parametrize("name", CHECKED_FILES)
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(share=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_gives_a_named_error_or_the_same_numbers(
    name: str, share: float, bit: int, tmp_path: Path
) -> None:
    """Every byte of weights is under a checksum; what is not (zip dates) changes nothing."""
    file = copy_of(name, tmp_path)
    content = bytearray(file.read_bytes())
    start = content.index(b"\n") + 1 if content.startswith(b"{") else 0  # saev's header has none
    content[start + int(share * (len(content) - start))] ^= 1 << bit
    file.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        assert_same_numbers(load_sae(file), expected(name))


def copy_of(name: str, folder: Path) -> Path:
    target = folder / name
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(DATA / name, target, ignore=shutil.ignore_patterns("expected*", "about*"))
    weights = [file for file in target.iterdir() if not file.name.startswith("config")]
    assert len(weights) == 1
    return weights[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_a_value_that_is_not_finite_is_named(name: str, value: float, tmp_path: Path) -> None:
    content = patchsae()
    content["state_dict"][name].view(-1)[2] = value
    torch.save(content, tmp_path / "sae.pt")
    with pytest.raises(CorruptCheckpointError, match=f"{name} holds 1 values that are NaN"):
        load_sae(tmp_path / "sae.pt")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"W_enc": torch.zeros(6, 4)}, r"b_enc has shape \(6,\).*must be \(4,\)"),
        ({"W_dec": torch.zeros(4, 6)}, r"W_dec has shape \(4, 6\).*must be \(6, 4\)"),
        ({"b_dec": torch.zeros(6)}, r"b_dec has shape \(6,\)"),
        ({"b_enc": torch.zeros(())}, r"b_enc has shape \(\)"),
        ({"W_enc": torch.zeros(0, 0)}, r"encoder has shape \(0, 0\)"),
        ({"W_enc": torch.zeros(24)}, r"encoder has shape \(24,\)"),
        ({"b_enc": torch.zeros(6, dtype=torch.int64)}, r"b_enc.* holds torch\.int64"),
        ({"r_mag": torch.zeros(6)}, r"also holds \['r_mag'\]"),
        ({"__class__": torch.zeros(6)}, r"also holds \['__class__'\]"),
        ({"../../../etc/passwd": torch.zeros(6)}, r"also holds"),
    ],
)
def test_wrong_shapes_and_hostile_keys_are_named(
    changes: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    torch.save(patchsae(**changes), tmp_path / "sae.pt")
    with pytest.raises(CheckpointError, match=message):
        load_sae(tmp_path / "sae.pt")


@pytest.mark.parametrize(
    "content",
    [
        {},
        [],
        torch.zeros(3),
        {"state_dict": {}},
        {"state_dict": [1]},
        {"state_dict": {1: torch.zeros(2)}},
        {"state_dict": {"W_enc": "text"}},
        {"W_enc": torch.zeros(4, 6)},
        {"cfg": {"block_layer": 1, "module_name": "resid"}, "state_dict": {"W_enc": torch.ones(2)}},
    ],
)
def test_a_file_that_is_no_sae_gives_a_named_error(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "sae.pt")
    with pytest.raises(CheckpointError, match=r"sae\.pt"):
        load_sae(tmp_path / "sae.pt")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{" + " " * (2 << 20) + "}", "above the limit"),
        ('{"activation": "topk", "k": 8, "k": 9}', "twice"),
        ("[" * 100_000, "nested more than 64 deep"),
        ("[]", "not an object"),
        ('{"activation": "topk", "k": "8"}', "'k' = '8'"),
        ('{"activation": "topk", "k": 0}', "k is 0"),
        ('{"activation": "topk", "k": 97}', "k is 97"),
        ('{"activation": "topk", "k": true}', "'k' = True"),
        ('{"activation": "topk"}', "whole number"),
        ('{"activation": ["topk"], "k": 8}', "activation"),
        ('{"activation": "softmax", "k": 8}', "softmax"),
        ('{"activation": "batchtopk", "threshold": "high"}', "threshold"),
        ('{"activation": "batchtopk", "threshold": NaN}', "NaN"),
        ('{"activation": "topk", "k": 8, "input_dim": 33}', "d_in=33"),
        ('{"activation": "topk", "k": 8, "dict_size": 95}', "d_sae=95"),
    ],
)
def test_a_hostile_config_gives_a_named_error(config: str, message: str, tmp_path: Path) -> None:
    file = copy_of("visaebench-topk", tmp_path)
    (file.parent / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=message):
        load_sae(file.parent)


@pytest.mark.parametrize("change", [{"d_sae": 97}, {"d_in": 31}, {"architecture": "none such"}])
def test_a_native_folder_that_contradicts_itself_gives_a_named_error(
    change: dict[str, Any], tmp_path: Path
) -> None:
    sae = load_sae(DATA / "visaebench-topk")
    sae.save_model(tmp_path)
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(config | change))
    with pytest.raises(CorruptCheckpointError, match=str(tmp_path)):
        load_sae(tmp_path)


def test_a_native_folder_with_nan_weights_gives_a_named_error(tmp_path: Path) -> None:
    sae = load_sae(DATA / "visaebench-topk")
    sae.save_model(tmp_path)
    state = sae.state_dict() | {"b_dec": torch.full((32,), torch.nan)}
    save_file(state, tmp_path / "sae_weights.safetensors")
    with pytest.raises(CorruptCheckpointError, match="b_dec holds 32 values that are NaN"):
        load_sae(tmp_path)


def test_what_cannot_be_told_apart_is_not_guessed(tmp_path: Path) -> None:
    torch.save(state_dict(), tmp_path / "weights.pt")
    with pytest.raises(UnknownFormatError, match="which project wrote it"):
        load_sae(tmp_path)
    torch.save(state_dict(), tmp_path / "sae.pt")
    with pytest.raises(UnknownFormatError, match="several weights files"):
        load_sae(tmp_path)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no weights file"):
        load_sae(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither a file, a folder, a release"):
        load_sae("no-such-release")
    with pytest.raises(RefusedCheckpointError, match="leads out of"):
        load_sae(tmp_path, "../elsewhere")


def test_a_set_of_either_kind_reads_as_a_list(tmp_path: Path) -> None:
    """``torch.save`` names them after Python 2's module."""
    content = patchsae()
    content["cfg"]["layers"], content["cfg"]["heads"] = frozenset({1}), {2}
    write_torch(content, tmp_path / "sae.pt")
    assert load_sae(tmp_path / "sae.pt").cfg.d_in == 4


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint at .*/sub/none"):
        disk_converter()(tmp_path / "sub" / "none")
