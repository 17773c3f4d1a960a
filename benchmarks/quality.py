"""Train SAEs with this package and with its peers on the same vectors, and score them alike.

    python -m benchmarks.quality                                 # everything; hours on two cores
    python -m benchmarks.quality --sets emoji --kinds batchtopk --seeds 0
    python -m benchmarks.quality --table                         # the table and plot of what ran

What has run stays in ``benchmarks/results/quality.json`` and is not run again; the table and the
plot beside it are written after every run. The vectors are extracted once, into ``--folder``. Each
SAE is trained on all of them, in random order as often as ``--tokens`` asks for, and scored on
those of some hundred images, so that what is compared is how well each trainer fits its data.

The peers need an environment of their own, whose Python ``--peers`` names:

    uv venv peers && uv pip install --python peers/bin/python \
        dictionary_learning==0.1.0 overcomplete eai-sparsify "matplotlib<3.9"
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

import vision_plugin as vp
from benchmarks._machine import machine
from benchmarks._quality_score import Encoded, Scored, at_k, scores, stability
from benchmarks._quality_table import write_plot, write_table
from vision_plugin.activations import ActivationStore, ExtractionConfig, extract
from vision_plugin.images import open_images
from vision_plugin.kernels import SparseLatents
from vision_plugin.sae import (
    VisionSAERunnerConfig,
    VisionSAETrainingRunner,
    training_config_class,
)

logger = logging.getLogger("benchmarks.quality")

RESULTS = Path(__file__).parent / "results"
SHARED = Path(__file__).parents[2] / "shared"
N_SCORED = 20_000
HERE = ("ours", "saelens")
TRAINERS = (*HERE, "dictionary_learning", "overcomplete", "sparsify")
KINDS = ("batchtopk", "topk", "matryoshka_batchtopk", "standard", "gated", "jumprelu")
OF_PEER = {
    "dictionary_learning": ("batchtopk", "topk", "matryoshka_batchtopk"),
    "overcomplete": ("batchtopk", "topk"),
    "sparsify": ("topk",),
    "saelens": ("batchtopk", "topk", "matryoshka_batchtopk"),
}
"""Kinds of SAE that a trainer other than ours is compared in."""


@dataclass(frozen=True)
class VectorSet:
    """Activations to train on, and the size of the SAE for them."""

    model: str
    images: str
    hook_name: str
    tokens: str
    label_column: str
    d_sae: int
    k: int
    other: str
    """Model whose embeddings judge beside the model's own."""


_DINO, _EMOJI = "models/dinov2-small", "models/emoji-clip"
SETS = {
    "emoji": VectorSet(
        _EMOJI, "data/noto.parquet", "blocks.4.hook_resid_post", "all", "group", 768, 20, _DINO
    ),
    **{
        f"dinov2-s-{layer}": VectorSet(
            *(_DINO, "data/clipart.parquet", f"blocks.{layer}.hook_resid_post", "random:40"),
            *("group", 1536, 20, _EMOJI),
        )
        for layer in (11, 8)
    },
}


def store_of(wanted: VectorSet, folder: Path) -> ActivationStore:
    """The vectors of a set, extracted where they are not there yet."""
    name = f"store-{Path(wanted.model).name}-{Path(wanted.images).stem}"
    hooks = [s.hook_name for s in SETS.values() if s.model == wanted.model]
    extract(
        ExtractionConfig(
            model_name=str(SHARED / wanted.model),
            images=str(SHARED / wanted.images),
            hook_names=hooks,
            tokens=wanted.tokens,
            output_path=str(folder / name),
            n_workers=0,
        )
    )
    return ActivationStore(folder / name)


def scored_of(name: str, store: ActivationStore, folder: Path) -> Scored:
    """The vectors of some images of a set, with the images' groups and embeddings."""
    wanted = SETS[name]
    per_image = store.n_rows(wanted.hook_name) // len(store)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(store), generator=generator)[: N_SCORED // per_image].sort().values
    rows = store.activations(wanted.hook_name, chosen).float().flatten(0, -2)
    images = open_images(str(SHARED / wanted.images), label_column=wanted.label_column)
    numbers = store.image_indices[chosen].tolist()
    labels = [images.labels[number] for number in numbers]
    groups = sorted(set(labels))
    embeddings = {
        Path(model).name: _embeddings(model, images, numbers, folder, name)
        for model in (wanted.model, wanted.other)
    }
    return Scored(
        rows=rows,
        n_images=len(chosen),
        labels=torch.tensor([groups.index(label) for label in labels]),
        embeddings=embeddings,
    )


