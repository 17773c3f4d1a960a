"""Checkpoints that ask for endless work: each is refused in one sentence, and soon."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from tests._cost import cost_of
from tests.formats.test_attacks import copy_of, patchsae, rewritten
from tests.formats.test_samples import DATA, assert_same_numbers, expected
from vision_plugin.formats import CheckpointError, CorruptCheckpointError, load_sae

START = b"\x80\x02"
BIG = 1_000_000


def refused(path: Path, *words: str) -> None:
    """Loading costs little, and ends in one printable sentence that names the file."""
    cost = cost_of(lambda: load_sae(path))
    assert cost.is_small, cost
    kind, _, message = cost.error.partition(": ")
    assert kind.endswith("CheckpointError"), cost.error
    assert message.startswith(f"Cannot load {path}: "), cost.error
    assert path.name in cost.error
    assert cost.error.isprintable()
    assert len(cost.error) < 1000
    for word in words:
        assert word in cost.error


def doubled(depth: int, *, kind: bytes = b"\x86") -> bytes:
    """A tuple of two references to a tuple of two references, and so on: 2^depth leaves."""
    stream = b"K\x01q\x000"
    for level in range(depth):
        at = bytes([level])
        stream += b"h" + at + b"h" + at + kind + b"q" + bytes([level + 1]) + b"0"
    return stream + b"h" + bytes([depth])


def name(text: str) -> bytes:
    """A text of the pickle."""
    return b"X" + struct.pack("<I", len(text)) + text.encode()


def integer(value: int) -> bytes:
    """A whole number of the pickle, of less than 256 bytes."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little")
    return b"\x8a" + bytes([len(data)]) + data


DOUBLED = doubled(60)
CONFIG = b"ccfg\nConfig\n)\x81"
PICKLES = {
    "a key of shared tuples": b"}" + DOUBLED + b"K\x02s.",
    "a key of an ordered dict": (b"ccollections\nOrderedDict\n]" + DOUBLED + b"K\x02\x86a\x85R."),
    "an element of a set": b"\x8f(" + DOUBLED + b"\x90.",
    "a frozen set": b"(" + DOUBLED + b"\x91.",
    "a dict of marks": b"(" + DOUBLED + b"K\x01d.",
    "a name in a config": CONFIG + b"(" + DOUBLED + b"K\x01u.",
    "state of a config": CONFIG + b"}(" + DOUBLED + b"K\x01ub.",
    "a place of a storage": b"(" + DOUBLED + b"tQ.",
    "a size of a tensor": (
        b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01" + DOUBLED + b"K\x01K\x01tR."
    ),
    "parts of a device": b"ctorch\ndevice\n" + DOUBLED + b"\x85R.",
    "a state dict's name": b"}(" + name("state_dict") + b"}" + DOUBLED + b"K\x01su.",
    "a setting": (
        b"}("
        + name("cfg")
        + b"}("
        + name("block_layer")
        + DOUBLED
        + name("module_name")
        + name("resid")
        + b"u"
        + name("state_dict")
        + b"}K\x01K\x01su."
    ),
    "a call of tuples": DOUBLED + b")R.",
    "a deep tuple": b")" + b"\x85" * (15 * BIG) + b".",
    "many marks": b"(" * (5 * BIG) + b".",
    "many numbers": b"K\x01" * (5 * BIG) + b".",
    "many copies of a list": b"("
    + b"K\x01" * 100_000
    + b"lq\x00"
    + (b"cbuiltins\nset\nq\x01" + b"h\x01h\x00\x85R" * 20_000)
    + b".",
    "many updates of a config": (
        CONFIG
        + b"q\x00}("
        + b"".join(name(f"{i:05}") + b"K\x01" for i in range(50_000))
        + b"uq\x01"
        + b"h\x00h\x01b" * 20_000
        + b"."
    ),
    "many names of a million letters": (
        b"c" + b"a" * BIG + b"\nb\nq\x00" + b"h\x00)\x81" * 20_000 + b"."
    ),
    "many storages with a name of a million letters": (
        name("storage")
        + b"q\x00ctorch\nFloatStorage\nq\x01"
        + name("a" * BIG)
        + b"q\x02"
        + b"(h\x00h\x01h\x02NK\x01tQ" * 20_000
        + b"."
    ),
    "texts of a million letters as keys": (
        name("a" * BIG) + b"q\x00" + name("a" * BIG) + b"q\x01}" + b"h\x00Nsh\x01Ns" * 20_000 + b"."
    ),
    "numbers of a million digits as keys": (
        b"\x8b"
        + struct.pack("<i", 8 * BIG)
        + b"\x01" * (8 * BIG)
        + b"q\x00}"
        + b"h\x00Ns" * 20_000
        + b"."
    ),
    "numbers with one hash as keys": (
        b"}" + b"".join(integer(i * (2**61 - 1)) + b"Ns" for i in range(60_000)) + b"."
    ),
    "memory with one hash": (
        b"N" + b"".join(b"p%d\n" % (i * (2**61 - 1)) for i in range(60_000)) + b"."
    ),
    "a text of a number without end": b"I0x" + b"f" * (2 * BIG) + b"\n.",
    "a text of a number": b"I" + b"9" * BIG + b"\n.",
}


