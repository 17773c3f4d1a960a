"""Hostile checkpoints of other projects: their weights, and the configurations beside them."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.faults._corpus import _pickles as pickles
from tests.faults._corpus import _readers as readers
from tests.faults._corpus import _samples as samples
from tests.faults._corpus._case import Make, Rule
from tests.faults._corpus._mutate import BYTES, as_json, edited, json_bomb, places, value
from tests.faults._corpus._yaml import yaml_bomb

WEIGHTS = (".pt", ".pth", ".gz", ".safetensors")
ZIPPED = tuple(
    name
    for name in samples.names_of(*WEIGHTS)
    if "pklgz" not in name and "safetensors" not in name and "checkpointdir" not in name
)


def damaged(how: str, folder: Path, rng: random.Random) -> Path:
    """A real checkpoint with damaged bytes."""
    files = dict(samples.foreign(rng.choice(samples.names_of(*WEIGHTS))))
    hit = rng.choice([name for name in files if name.endswith(WEIGHTS) and "log" not in name])
    files[hit] = BYTES[how](files[hit], rng)
    return samples.put(files, folder) / hit


def damaged_legacy(folder: Path, rng: random.Random) -> Path:
    """A file in torch's old format with damaged bytes."""
    stream = io.BytesIO()
    torch.save(content(), stream, _use_new_zipfile_serialization=False)
    data = rng.choice(tuple(BYTES.values()))(stream.getvalue(), rng)
    return samples.put({"sae.pt": data}, folder) / "sae.pt"


def damaged_inside(folder: Path, rng: random.Random) -> Path:
    """A damaged pickle in a sound archive."""
    return pickles.inside(samples.foreign(rng.choice(ZIPPED)), folder, rng)


def content() -> dict[str, Any]:
    """What some projects save: a configuration, and tensors by name."""
    torch.manual_seed(0)
    weights = {"W_enc": (4, 6), "b_enc": (6,), "W_dec": (6, 4), "b_dec": (4,)}
    return {
        "cfg": {
            "d_in": 4,
            "d_sae": 6,
            "hook_point": "blocks.1.hook_resid_post",
            "hook_point_layer": 1,
            "block_layer": 1,
            "module_name": "resid",
            "gated_sae": False,
            "architecture": "standard",
            "activation_fn_str": "relu",
            "activation_fn_kwargs": {},
            "normalize_activations": "none",
            "expansion_factor": 2,
            "l1_coefficient": 0.1,
            "model_name": "openai/clip-vit-base-patch32",
            "dtype": "torch.float32",
        },
        "state_dict": OrderedDict((name, torch.randn(shape)) for name, shape in weights.items()),
    }


def tensor(rng: random.Random) -> Any:
    """A tensor of a type, shape or content that no SAE has."""
    shape = rng.choice(((4, 6), (6, 4), (6,), (4,), (), (0,), (0, 0), (1, 1), (2, 3, 4), (4, 0)))
    kinds = [getattr(torch, name) for name in DTYPES if hasattr(torch, name)]
    made: torch.Tensor = torch.ones(shape).to(rng.choice(kinds))
    how = rng.random()
    if how < 0.2:
        made = torch.full(shape, rng.choice((float("nan"), float("inf"), 3e38, 1e-45)))
    elif how < 0.25:
        made = torch.ones(4, 6).to_sparse()
    elif how < 0.3:
        made = torch.ones(1).expand(50_000, 50_000)
    return made


DTYPES = (
    *("int8", "uint8", "int16", "int32", "int64", "bool", "float16", "bfloat16", "float64"),
    *("complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu", "uint16"),
)


