"""Speed and memory of extraction and of reading back, with SAELens's cached format beside it.

    python -m benchmarks.extraction            # everything; some twenty minutes on two cores
    python -m benchmarks.extraction --small    # the same with few images, to see that it works

Writes ``benchmarks/results/extraction.json``, on a machine that should have nothing else to do. The
share of the model is the native forward's time on pixels that are ready (the mean of one pass
before and one after, since a machine's speed drifts), against the time of the whole extraction of
the same images, in the same process; the median of seven. Reading times are the least of eight.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import torch
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.mixing_buffer import mixing_buffer
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

import vision_plugin as vp
from benchmarks._extraction_memory import write_parquet
from benchmarks._machine import machine
from vision_plugin._allocator import freed_memory_kept
from vision_plugin.activations import ActivationStore, ExtractionConfig, extract
from vision_plugin.images import ImageSource, open_images

logger = logging.getLogger("benchmarks.extraction")

RESULTS = Path(__file__).parent / "results" / "extraction.json"
SHARED = Path(__file__).parents[2] / "shared"
MODELS = ("emoji CLIP", "ViT-B/32, random")
BATCH_ROWS = 4096
PIECE_BYTES = 8 * 1024 * 1024


def main() -> None:
    """Run what is asked for and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="few images, to see that it works")
    parser.add_argument("--images", default=str(SHARED / "data" / "noto.parquet"))
    parser.add_argument("--model", default=str(SHARED / "models" / "emoji-clip"))
    parser.add_argument("--repeats", type=int, default=7, help="of each timing")
    parser.add_argument(
        "--parts", nargs="+", choices=("speed", "memory"), default=["speed", "memory"]
    )
    parser.add_argument("--only", nargs="+", default=MODELS, choices=MODELS, help="these models")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    n_images, n_vit = (64, 32) if options.small else (1906, 256)
    options.repeats = 1 if options.small else options.repeats
    found: dict[str, Any] = {
        "machine": machine("transformers", "sae-lens", "datasets"),
        "small": options.small,
    }
    if options.out.is_file():
        found = {**json.loads(options.out.read_text()), **found}  # the part that is not run stays
    if "speed" in options.parts:
        found["copying_gb_per_s"] = copying()
        found.setdefault("models", {})
        for name in options.only:
            model = vp.load_model(options.model) if name == MODELS[0] else vit_b_32()
            n = n_images if name == MODELS[0] else n_vit
            source = open_images(options.images, n_images=n)
            with tempfile.TemporaryDirectory() as folder:
                found["models"][name] = one_model(model, source, Path(folder), options)
            logger.info("%s: %s", name, json.dumps(found["models"][name], indent=1))
    if "memory" in options.parts:
        found["memory"] = memory((200, 2000) if options.small else (10_000, 100_000))
        logger.info("memory: %s", json.dumps(found["memory"], indent=1))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


def vit_b_32() -> vp.VisionBridge:
    """CLIP's ViT-B/32 with random weights."""
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=32,
        projection_dim=512,
    )
    module = CLIPVisionModelWithProjection(config).eval()
    return vp.wrap(module, name="ViT-B/32 (random)", image_processor=CLIPImageProcessor())


def one_model(
    model: vp.VisionBridge, source: ImageSource, folder: Path, options: Any
) -> dict[str, Any]:
    """All figures of one model."""
    hook_name = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    config = ExtractionConfig(
        model_name=str(model.cfg.model_name),
        images="benchmark",
        hook_names=[hook_name],
        output_path="",
    )
    starts = range(0, len(source), config.batch_size)
    pixels: list[torch.Tensor] = []
    decoding_s = timed(
        lambda: pixels.extend(
            model.image_processor(
                [source[i] for i in range(start, min(start + config.batch_size, len(source)))]
            )
            for start in starts
        )
    )
    native, whole = [timed(lambda: native_forward(model, pixels))], []
    for repeat in range(options.repeats):
        path = folder / f"store{repeat}"
        settings = {**vars(config), "output_path": str(path)}
        run = ExtractionConfig(**settings)
        whole.append(timed(lambda run=run: extract(run, model=model, images=source)))
        native.append(timed(lambda: native_forward(model, pixels)))
    around = [(before + after) / 2 for before, after in itertools.pairwise(native)]
    shares = [forward / run for forward, run in zip(around, whole, strict=True)]
    store = ActivationStore(folder / "store0")
    whole_s = statistics.median(whole)
    shards = [(shard.folder / shard.task.file).read_bytes() for shard in store.shards]
    hashing_s = timed(lambda: [hashlib.sha256(shard) for shard in shards])
    return {
        "images": len(source),
        "hook_name": hook_name,
        "gigabytes": store.n_rows(hook_name) * store.d_in(hook_name) * 4 / 1e9,
        "extraction": {
            "native_forward_s": native,
            "extraction_s": whole,
            "images_per_s": len(source) / whole_s,
            "share_in_model": statistics.median(shares),
            "share_in_model_per_run": shares,
            "decoding_alone_s": decoding_s,
            "sha256_alone_s": hashing_s,
            "note": "The two last are work of one core that a model on the same cores waits for.",
        },
        "reading": reading(store, hook_name, folder, whole_s, options),
    }