@torch.no_grad()
def _embeddings(model: str, images: Any, numbers: list[int], folder: Path, name: str) -> Tensor:
    """Embeddings of the scored images by a model, made once."""
    path = folder / f"embeddings-{name}-{Path(model).name}.safetensors"
    if not path.is_file():
        bridge = vp.load_model(str(SHARED / model))
        parts = [
            bridge.image_features(bridge.preprocess([images[n] for n in numbers[i : i + 16]]))
            for i in range(0, len(numbers), 16)
        ]
        save_file({"embeddings": torch.cat(parts).float().contiguous()}, path)
    return load_file(path)["embeddings"]


def train_here(
    trainer: str, kind: str, wanted: VectorSet, store: ActivationStore, seed: int, tokens: int
) -> tuple[Any, dict[str, Any]]:
    """An SAE by this package, with its own defaults or SAELens's, and what its training took."""
    sized = {"k": wanted.k} if "topk" in kind else {}
    sae = training_config_class(kind)(d_in=0, d_sae=wanted.d_sae, **sized)
    if trainer == "saelens" and kind == "matryoshka_batchtopk":
        w = wanted.d_sae
        sae.matryoshka_widths = [w // 16, w // 4, w * 11 // 16, w]
    cfg = VisionSAERunnerConfig(
        model_name=str(SHARED / wanted.model),
        images="",
        hook_name=wanted.hook_name,
        tokens=wanted.tokens,
        sae=sae,
        defaults="auto" if trainer == "ours" else "saelens",
        dense=trainer == "saelens",
        training_tokens=tokens,
        seed=seed,
        output_path=None,
        target_l0="auto" if "topk" in kind else float(wanted.k),
    )
    runner = VisionSAETrainingRunner(cfg, images=store)
    begin, cpu = time.perf_counter(), time.process_time()
    trained = runner.run()
    took = {
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - cpu,
        "settings": dict(runner.cfg.sae.metadata.to_dict().get("auto") or {}),
    }
    return trained, took


@torch.no_grad()
def encode_here(sae: Any, rows: Tensor, k: int, *, is_thresholded: bool) -> Encoded:
    """What an SAE of ours makes of the scored vectors."""
    parts = [(latents := sae.encode(part), sae.decode(latents)) for part in rows.split(2048)]
    dense = torch.cat([latents for latents, _ in parts])
    where = dense.nonzero(as_tuple=True)
    return Encoded(
        latents=_compressed(dense[where], where[1].int(), (dense != 0).sum(1), dense.shape[1]),
        reconstruction=torch.cat([decoded for _, decoded in parts]),
        W_dec=sae.W_dec.detach().clone(),
        at_k=at_k(sae, rows, k) if is_thresholded else None,
    )


def _compressed(values: Tensor, indices: Tensor, counts: Tensor, d_sae: int) -> SparseLatents:
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return SparseLatents(values, indices, offsets, d_sae)


def train_peer(
    trainer: str, kind: str, name: str, data: Path, python: str, seed: int, tokens: int
) -> tuple[Encoded, dict[str, Any]]:
    """An SAE by a peer, in the peer's own environment.

    Raises:
        RuntimeError: the peer fails; its last words are in the message.
    """
    wanted = SETS[name]
    job = {
        **{"trainer": trainer, "kind": kind, "seed": seed, "tokens": tokens, "batch": 1024},
        **{"d_sae": wanted.d_sae, "k": wanted.k, "threads": torch.get_num_threads()},
        **{"data": str(data), "result": str(data.with_name(f"result-{name}.safetensors"))},
    }
    path = data.with_name(f"job-{name}.json")
    path.write_text(json.dumps(job))
    script = Path(__file__).with_name("_quality_peers.py")
    done = subprocess.run(
        [python, str(script), str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "SPARSIFY_DISABLE_TRITON": "1"},  # its kernel has no CPU
    )
    if done.returncode:
        raise RuntimeError(f"{trainer} {kind} failed: {done.stderr.strip()[-800:]}")
    found = load_file(job["result"])
    encoded = Encoded(
        latents=_compressed(found["values"], found["indices"], found["counts"], wanted.d_sae),
        reconstruction=found["reconstruction"],
        W_dec=found["W_dec"],
        at_k=found.get("at_k"),
    )
    seconds, cpu = found["seconds"].tolist()
    return encoded, {"seconds": seconds, "cpu_seconds": cpu}


def wanted_runs(arguments: argparse.Namespace) -> Iterator[tuple[str, str, str, int]]:
    """Set, kind, trainer and seed of every run that was asked for."""
    every = itertools.product(arguments.sets, arguments.seeds, arguments.kinds, arguments.trainers)
    for name, seed, kind, trainer in every:
        if kind in OF_PEER.get(trainer, KINDS):
            yield name, kind, trainer, seed


def main() -> None:
    """Run what is missing, and write the table and the plot."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--trainers", nargs="*", default=list(TRAINERS), choices=TRAINERS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=1_200_000)
    parser.add_argument("--peers", default="", help="Python of the peers' environment")
    parser.add_argument("--folder", type=Path, default=Path("runs/quality"))
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    file = RESULTS / "quality.json"
    found = json.loads(file.read_text()) if file.is_file() else {"rows": []}
    if not arguments.table:
        if not arguments.peers and set(arguments.trainers) - set(HERE):
            logger.warning(
                "no peers without --peers PYTHON; this is how to install them:\n%s",
                __doc__.split("\n\n")[-1].rstrip(),
            )
        _run_all(arguments, found, file)
    write_table(found["rows"], file.with_suffix(".md"))
    write_plot(found["rows"], file.with_suffix(".png"))


def _run_all(arguments: argparse.Namespace, found: dict[str, Any], file: Path) -> None:
    arguments.folder.mkdir(parents=True, exist_ok=True)
    found["environment"] = machine("sae-lens", "vision-plugin")
    done = {(r["set"], r["kind"], r["trainer"], r["seed"], r["tokens"]) for r in found["rows"]}
    opened: dict[str, tuple[ActivationStore, Scored, Path]] = {}
    for name, kind, trainer, seed in wanted_runs(arguments):
        if (name, kind, trainer, seed, arguments.tokens) in done:
            continue
        if trainer not in HERE and not arguments.peers:
            continue
        if name not in opened:
            opened[name] = _open(name, arguments.folder)
        store, scored, data = opened[name]
        wanted = SETS[name]
        if trainer in HERE:
            sae, took = train_here(trainer, kind, wanted, store, seed, arguments.tokens)
            thresholded = kind in ("batchtopk", "matryoshka_batchtopk", "jumprelu")
            encoded = encode_here(sae, scored.rows, wanted.k, is_thresholded=thresholded)
        else:
            encoded, took = train_peer(
                trainer, kind, name, data, arguments.peers, seed, arguments.tokens
            )
        row = {
            **{"set": name, "kind": kind, "trainer": trainer, "seed": seed},
            **{"tokens": arguments.tokens, "d_sae": wanted.d_sae, "k": wanted.k},
            **scores(encoded, scored),
            **took,
        }
        directions = arguments.folder / f"W_dec-{name}-{kind}-{trainer}-{arguments.tokens}"
        directions.mkdir(exist_ok=True)
        save_file({"W_dec": encoded.W_dec.contiguous()}, directions / f"{seed}.safetensors")
        others = [load_file(path)["W_dec"] for path in sorted(directions.glob("*.safetensors"))]
        if len(others) > 1:
            row["stability"] = stability(others)
        found["rows"].append(row)
        file.write_text(json.dumps(found, indent=1) + "\n")
        logger.info("%s", {key: value for key, value in row.items() if key != "settings"})


def _open(name: str, folder: Path) -> tuple[ActivationStore, Scored, Path]:
    """Store, scored vectors, and a file of both for the peers."""
    store = store_of(SETS[name], folder)
    scored = scored_of(name, store, folder)
    data = folder / f"vectors-{name}.safetensors"
    if not data.is_file():
        rows = store.activations(SETS[name].hook_name).float().flatten(0, -2)
        save_file({"train": rows.contiguous(), "scored": scored.rows.contiguous()}, data)
    return store, scored, data


if __name__ == "__main__":
    sys.exit(main())