def retyped(folder: Path, rng: random.Random) -> Path:
    """A checkpoint that holds the wrong things, saved by torch or as a plain pickle."""
    made = content()
    where = rng.choice(("cfg", "state_dict", "both", "all"))
    if where in ("cfg", "both"):
        made["cfg"] = edited(made["cfg"], rng, times=rng.choice((1, 1, 3)))
    if where in ("state_dict", "both"):
        weights = made["state_dict"]
        name = rng.choice((*weights, "threshold", "log_threshold", "r_mag", "b_gate", "scale", ""))
        weights[name] = tensor(rng) if rng.random() < 0.8 else value(rng)
        if rng.random() < 0.3:
            weights[rng.choice((1, None, ("a", 1), "encoder.weight", "../x"))] = tensor(rng)
        if rng.random() < 0.3:
            del weights[rng.choice(list(weights))]
    if where == "all":
        made = rng.choice((value(rng), made["state_dict"], [made], {"state_dict": value(rng)}))
    if rng.random() < 0.2:
        path = folder / "sae.pkl.gz"
        path.write_bytes(gzip.compress(pickle.dumps(made), mtime=0))
    else:
        path = folder / rng.choice(("sae.pt", "ae.pt", "state_dict.pth", "n_images_5.pt"))
        torch.save(made, path)
    return path


def beside(how: str, folder: Path, rng: random.Random) -> Path:
    """A sound checkpoint beside a hostile ``config.json`` or ``config.yaml``."""
    suffixes = (".yaml",) if how.startswith("yaml") else (".json",)
    files = dict(samples.foreign(rng.choice(samples.names_of(*suffixes))))
    (name,) = [name for name in files if name.endswith(suffixes)]
    valid = files.pop(name)
    if how == "edited":
        files[name] = as_json(edited(json.loads(valid), rng, times=rng.choice((1, 1, 2, 4))))
    elif how == "bombs":
        files[name] = json_bomb(valid, rng)
    elif how == "yaml bombs":
        files[name] = yaml_bomb(valid, rng)
    else:
        files[name] = rng.choice(tuple(BYTES.values()))(valid, rng)
    return samples.put(files, folder)


def header(folder: Path, rng: random.Random) -> Path:
    """A saev file whose first line lies."""
    files = dict(samples.foreign(rng.choice(samples.names_of("sae.pt"))))
    data = files["sae.pt"]
    line, _, rest = data.partition(b"\n") if data.startswith(b"{") else (b'{"d_vit": 4}', b"", data)
    how = rng.random()
    if how < 0.6:
        line = as_json(edited(json.loads(line), rng, times=rng.choice((1, 2))))
    elif how < 0.8:
        line = json_bomb(line, rng)
    else:
        line = rng.choice(tuple(BYTES.values()))(line, rng)
    files["sae.pt"] = line + b"\n" + rest
    return samples.put(files, folder) / "sae.pt"


def native(how: str, folder: Path, rng: random.Random) -> Path:
    """An SAE in SAELens's format whose configuration or weights are hostile."""
    files = dict(samples.native(rng.choice(samples.NATIVE)))
    config, weights = "cfg.json", "sae_weights.safetensors"
    if how == "settings":
        files[config] = as_json(edited(json.loads(files[config]), rng, times=rng.choice((1, 1, 3))))
    elif how == "architecture":
        tree = json.loads(files[config])
        tree[rng.choice(("architecture", "dtype", "device", "activation_fn"))] = rng.choice(NAMES)
        files[config] = as_json(tree)
    elif how == "bombs":
        files[config] = json_bomb(files[config], rng)
    elif how == "config bytes":
        files[config] = rng.choice(tuple(BYTES.values()))(files[config], rng)
    elif how == "weights bytes":
        files[weights] = rng.choice(tuple(BYTES.values()))(files[weights], rng)
    elif how == "header":
        files[weights] = safetensors_header(files[weights], rng)
    else:
        files[weights] = wrong_tensors(files[weights], rng)
    return samples.put(files, folder)


NAMES = (
    *("standard", "topk", "jumprelu", "gated", "transcoder", "skip_transcoder", "matching_pursuit"),
    *(
        "crosscoder",
        "temporal",
        "clt",
        "vision_plugin_batchtopk",
        "batchtopk",
        "",
        "nosuch",
        None,
        7,
    ),
    *(
        "float33",
        "torch.int8",
        "int8",
        "float8_e4m3fn",
        "torch.complex64",
        "cuda:99",
        "meta",
        "mps",
    ),
    *("nosuch:0", ["relu"], {"a": 1}, "tanh-relu", "bool", "float16", "torch.float16", "os.system"),
)


