"""How long a report takes to build, and how its index feels in a browser.

    python -m benchmarks.report                                       # everything, some minutes
    python -m benchmarks.report --features 50 --rows 500 --images 100 --out /elsewhere  # a look

Writes ``benchmarks/results/report.json``. Builds: images through a CLIP of ViT-B/32's shape, and
through a small one, both of random weights; and from latents at hand. Browser: an index of many
rows opened from the file system in headless Chromium, each action timed inside the page up to the
frame that shows its result.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

import vision_plugin as vp
from benchmarks._machine import machine

logger = logging.getLogger("benchmarks.report")

RESULTS = Path(__file__).parent / "results"
TARGET_BUILD_S = 60.0
"""A thousand features build in less."""
TARGET_ACTION_MS = 200.0
"""Sorting, filtering and turning a page of the large index take less."""
SHAPES = {
    "ViT-B/32": {"width": 768, "layers": 12, "size": 224, "patch": 32},
    "small CLIP": {"width": 192, "layers": 6, "size": 64, "patch": 8},
}
ACTIONS = {
    "sort by a score": "document.querySelector('[data-sort=score1]').click()",
    "sort by name, first time": "document.querySelector('[data-sort=name]').click()",
    "sort by name again": "document.querySelector('[data-sort=name]').click()",
    "filter dead": "document.querySelector('[name=state][value=dead]').click()",
    "filter alive": "document.querySelector('[name=state][value=alive]').click()",
    "search": "set('query', 'name 42')",
    "clear": "document.getElementById('clear').click()",
    "range of a score": "set('range-low', '0.5')",
    "next page": "document.getElementById('next').click()",
    "last page": "document.getElementById('last').click()",
}
TIMER = """async (action) => {
  const set = (id, text) => {
    const field = document.getElementById(id);
    field.value = text;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  };
  await new Promise((done) => requestAnimationFrame(done));
  const start = performance.now();
  eval(action);
  const scripted = performance.now() - start;
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  return [scripted, performance.now() - start];
}"""


def images(n: int, size: int) -> list[Image.Image]:
    """Smooth random images: thumbnails of them are as large as those of photographs."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (n, 12, 12, 3), dtype=np.uint8)
    side = (size * 4 // 3, size)
    return [Image.fromarray(c).resize(side, Image.Resampling.BICUBIC) for c in coarse]


def clip(width: int, layers: int, size: int, patch: int) -> Any:
    """A CLIP vision tower with projection, of random weights, as a bridge."""
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        image_size=size,
        patch_size=patch,
        projection_dim=512,
    )
    processor = CLIPImageProcessor(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    )
    module = CLIPVisionModelWithProjection(config).eval()
    return vp.wrap(module, image_processor=processor, name="random CLIP")


def topk(d_in: int, d_sae: int, hook_name: str) -> TopKSAE:
    """An SAE of random unit directions."""
    torch.manual_seed(0)
    metadata = SAEMetadata(hook_name=hook_name)
    sae = TopKSAE(TopKSAEConfig(d_in=d_in, d_sae=d_sae, k=32, metadata=metadata))
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(d_sae, d_in), dim=1))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