@torch.no_grad()
def native_forward(model: vp.VisionBridge, pixels: list[torch.Tensor]) -> None:
    """The native module alone, on pixels that are ready; the allocator as in an extraction."""
    with freed_memory_kept():
        for batch in pixels:
            model.adapter.native_forward(model.native, batch)


def reading(
    store: ActivationStore, hook_name: str, folder: Path, recompute_s: float, options: Any
) -> dict[str, Any]:
    """Seconds for one epoch of shuffled batches, and for what it is compared with.

    The store is read beside copies of itself, as one of about a gigabyte: an epoch of so small a
    store would mostly show how long it takes to start.
    """
    repeats = options.repeats
    n_copies = 2 if options.small else -(-(10**9) // sum(shard.bytes for shard in store.shards))
    copies = [Path(shutil.copytree(folder / "store0", folder / f"x{i}")) for i in range(n_copies)]
    large = ActivationStore.concatenate([ActivationStore(path) for path in copies])
    batch_rows = min(BATCH_ROWS, store.n_rows(hook_name))
    written_s = timed(lambda: write_saelens(store, hook_name, folder / "saelens"))
    cached = datasets.load_from_disk(str(folder / "saelens"))
    cached.set_format(type="torch", columns=[hook_name], dtype=torch.float32)

    def theirs() -> None:
        batches = saelens_batches(cached, store, hook_name, batch_rows)
        for _ in range(max(1, store.n_rows(hook_name) // batch_rows - 1)):
            if next(batches, None) is None:
                break

    seconds = {
        "raw_sequential": best(lambda: read_raw(large), repeats),
        "raw_into_fresh_memory": best(lambda: read_raw(large, fresh=True), repeats),
        "raw_then_one_gather": best(lambda: read_and_gather(large, hook_name), repeats),
        "shuffled_batches": best(lambda: ours(large, hook_name, batch_rows), repeats),
    }
    small = {
        "shuffled_batches": best(lambda: ours(store, hook_name, batch_rows), repeats),
        "saelens_cached_batches": best(theirs, repeats),
    }
    shuffled = seconds["shuffled_batches"]
    return {
        "rows": large.n_rows(hook_name),
        "batch_rows": batch_rows,
        "gigabytes": large.n_rows(hook_name) * large.d_in(hook_name) * 4 / 1e9,
        "copies_of_the_store": n_copies,
        "seconds_per_epoch": seconds,
        "recompute_s": recompute_s * n_copies,
        "times_as_fast_as_recomputing": recompute_s * n_copies / shuffled,
        "times_raw_sequential_read": shuffled / seconds["raw_sequential"],
        "times_raw_read_into_fresh_memory": shuffled / seconds["raw_into_fresh_memory"],
        "times_raw_read_then_one_gather": shuffled / seconds["raw_then_one_gather"],
        "note": (
            "A raw read moves each byte once, into a buffer that stays in the cache. Shuffling "
            "moves it twice, the second time to a place in memory that has to be fetched first, "
            "and checks it on the way; a read and a gather are the least that any reader does."
        ),
        "one_copy_seconds_per_epoch": small,
        "saelens_write_s": written_s,
        "saelens_seconds_over_ours": small["saelens_cached_batches"] / small["shuffled_batches"],
    }


def ours(store: ActivationStore, hook_name: str, batch_rows: int) -> None:
    """An epoch of shuffled batches."""
    batches = store.batches(hook_name, batch_rows)
    for _ in range(store.n_rows(hook_name) // batch_rows):
        next(batches)
    batches.close()


def read_raw(store: ActivationStore, *, fresh: bool = False) -> None:
    """Every byte of the shards, in order, into one buffer or a fresh one each time."""
    buffer = bytearray(PIECE_BYTES)
    for shard in store.shards:
        with (shard.folder / shard.task.file).open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                if fresh:
                    buffer = bytearray(PIECE_BYTES)


def read_and_gather(store: ActivationStore, hook_name: str) -> None:
    """What any reader that shuffles has to do: read, then copy each row to another place.

    Nothing is checked, no memory is fresh, and the rows stay within the 8 MB that were read.
    """
    buffer = np.zeros(PIECE_BYTES, dtype=np.uint8)
    row_bytes = store.d_in(hook_name) * 4
    rows = buffer[: PIECE_BYTES // row_bytes * row_bytes].view((np.void, row_bytes))
    out = np.zeros_like(rows)
    order = np.random.default_rng(0).permutation(len(rows))
    for shard in store.shards:
        with (shard.folder / shard.task.file).open("rb", buffering=0) as stream:
            while stream.readinto(memoryview(buffer)):
                np.take(rows, order, out=out, mode="clip")


def copying() -> dict[str, Any]:
    """Gigabytes a second that the machine copies in memory, and whether a second core adds."""
    size = 64 * 1024 * 1024
    pairs = [(np.ones(size, np.uint8), np.ones(size, np.uint8)) for _ in range(2)]

    def two() -> None:
        threads = [threading.Thread(target=np.copyto, args=pair) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return {
        "one_thread": size / 1e9 / best(lambda: np.copyto(*pairs[0]), 5),
        "two_threads_together": 2 * size / 1e9 / best(two, 5),
    }


def write_saelens(store: ActivationStore, hook_name: str, path: Path) -> None:
    """The same activations as SAELens's CacheActivationsRunner lays them out."""
    spec = store.spec(hook_name)
    shape = (spec.rows_per_image, spec.d_in)
    features = datasets.Features({hook_name: datasets.Array2D(shape=shape, dtype="float32")})
    parts = [
        datasets.Dataset.from_dict(
            {hook_name: store.activations(hook_name, slice(start, start + 256))}, features=features
        )
        for start in range(0, len(store), 256)
    ]
    datasets.concatenate_datasets(parts).save_to_disk(str(path))


def saelens_batches(
    cached: datasets.Dataset, store: ActivationStore, hook_name: str, batch_rows: int
) -> Iterator[torch.Tensor]:
    """SAELens's own reading of its format, and its own mixing buffer of as many batches as ours."""
    spec = store.spec(hook_name)
    reader = SimpleNamespace(
        cached_activation_dataset=cached,
        context_size=spec.rows_per_image,
        store_batch_size_prompts=min(32, len(store)),
        d_in=spec.d_in,
        hook_name=hook_name,
        current_row_idx=0,
    )

    def loader() -> Iterator[torch.Tensor]:
        while True:
            yield ActivationsStore._load_raw_llm_batch_from_cached(reader, False)[0]

    return mixing_buffer(20 * batch_rows, batch_rows, loader())


def memory(sizes: tuple[int, int]) -> dict[str, Any]:
    """Peak resident memory of extractions that differ in the number of images alone."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for n_images in (0, *sizes):
            parquet = Path(folder) / f"images{n_images}.parquet"
            write_parquet(parquet, n_images)
            command = [sys.executable, "-m", "benchmarks._extraction_memory", str(parquet)]
            store = Path(folder) / f"store{n_images}"
            output = subprocess.run(
                [*command, str(n_images), str(store)],
                check=True,
                capture_output=True,
                text=True,
                cwd=Path(__file__).parents[1],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            ).stdout
            found[str(n_images)] = json.loads(output.splitlines()[-1])
    ratios = {}
    for kind in ("peak_anonymous_mb", "peak_rss_mb"):
        small, large = (found[str(n)][kind] for n in sizes)
        ratios[f"ratio_of_{kind.removesuffix('_mb')}"] = large / small
    return {"by_number_of_images": found, **ratios}


def timed(work: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def best(work: Callable[[], object], repeats: int) -> float:
    """Least seconds of a few calls, the first of which also warms the page cache."""
    return min(timed(work) for _ in range(repeats + 1))


if __name__ == "__main__":
    main()