def wrong_tensors(data: bytes, rng: random.Random) -> bytes:
    """Weights of another type, shape, name or content."""
    from safetensors.torch import load, save

    tensors = load(data)
    for _ in range(rng.choice((1, 1, 3))):
        made = tensor(rng)
        if made.is_sparse or made.numel() > 10_000 or made.dtype == torch.complex128:
            made = torch.ones(3)
        tensors[rng.choice((*tensors, "threshold", "extra", "W_skip", "b_mag"))] = made.contiguous()
    if rng.random() < 0.3:
        kinds = [name for name in DTYPES if hasattr(torch, name) and name != "complex128"]
        kind = getattr(torch, rng.choice(kinds))
        tensors = {name: one.to(kind) for name, one in tensors.items()}
    if rng.random() < 0.2:
        del tensors[rng.choice(list(tensors))]
    return save(tensors, rng.choice((None, {"format": "pt"}, {"a": "x" * 100_000})))


def safetensors_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose header lies about types, shapes, places or its own length."""
    length = int.from_bytes(data[:8], "little")
    tree, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    how = rng.random()
    if how < 0.5:
        head = as_json(edited(tree, rng, times=rng.choice((1, 1, 3))))
    elif how < 0.7:
        path = rng.choice([p for p in places(tree) if p[-1] in ("dtype", "shape", "data_offsets")])
        entry = tree[path[0]]
        entry["dtype"] = rng.choice(("F8_E4M3", "C64", "BOOL", "U64", "F4", "f32", "I8", "BF16"))
        entry["shape"] = rng.choice(([2**32, 2**32], [0], [-1, 4], [1] * 100, [2**62], [], [4, 6]))
        entry["data_offsets"] = rng.choice(([0, 4], [0, 2**62], [8, 0], [0, len(body)], [-4, 0]))
        head = as_json(tree)
    elif how < 0.85:
        head = json_bomb(as_json(tree), rng)
    else:
        huge = rng.choice((2**62, 2**64 - 1, 99_000_000, 2**31, len(data), 0, 1))
        return huge.to_bytes(8, "little") + data[8:]
    return len(head).to_bytes(8, "little") + head + body


def loose_safetensors(folder: Path, rng: random.Random) -> Path:
    """Another project's safetensors file with a hostile header."""
    files = dict(samples.foreign("visaebench-topk-safetensors"))
    files["model.safetensors"] = safetensors_header(files["model.safetensors"], rng)
    return samples.put(files, folder)


def _rule(kind: str, name: str, count: int, make: Make) -> Rule:
    return Rule(kind, name, count, make, readers.sae)


RULES = (
    *(_rule("checkpoint", how, 200, partial(damaged, how)) for how in BYTES),
    *(_rule("checkpoint", name, n, make) for name, (n, make) in pickles.MADE.items()),
    _rule("checkpoint", "old format damaged", 150, damaged_legacy),
    _rule("checkpoint", "pickle damaged in a sound archive", 700, damaged_inside),
    _rule("checkpoint", "wrong content", 700, retyped),
    _rule("checkpoint", "first line", 200, header),
    _rule("config", "JSON edited", 500, partial(beside, "edited")),
    _rule("config", "JSON bombs", 100, partial(beside, "bombs")),
    _rule("config", "JSON damaged", 150, partial(beside, "bytes")),
    _rule("config", "YAML bombs", 200, partial(beside, "yaml bombs")),
    _rule("config", "YAML damaged", 100, partial(beside, "yaml bytes")),
    _rule("native SAE", "settings edited", 700, partial(native, "settings")),
    _rule("native SAE", "architecture, type, device", 250, partial(native, "architecture")),
    _rule("native SAE", "JSON bombs", 80, partial(native, "bombs")),
    _rule("native SAE", "JSON damaged", 120, partial(native, "config bytes")),
    _rule("native SAE", "wrong tensors", 350, partial(native, "tensors")),
    _rule("safetensors", "bytes damaged", 300, partial(native, "weights bytes")),
    _rule("safetensors", "header edited", 400, partial(native, "header")),
    _rule("safetensors", "header of another project's file", 150, loose_safetensors),
)