@pytest.mark.parametrize("stream", PICKLES.values(), ids=PICKLES.keys())
def test_work_is_bounded_by_the_pickles_size(stream: bytes, tmp_path: Path) -> None:
    (tmp_path / "sae.pt").write_bytes(START + stream)
    refused(tmp_path / "sae.pt")


@pytest.mark.parametrize("what", ["a deep tuple", "many marks"])
def test_nor_is_it_where_the_pickle_is_compressed(what: str, tmp_path: Path) -> None:
    stream = (START + PICKLES[what]).ljust(60 * BIG, b"(")
    (tmp_path / "sae.pkl.gz").write_bytes(gzip.compress(stream, 9))
    assert (tmp_path / "sae.pkl.gz").stat().st_size < 100_000
    refused(tmp_path / "sae.pkl.gz")
    with zipfile.ZipFile(tmp_path / "sae.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("sae/data.pkl", stream)
    refused(tmp_path / "sae.pt")


def test_a_compressed_archive_is_refused_whatever_it_says_of_its_size(tmp_path: Path) -> None:
    """LZMA hands out all of its content at once, however little is asked for."""
    with zipfile.ZipFile(tmp_path / "sae.pt", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("sae/data.pkl", bytes(1 << 25))
    content = (tmp_path / "sae.pt").read_bytes().replace(struct.pack("<I", 1 << 25), b"\x09\0\0\0")
    (tmp_path / "sae.pt").write_bytes(content)
    refused(tmp_path / "sae.pt", "compressed")


def test_an_archive_of_a_million_entries_is_refused_before_they_are_listed(tmp_path: Path) -> None:
    entry = b"PK\x01\x02" + bytes(42)
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 46 * BIG, 4, 0)
    (tmp_path / "sae.pt").write_bytes(b"PK\x03\x04" + entry * BIG + end)
    refused(tmp_path / "sae.pt", "too many entries")


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31, 2**31), (3, 10)])
def test_a_tensor_larger_than_its_storage_is_refused(size: tuple[int, int], tmp_path: Path) -> None:
    content = patchsae()
    content["state_dict"]["W_enc"] = torch.zeros(4, 6)
    torch.save(content, tmp_path / "good.pt")
    stride = pickle.dumps((0, 0), protocol=2)[2:-1].replace(b"q\x00", b"")
    shape = b"".join(integer(n) for n in size) + b"\x86"
    rewritten(
        tmp_path / "good.pt",
        tmp_path / "bad.pt",
        lambda data: data.replace(b"K\x04K\x06\x86", shape, 1).replace(
            b"K\x06K\x01\x86", stride, 1
        ),
    )
    refused(tmp_path / "bad.pt", "its storage holds 24")