def sparse_latents(n: int, d_sae: int, per_image: int) -> Tensor:
    """Random image-level latents in CSR, one feature in ten dead."""
    rng = np.random.default_rng(0)
    alive = rng.permutation(d_sae)[: max(1, d_sae * 9 // 10)]
    columns = [
        np.sort(rng.choice(alive, min(per_image, len(alive)), replace=False)) for _ in range(n)
    ]
    first = np.cumsum([0, *(len(c) for c in columns)])
    flat = torch.as_tensor(np.concatenate(columns))
    values = torch.as_tensor(rng.gamma(2.0, 2.0, len(flat)), dtype=torch.float32)
    return torch.sparse_csr_tensor(torch.as_tensor(first), flat, values, size=(n, d_sae))


def extras(d_sae: int) -> dict[str, Any]:
    """Scores and names as a finished evaluation has them."""
    rng = np.random.default_rng(1)
    monosemanticity = rng.random(d_sae)
    monosemanticity[rng.random(d_sae) < 0.1] = np.nan
    return {
        "scores": {"monosemanticity": monosemanticity, "steerability": rng.random(d_sae) ** 3},
        "names": [f"name {int(k)}" for k in rng.integers(0, 10_000, d_sae)],
    }


def build(folder: Path, **arguments: Any) -> dict[str, float]:
    """Seconds, files and bytes of one build."""
    start = time.perf_counter()
    vp.report(output_path=folder, progress=False, **arguments)
    seconds = time.perf_counter() - start
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return {
        "seconds": round(seconds, 2),
        "files": len(sizes),
        "mib": round(sum(sizes) / 2**20, 1),
        "data_js_mib": round((folder / "data.js").stat().st_size / 2**20, 2),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def builds(arguments: argparse.Namespace, scratch: Path) -> dict[str, dict[str, float]]:
    """Build times of ``arguments.features`` features."""
    found = {}
    for name, shape in SHAPES.items():
        model = clip(**shape)
        hook_name = f"blocks.{shape['layers'] - 2}.hook_resid_post"
        sae = topk(shape["width"], arguments.features, hook_name)
        shown = images(arguments.images, shape["size"])
        both = {"sae": sae, "images": shown, **extras(arguments.features)}
        latents = sparse_latents(arguments.images, arguments.features, 64)
        found[name] = build(scratch / "model", model=model, **both)
        found[f"{name}, latents at hand"] = build(
            scratch / "latents", model=model, latents=latents, **both
        )
        logger.info("%s: %s", name, found[name])
    return found


def large_index(arguments: argparse.Namespace, scratch: Path) -> tuple[Path, dict[str, float]]:
    """A report of ``arguments.rows`` features from latents at hand."""
    folder = scratch / "large"
    sae = topk(64, arguments.rows, "blocks.0.hook_resid_post")
    figures = build(
        folder,
        sae=sae,
        model=None,
        images=images(arguments.images, 64),
        latents=sparse_latents(arguments.images, arguments.rows, arguments.rows // 50),
        **extras(arguments.rows),
    )
    logger.info("%s rows: %s", arguments.rows, figures)
    return folder, figures


def in_browser(folder: Path, repeats: int) -> dict[str, Any] | None:
    """Milliseconds of opening the index and of each action; None without Chromium."""
    path = shutil.which("chromium")
    if path is None:
        logger.warning("there is no chromium on the path: the browser is not measured")
        return None
    from playwright.sync_api import sync_playwright

    opened, actions, heap = [], {name: [] for name in ACTIONS}, 0.0
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
        flags += ["--disable-background-networking", "--disable-component-update"]
        browser = playwright.chromium.launch(executable_path=path, args=flags)
        for _ in range(repeats):
            # The timer's eval is the benchmark's own, not the report's.
            page = browser.new_context(bypass_csp=True).new_page()
            start = time.perf_counter()
            page.goto((folder / "index.html").as_uri())
            page.wait_for_selector("html[data-ready]")
            opened.append((time.perf_counter() - start) * 1000)
            for name, action in ACTIONS.items():
                actions[name].append(page.evaluate(TIMER, action))
            heap = page.evaluate("performance.memory.usedJSHeapSize") / 2**20
            page.context.close()
        browser_version = browser.version
        browser.close()
    return {
        "chromium": browser_version,
        "open_ms": round(statistics.median(opened), 1),
        "heap_mib": round(heap, 1),
        "actions_ms": {
            name: {
                "script": round(statistics.median(t[0] for t in times), 1),
                "shown": round(statistics.median(t[1] for t in times), 1),
            }
            for name, times in actions.items()
        },
    }


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        built = builds(arguments, scratch)
        folder, large = large_index(arguments, scratch)
        browser = in_browser(folder, arguments.repeats)
    record = {
        "features": arguments.features,
        "rows": arguments.rows,
        "images": arguments.images,
        "machine": machine("pillow"),
        "target_build_s": TARGET_BUILD_S,
        "target_action_ms": TARGET_ACTION_MS,
        "builds": built,
        "large_build": large,
        "browser": browser,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "report.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    logger.info("%s", json.dumps(record, indent=1))
    logger.info("written to %s", path)


if __name__ == "__main__":
    main()
