"""How long a report takes to build, and how its index feels in a browser.

    python -m benchmarks.report                                       # everything, some minutes
    python -m benchmarks.report --only emoji                          # one part; the others stay
    python -m benchmarks.report --features 50 --rows 500 --images 100 --emoji-images 400 \\
        --out /elsewhere                                              # a look

Writes ``benchmarks/results/report.json`` and ``report.md``. ``builds``: images through a CLIP of
ViT-B/32's shape, and through a small one, both of random weights; and from latents at hand.
``emoji``: the emoji CLIP of the data folder on emoji with backgrounds, at three sizes, for the cost
of one feature and of one image more. ``browser``: an index of many rows opened from the file system
in headless Chromium, each action timed inside the page up to the frame that shows its result.
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
from transformers import CLIPVisionModel

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

import vision_plugin as vp
from benchmarks._machine import machine

logger = logging.getLogger("benchmarks.report")

RESULTS = Path(__file__).parent / "results"
TARGET_BUILD_S = 60.0
"""A thousand features build in less."""
TARGET_ACTION_MS = 200.0
"""Sorting and filtering the large index take less."""
TARGET_FILES, TARGET_MIB = 2000, 100
HOOKED_BLOCK, BATCH = 4, 32
BUILT_ROWS = 1000
"""Features of the report whose index is widened to as many rows as are asked for."""
SHAPES = {
    "ViT-B/32": {"width": 768, "layers": 12, "size": 224, "patch": 32},
    "small CLIP": {"width": 192, "layers": 6, "size": 64, "patch": 8},
}
ACTIONS = {
    "nothing, on the empty page": "void 0",
    "sort by a score": "choose('sort', 'score1')",
    "sort by name, first time": "choose('sort', 'name')",
    "turn round": "document.getElementById('turn').click()",
    "filter dead": "document.querySelector('[name=state][value=dead]').click()",
    "filter usual": "document.querySelector('[name=state][value=usual]').click()",
    "search": "set('query', 'name 42')",
    "clear": "document.getElementById('clear').click()",
    "range of a score": "limit('0.5')",
    "list": "document.querySelector('[name=mode][value=list]').click()",
}
EMPTY = "nothing, on the empty page"
TIMER = """async (action) => {
  const set = (id, text) => {
    const field = document.getElementById(id);
    field.value = text;
    field.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const choose = (id, value) => {
    document.getElementById(id).value = value;
    document.getElementById(id).dispatchEvent(new Event("change"));
  };
  const limit = (text) => {
    const field = document.querySelector(".histogram input");
    field.value = text;
    field.dispatchEvent(new Event("change"));
  };
  await new Promise((done) => requestAnimationFrame(done));
  const start = performance.now();
  eval(action);
  const scripted = performance.now() - start;
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  return [scripted, performance.now() - start];
}"""


SCROLL = """async (steps) => {
  let blank = 0;
  const height = document.documentElement.scrollHeight, left = innerWidth / 2;
  for (let i = 0; i < steps; i++) {
    scrollTo(0, ((i * 7919) % steps) / steps * height);
    await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
    const list = document.getElementById("view").getBoundingClientRect();
    for (const y of [80, innerHeight / 2, innerHeight - 4]) {
      const inside = y > list.top + 8 && y < list.bottom - 8;
      // Between two items there is a gap: a little below it, too.
      const at = (d) => document.elementFromPoint(left, Math.min(innerHeight - 1, y + d));
      const found = [0, 12].some((d) => at(d)?.closest(".item"));
      if (inside && !found) blank++;
    }
  }
  return blank;
}"""
"""Jumps all over the list, and counts the places of the window without a row."""
EMOJI = Path(__file__).parents[2] / "shared"


class Backgrounds:
    """Emoji on as many backgrounds as it takes, with ids: a source of any number of images."""

    def __init__(self, n: int) -> None:
        self.emoji = vp.open_images(str(EMOJI / "data" / "noto.parquet"), label_column="subgroup")
        self.ids = [f"{i}" for i in range(n)]
        self.labels = [self.emoji.labels[i % len(self.emoji)] for i in range(n)]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Image.Image:
        """Emoji come on white: what is white takes the colour of the background."""
        image = self.emoji[index % len(self.emoji)]
        tint = np.random.default_rng(index).integers(150, 256, 3)
        return Image.fromarray((np.asarray(image) / 255 * tint).astype(np.uint8))


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
    start, worked = time.perf_counter(), time.process_time()
    vp.report(output_path=folder, progress=False, layout="pca", **arguments)
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(worked, 2),
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


def slopes(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any] | None:
    """Builds with the emoji CLIP, and what a feature and an image more cost; None without it."""
    folder = EMOJI / "models" / "emoji-clip"
    if not folder.is_dir():
        logger.warning("there is no emoji-clip beside the checkout: slopes are not measured")
        return None
    model = vp.load_model(str(folder))
    few, many = arguments.features // 4, arguments.features
    some, all_ = arguments.emoji_images // 4, arguments.emoji_images
    found = {}
    for n_features, n_images in ((few, some), (many, some), (many, all_)):
        sae = topk(192, n_features, f"blocks.{HOOKED_BLOCK}.hook_resid_post")
        where = scratch / f"emoji-{n_features}-{n_images}"
        found[f"{n_features} features, {n_images} images"] = build(
            where, sae=sae, model=model, images=Backgrounds(n_images), n_image_pages=100
        )
    small, wide, large = found.values()
    slope = {}
    for clock in ("seconds", "cpu_seconds"):
        per_feature = (wide[clock] - small[clock]) / (many - few)
        per_image = (large[clock] - wide[clock]) / (all_ - some)
        slope[f"{clock} per 1000 features"] = round(1000 * per_feature, 1)
        slope[f"{clock} per 1000 images"] = round(1000 * per_image, 1)
    least = alone(folder, min(some, 1000))
    return {"builds": found, "slopes": slope, "alone": least, "machine": machine("pillow")}


def alone(folder: Path, n: int) -> dict[str, float]:
    """CPU milliseconds an image of what no report can do without, in this run.

    ``images``: drawing one. ``model``: the checkpoint's own module on prepared pixels, with the
    blocks up to the SAE's hook.
    """
    source, tower = Backgrounds(n), CLIPVisionModel.from_pretrained(folder).eval()
    tower.encoder.layers = tower.encoder.layers[: HOOKED_BLOCK + 1]
    pixels = vp.load_model(str(folder)).preprocess([source[number] for number in range(n)])
    found = {}
    with torch.inference_mode():
        for name, run in (
            ("images", lambda: [source[number] for number in range(n)]),
            ("model", lambda: [tower(pixel_values=some) for some in pixels.split(BATCH)]),
        ):
            taken = []
            for _ in range(3):
                start = time.process_time()
                run()
                taken.append(time.process_time() - start)
            found[name] = round(1000 * statistics.median(taken) / n, 2)
    return found


def large_index(arguments: argparse.Namespace, scratch: Path) -> Path:
    """An index of ``arguments.rows`` features.

    It is that of a report of fewer, whose rows are repeated with numbers and values of their own:
    the index reads data.js alone, and 50,000 pages of features would only take time.
    """
    folder = scratch / "large"
    n, rows = min(BUILT_ROWS, arguments.rows), arguments.rows
    sae = topk(64, n, "blocks.0.hook_resid_post")
    figures = build(
        folder,
        sae=sae,
        model=None,
        images=images(arguments.images, 64),
        latents=sparse_latents(arguments.images, n, max(2, n // 50)),
        **extras(n),
    )
    logger.info("%s features: %s", n, figures)
    script = folder / "data.js"
    head, _, text = script.read_text(encoding="ascii").partition(" = ")
    data = json.loads(text.rstrip().removesuffix(";"))
    of = [row % n for row in range(rows)]
    rng = np.random.default_rng(2)
    data["ids"] = list(range(rows))
    for key in ("states", "names", "images"):
        data[key] = [data[key][row] for row in of]
    data["values"] = [
        [None if values[row] is None else values[row] * f for row, f in zip(of, near, strict=True)]
        for values in data["values"]
        for near in [rng.uniform(0.9, 1.0, rows).round(4).tolist()]
    ]
    script.write_text(f"{head} = {json.dumps(data)};\n", encoding="ascii")
    return folder


def _timed(page: Any, action: str) -> list[float]:
    """Milliseconds of an action: of its script, until the frame, and of the main thread's CPU.

    The last is what it takes on any machine; the other two are also what others make it wait.
    """
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})

    def worked() -> float:
        found = session.send("Performance.getMetrics")["metrics"]
        return 1000 * next(one["value"] for one in found if one["name"] == "TaskDuration")

    before = worked()
    took = list(page.evaluate(TIMER, action))
    after = worked()
    session.detach()
    return [*took, after - before]


def in_browser(folder: Path, repeats: int) -> dict[str, Any] | None:
    """Milliseconds of opening the index and of each action; None without Chromium."""
    path = shutil.which("chromium")
    if path is None:
        logger.warning("there is no chromium on the path: the browser is not measured")
        return None
    from playwright.sync_api import sync_playwright

    opened, actions, heap, blank = [], {name: [] for name in ACTIONS}, 0.0, 0
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
            empty = browser.new_page()
            actions[EMPTY].append(_timed(empty, ACTIONS[EMPTY]))
            empty.close()
            for name, action in ACTIONS.items():
                if name == EMPTY:
                    continue
                actions[name].append(_timed(page, action))
            blank += page.evaluate(SCROLL, 60)
            heap = page.evaluate("performance.memory.usedJSHeapSize") / 2**20
            page.context.close()
        browser_version = browser.version
        browser.close()
    return {
        "chromium": browser_version,
        "open_ms": round(statistics.median(opened), 1),
        "heap_mib": round(heap, 1),
        "blank_places_while_scrolling": blank,
        "actions_ms": {
            name: {
                "script": round(statistics.median(t[0] for t in times), 1),
                "shown": round(statistics.median(t[1] for t in times), 1),
                "cpu": round(statistics.median(t[2] for t in times), 1),
            }
            for name, times in actions.items()
        },
    }


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = ("builds", "emoji", "browser")
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--features", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--emoji-images", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    torch.set_num_threads(arguments.threads)
    path = arguments.out / "report.json"
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = Path(temporary)
        if "builds" in arguments.only:
            record["builds"] = builds(arguments, scratch)
        if "emoji" in arguments.only:
            record["emoji"] = slopes(arguments, scratch)
        if "browser" in arguments.only:
            folder = large_index(arguments, scratch)
            found = in_browser(folder, arguments.repeats)
            record["browser"] = found and {"rows": arguments.rows, **found}
    record |= {"target_build_s": TARGET_BUILD_S, "target_action_ms": TARGET_ACTION_MS}
    arguments.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "report.md").write_text(page(record), encoding="utf-8")
    logger.info("%s", json.dumps(record, indent=1))
    logger.info("written to %s", path)


def page(record: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["# What a report costs", "", "`python -m benchmarks.report` writes this page."]
    emoji, browser = record.get("emoji"), record.get("browser")
    if emoji:
        lines += [
            "",
            "## Building: the emoji CLIP on emoji with backgrounds",
            "",
            f"Aim: {TARGET_BUILD_S:g} s on two cores, {TARGET_MIB} MiB, {TARGET_FILES:,} files. "
            "CPU seconds are the work, seconds the wait, "
            f"on {emoji['machine']['device']}.",
            "",
            "| build | seconds | CPU seconds | MiB | files |",
            "|---|---|---|---|---|",
        ]
        for name, one in emoji["builds"].items():
            cells = (one["seconds"], one["cpu_seconds"], one["mib"], f"{one['files']:,}")
            lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
        lines += ["", *(f"- {value} {name}" for name, value in emoji["slopes"].items())]
        model, image = emoji["alone"]["model"], emoji["alone"]["images"]
        lines.append(
            f"- of these, in the same run: {model} CPU milliseconds an image for the checkpoint's "
            f"own module, up to the SAE's hook; {image} to draw it"
        )
    if browser:
        empty = browser["actions_ms"][EMPTY]["shown"]
        lines += [
            "",
            f"## The index of {browser['rows']:,} features in Chromium {browser['chromium']}",
            "",
            f"It opens in {browser['open_ms']:,} ms. Jumps all over it left "
            f"{browser['blank_places_while_scrolling']} places without a row. Milliseconds until "
            "the frame that shows the result, less those of doing nothing on an empty page "
            f"({empty} ms in the same run); aim: {TARGET_ACTION_MS:g}.",
            "",
            "| action | script | shown, less an empty page | CPU of the main thread |",
            "|---|---|---|---|",
        ]
        for name, took in browser["actions_ms"].items():
            if name != EMPTY:
                shown = round(took["shown"] - empty, 1)
                lines.append(f"| {name} | {took['script']} | {shown} | {took['cpu']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