@pytest.mark.parametrize(
    ("sample", "tensors"),
    [
        ("overcomplete-topk-mult", {"dictionary.multiplier": (60_000,)}),
        ("overcomplete-topk-mult", {"dictionary.multiplier": (1, 60_000)}),
        ("overcomplete-topk-bn", {"encoder.final_block.1.running_var": (60_000, 1)}),
        ("dl-standard", {"encoder.weight": (1, 60_000), "decoder.weight": (1, 60_000)}),
        ("dl-standard", {"decoder.weight": (2, 60_000), "encoder.weight": (1, 60_000)}),
        ("visaebench-oc-topk", {"dictionary.multiplier": (60_000,)}),
    ],
)
def test_tensors_do_not_broadcast_to_any_size(
    sample: str, tensors: dict[str, tuple[int, ...]], tmp_path: Path
) -> None:
    file = copy_of(sample, tmp_path)
    content = torch.load(file, weights_only=True)
    for key, shape in tensors.items():
        assert key in content
        content[key] = torch.ones(shape)
    torch.save(content, file)
    cost = cost_of(lambda: load_sae(file, activation="topk", k=1))
    assert cost.is_small, cost
    assert "has shape" in cost.error


def yaml_bomb(width: int, depth: int) -> str:
    lines = ["a0: &a0 [1]"]
    lines += [f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * width)}]" for i in range(depth)]
    return "\n".join(lines)


CONFIGS = {
    "aliases of aliases": yaml_bomb(9, 12),
    "two aliases, 40 deep": yaml_bomb(2, 40),
    "a long list of a long list": yaml_bomb(2_000, 3),
    "an alias of itself": "a: &a [*a]",
    "merged merges": "a0: &a0 {x0: 1}\n"
    + "\n".join(f"a{i}: &a{i} {{x{i}: 1, <<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 40)),
    "a number of base 60": "k: 1" + ":59" * 20_000,
    "a hexadecimal number": "k: 0x" + "f" * 60_000,
    "many brackets": "k: " + "[" * 60_000,
    "nothing but brackets": "[" * 6_000,
    "many dashes": "- " * 30_000,
    "many short values": "[" + "1," * 30_000 + "]",
    "a megabyte": "k: 1\n" + "#" * 1_000_000,
}


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS.keys())
def test_yaml_is_read_in_bounded_time(text: str, tmp_path: Path) -> None:
    file = copy_of("visaebench-oc-topk", tmp_path)
    (file.parent / "config.yaml").write_text(text)
    cost = cost_of(lambda: load_sae(file))
    assert cost.is_small, cost
    assert cost.error.startswith("CorruptCheckpointError: "), cost.error
    assert "config.yaml" in cost.error
    assert cost.error.isprintable()


def test_yaml_as_people_write_it_is_read(tmp_path: Path) -> None:
    """An alias for a list, as `yaml.dump` writes one that is used twice, is no attack."""
    file = copy_of("visaebench-oc-topk", tmp_path)
    written = (file.parent / "config.yaml").read_text()
    more = "betas: &id001 [0.9, 0.999]\nbetas_again: *id001\nlr: 3e-4\nat: 2026-01-01\n"
    (file.parent / "config.yaml").write_text(written + "\n" + more)
    assert_same_numbers(load_sae(file), expected("visaebench-oc-topk"))


