"""Valid inputs, made once a process, from which the hostile ones are made."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

FOREIGN = Path(__file__).parents[2] / "formats" / "data"
"""Checkpoints of other projects."""


@cache
def foreign(name: str) -> dict[str, bytes]:
    """Return the files of another project's checkpoint."""
    return {
        path.name: path.read_bytes()
        for path in sorted((FOREIGN / name).iterdir())
        if not path.name.startswith(("expected", "about"))
    }


def names_of(*suffixes: str) -> list[str]:
    """Return the checkpoints of other projects that hold a file with one of these suffixes."""
    return [
        folder.name
        for folder in sorted(FOREIGN.iterdir())
        if folder.is_dir() and any(name.endswith(suffixes) for name in foreign(folder.name))
    ]


def put(files: dict[str, bytes], folder: Path) -> Path:
    """Write files into a folder, and return it."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


@cache
def native(architecture: str) -> dict[str, bytes]:
    """Return the files of an SAE that SAELens saved."""
    import sae_lens

    from vision_plugin.formats import load_sae

    shape: dict[str, Any] = {"d_in": 4, "d_sae": 6}
    made = {
        "standard": lambda: sae_lens.StandardSAE(sae_lens.StandardSAEConfig(**shape)),
        "topk": lambda: sae_lens.TopKSAE(sae_lens.TopKSAEConfig(**shape, k=2)),
        "jumprelu": lambda: sae_lens.JumpReLUSAE(sae_lens.JumpReLUSAEConfig(**shape)),
        "gated": lambda: sae_lens.GatedSAE(sae_lens.GatedSAEConfig(**shape)),
        "foreign": lambda: load_sae(FOREIGN / "visaebench-topk"),
    }
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        made[architecture]().save_model(folder)
        return files_of(Path(folder))


NATIVE = ("standard", "topk", "jumprelu", "gated", "foreign")


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file below a folder, by relative name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@cache
def store() -> dict[str, bytes]:
    """Return the files of a complete store: three shards, two hooks, twenty images."""
    from tests.activations._stores import MLP, RESID, make_store

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        make_store(Path(folder) / "s", 20, hook_names=[RESID, MLP])
        return files_of(Path(folder) / "s")


@cache
def image(kind: str = "png") -> bytes:
    """Return an encoded image of 24 x 20 pixels."""
    values = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    image = Image.fromarray(values)
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    options: dict[str, dict[str, Any]] = {
        "jpg": {"format": "JPEG", "exif": exif},
        "progressive.jpg": {"format": "JPEG", "progressive": True},
        "webp": {"format": "WEBP", "exif": exif},
        "lossless.webp": {"format": "WEBP", "lossless": True},
        "tif": {"format": "TIFF", "compression": "tiff_lzw"},
        "raw.tif": {"format": "TIFF"},
        "jp2": {"format": "JPEG2000"},
        "ppm": {"format": "PPM"},
        "palette.png": {"format": "PNG"},
        "grey16.png": {"format": "PNG"},
        "png": {"format": "PNG", "exif": exif},
    }
    if kind == "grey16.png":
        image = Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    if kind in ("palette.png", "gif"):
        image = image.convert("P")
    if kind == "gif":
        image.save(stream, "GIF", save_all=True, append_images=[image.rotate(90)] * 3)
    else:
        image.save(stream, **options.get(kind, {"format": kind.upper()}))
    return stream.getvalue()


IMAGES = (
    *("png", "palette.png", "grey16.png", "jpg", "progressive.jpg", "webp", "lossless.webp"),
    *("gif", "bmp", "tif", "raw.tif", "ppm", "ico", "tga", "jp2", "qoi"),
)


def photos() -> dict[str, bytes]:
    """Return two labelled folders of one image each."""
    return {"cat/0.png": image(), "dog/1.jpg": image("jpg")}


@cache
def evaluation() -> dict[str, Any]:
    """Return what ``vision-plugin eval`` writes of the SAE ``native("foreign")``, in short."""
    score = [0.5, None, *([0.25] * 94)]
    return {
        "schema": "vision_plugin.evaluation/1",
        "concepts": ["a red disc", "a blue square"],
        "summary": {"monosemanticity": {"sae": {"mean_score": 0.3}}},
        "per_latent": {
            "monosemanticity": {"sae": {"score": score}, "neurons": {"score": [0.1] * 32}},
            "steerability": {"sae": {"score": score, "top_concept": [0, 1, -1, *([1] * 93)]}},
        },
    }


@cache
def _edit() -> str:
    from vision_plugin.steering import Directions, Edit

    vectors = torch.eye(4, 32)
    changes = Edit.clamp("blocks.1.hook_resid_post", {3: 1.5, 7: -2.0}, tokens="cls")
    changes += Edit.suppress(Directions("blocks.0.hook_resid_post", vectors))
    return json.dumps(changes.to_dict())


def edit() -> dict[str, Any]:
    """Return what ``Edit.save`` writes of neurons and directions."""
    found: dict[str, Any] = json.loads(_edit())
    return found


@cache
def _names() -> str:
    from vision_plugin.lens import Check, FeatureNames, NameCandidates

    numbers = [torch.tensor([0.5, torch.nan, 0.25, 1.0], dtype=torch.float64) for _ in range(10)]
    check = Check(*numbers[:8], torch.tensor([3, 0, 9, 40]), 50, "text", 0.95)
    found = NameCandidates(
        ("red", None, "a blue square", "dog"), numbers[8], "cosine", "exact", numbers[9], check
    )
    names = FeatureNames(
        candidates={"decoder": found},
        made_by=("decoder", None, "decoder", "decoder"),
        agreement={"decoder|dissect": {"same": 0.5, "shuffled": None}},
        sae={
            "hook_name": "blocks.1.hook_resid_post",
            "tokens": "all",
            "fingerprint": {"d_in": 3, "d_sae": 4, "W_dec": [1.5, -0.25]},
        },
        model={"name": "demo", "signature": [1.0, 2.0]},
        settings={"seed": 0, "vocabulary": {"n_words": 3}},
        left_out={"labels": "no labels"},
        n_made_on=50,
    )
    return json.dumps(names.to_dict())


def names() -> dict[str, Any]:
    """Return what ``FeatureNames.save`` writes of four features."""
    found: dict[str, Any] = json.loads(_names())
    return found


def json_of(files: dict[str, bytes], name: str) -> Any:
    """Return a JSON file's content."""
    return json.loads(files[name])


def copied(source: Path, folder: Path) -> Path:
    """Copy a folder's files into another."""
    return Path(shutil.copytree(source, folder, dirs_exist_ok=True))