@pytest.mark.parametrize("config", ["9" * 4_000, "9" * 100_000, "1e999", "[" * 70 + "]" * 70])
def test_a_huge_value_in_json_is_refused(config: str, tmp_path: Path) -> None:
    file = copy_of("visaebench-batchtopk", tmp_path)
    content = json.loads((file.parent / "config.json").read_text()) | {"threshold": "HERE"}
    text = json.dumps(content).replace('"HERE"', config)
    (file.parent / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json|threshold"):
        load_sae(file)


@pytest.mark.parametrize("schema", [True, 1.0, "1", None, [1], 10**400])
def test_a_schema_that_is_no_whole_number_is_refused(schema: object, tmp_path: Path) -> None:
    file = copy_of("saev-legacy-s1-relu", tmp_path)
    line, _, archive = file.read_bytes().partition(b"\n")
    header = json.loads(line) | {"schema": schema}
    file.write_bytes(json.dumps(header).encode() + b"\n" + archive)
    with pytest.raises(CheckpointError, match="its schema is"):
        load_sae(file)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def memory(path: Path) -> None:
    path.symlink_to("/proc/self/mem")


def circle(path: Path) -> None:
    path.symlink_to(path.name)


def huge(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(1 << 42)


MADE = [pipe, device, memory, circle, huge, Path.mkdir]


@pytest.mark.parametrize("make", MADE, ids=lambda made: made.__name__)
@pytest.mark.parametrize(
    ("sample", "file", "opened"),
    [
        ("patchsae-relu-pt", "sae.pt", "the file"),
        ("patchsae-relu-pt", "sae.pt", "the folder"),
        ("visaebench-topk", "config.json", "the folder"),
        ("visaebench-oc-topk", "config.yaml", "the folder"),
        ("native", "cfg.json", "the folder"),
        ("native", "sae_weights.safetensors", "the folder"),
    ],
)
def test_only_regular_files_are_read(
    make: Callable[[Path], None], sample: str, file: str, opened: str, tmp_path: Path
) -> None:
    folder = tmp_path / "sae"
    if sample == "native":
        load_sae(DATA / "visaebench-topk").save_model(folder)
    else:
        folder = copy_of(sample, tmp_path).parent
    (folder / file).unlink()
    make(folder / file)
    cost = cost_of(lambda: load_sae(folder if opened == "the folder" else folder / file))
    assert cost.is_small, cost
    assert file in cost.error
    kinds = ("CorruptCheckpointError: ", "OSError: ", "FileNotFoundError: ", "ValueError: ")
    assert cost.error.startswith(kinds)


def test_a_gzip_with_padding_is_refused_at_once(tmp_path: Path) -> None:
    """Python's reader takes a second for each ten megabytes of zeros after the content."""
    with (tmp_path / "sae.pkl.gz").open("wb") as stream:
        stream.write(gzip.compress(START + b"N."))
        stream.truncate(1 << 30)
    refused(tmp_path / "sae.pkl.gz", "follows the end")


def test_a_long_header_of_safetensors_is_refused(tmp_path: Path) -> None:
    names = {f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(50_000)}
    head = json.dumps(names).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head)
    refused(tmp_path / "model.safetensors", "header announces")


@pytest.mark.parametrize("n_bytes", [-1, 1, 1 << 30])
def test_safetensors_whose_header_disagrees_with_its_size_are_refused(
    n_bytes: int, tmp_path: Path
) -> None:
    file = copy_of("visaebench-topk-safetensors", tmp_path)
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size + n_bytes)
    refused(file, "its header announces 25088 bytes of numbers", f"but there are {25088 + n_bytes}")


def test_a_file_of_torch_before_1_6_is_read_like_any_other(tmp_path: Path) -> None:
    content = patchsae()
    torch.save(content, tmp_path / "sae.pt", _use_new_zipfile_serialization=False)
    sae = load_sae(tmp_path / "sae.pt")
    for key, value in content["state_dict"].items():
        assert torch.equal(sae.state_dict()[key], value)
    # Storages that two tensors share, and of other types, are as torch reads them.
    shared = torch.arange(24, dtype=torch.float64)
    content["state_dict"] |= {"W_enc": shared.view(4, 6), "W_dec": shared.view(4, 6).T}
    content["state_dict"]["b_enc"] = torch.randn(6).to(torch.bfloat16)
    torch.save(content, tmp_path / "sae.pt", _use_new_zipfile_serialization=False)
    sae = load_sae(tmp_path / "sae.pt")
    for key, value in content["state_dict"].items():
        assert torch.equal(sae.state_dict()[key], value.double())


def test_a_truncated_file_of_torch_before_1_6_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save(patchsae(), stream, _use_new_zipfile_serialization=False)
    content = stream.getvalue()
    assert len(content) > 1_000
    for end in range(0, len(content), 13):
        (tmp_path / "sae.pt").write_bytes(content[:end])
        with pytest.raises(CorruptCheckpointError, match=r"sae\.pt"):
            load_sae(tmp_path / "sae.pt")


def native(folder: Path) -> Path:
    """An SAE's folder as SAELens writes it."""
    load_sae(DATA / "visaebench-topk").save_model(folder)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metadata": []}, "its metadata is a list of 0"),
        ({"metadata": None}, "its metadata is None"),
        ({"metadata": "x"}, "its metadata is 'x'"),
        ({"metadata": {"get": 1}}, "a value called 'get'"),
        ({"metadata": {"__class__": 1}}, "a value called '__class__'"),
        ({"metadata": {"self": 1}}, "a value called 'self'"),
        ({"metadata": {"hook_name": 5, "sae_lens_version": "6.0.0"}}, "hook_name = 5"),
        ({"metadata": {"model_name": ["x"], "sae_lens_version": "6.0.0"}}, "model_name = a list"),
        ({"metadata": {"tokens": {}, "sae_lens_version": "6.0.0"}}, "tokens = a dict of 0"),
        ({"metadata": {"sae_lens_version": 6}}, "sae_lens_version = 6"),
        ({"metadata": {"sae_lens_version": "six"}}, "Invalid version"),
        ({"architecture": "nosuch"}, r"its architecture is 'nosuch'; SAELens has .*'topk'"),
        ({"architecture": 3}, "its architecture is 3"),
        ({"architecture": ["topk"]}, "its architecture is a list of 1"),
        ({"architecture": "temporal", "n_attn_layers": 10**9}, "1000000000 layers"),
        ({"d_in": "32"}, "d_in"),
        ({"d_in": True}, "d_in"),
        ({"d_in": 32.0}, "d_in"),
        ({"d_in": -32}, "d_in"),
        ({"d_in": 0}, "d_in=0"),
        ({"d_sae": 10**12}, "W_enc has the shape"),
        ({"d_sae": 10**300}, "d_sae"),
        ({"k": 0}, "k is 0"),
        ({"k": 10**6}, "k is 1000000"),
        ({"k": "8"}, "k = '8'"),
        ({"k": True}, "k = True"),
        ({"dtype": "float33"}, "float33"),
        ({"dtype": 32}, "dtype = 32"),
        ({"apply_b_dec_to_input": "no"}, "apply_b_dec_to_input = 'no'"),
        ({"normalize_activations": "twice"}, "normalize_activations"),
        ({"x": "[" * 70 + "]" * 70}, "deep"),
    ],
)
def test_a_native_configuration_of_the_wrong_kind_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = native(tmp_path / "sae") / "cfg.json"
    text = json.dumps(json.loads(path.read_text()) | change)
    path.write_text(text.replace('"[[', "[[").replace(']]"', "]]"))
    with pytest.raises(CorruptCheckpointError, match=message) as caught:
        load_sae(tmp_path / "sae")
    assert str(tmp_path / "sae") in str(caught.value)


def test_the_k_of_a_configuration_without_one_fits_too(tmp_path: Path) -> None:
    path = native(tmp_path / "sae") / "cfg.json"
    config = json.loads(path.read_text())
    del config["k"]
    path.write_text(json.dumps(config))
    with pytest.raises(CorruptCheckpointError, match=r"k is 100; expected 1 to d_sae=96"):
        load_sae(tmp_path / "sae")


@pytest.mark.parametrize(
    "dtype",
    [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2],
)
@pytest.mark.parametrize("layout", ["native", "foreign"])
def test_weights_that_are_no_floats_are_refused(
    dtype: torch.dtype, layout: str, tmp_path: Path
) -> None:
    if layout == "native":
        file = native(tmp_path / "sae") / "sae_weights.safetensors"
        state = load_sae(DATA / "visaebench-topk").state_dict()
    else:
        file = copy_of("visaebench-topk-safetensors", tmp_path)
        from safetensors.torch import load_file

        state = load_file(file)
    key = sorted(state)[0]
    state[key] = state[key].to(dtype)
    file.write_bytes(save(state))
    with pytest.raises(CorruptCheckpointError, match=f"holds {dtype}, not floating point"):
        load_sae(file.parent)


@pytest.mark.parametrize("shape", [(0,), (0, 32), (96, 0), (31,), (1, 32), ()])
@pytest.mark.parametrize("key", ["W_enc", "W_dec", "b_dec", "b_enc"])
def test_native_weights_of_other_shapes_are_refused(
    shape: tuple[int, ...], key: str, tmp_path: Path
) -> None:
    file = native(tmp_path / "sae") / "sae_weights.safetensors"
    state = load_sae(tmp_path / "sae").state_dict()
    file.write_bytes(save(state | {key: torch.ones(shape)}))
    with pytest.raises(CorruptCheckpointError, match=key):
        load_sae(tmp_path / "sae")
