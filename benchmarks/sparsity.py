"""Every architecture on every layer at equal sparsity, beside neurons, components and chance.

    python -m benchmarks.sparsity                  # minutes on two cores
    python -m benchmarks.sparsity --small          # seconds, to see that it works

The model and the images are the emoji CLIP and noto's emoji beside the checkout; --model-name and
--images take others that have names to steer towards. All SAEs are trained in one pass over three
quarters of the images and scored on the others. TopK, BatchTopK, Matryoshka and matching pursuit
are given the number of active latents; the weight of the sparsity penalty of the others is steered
while they train until they have as many, and kept at the very end.

A table goes to ``benchmarks/results/sparsity.md``, every number to ``sparsity.json`` beside it.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track
from sae_lens import (
    BatchTopKTrainingSAEConfig,
    GatedTrainingSAEConfig,
    JumpReLUTrainingSAEConfig,
    MatchingPursuitTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    StandardTrainingSAEConfig,
    TopKTrainingSAEConfig,
    TrainingSAEConfig,
)
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # a bare checkout works, too

import vision_plugin as vp
from benchmarks._machine import machine
from vision_plugin import metrics
from vision_plugin.images import open_images
from vision_plugin.metrics import to_json
from vision_plugin.models import Harvester, VisionBridge
from vision_plugin.sae import VisionMultiSAETrainingRunner, VisionSAERunnerConfig
from vision_plugin.sae._initialise import estimate_scalers, initialise
from vision_plugin.sae._preparing import record_origin
from vision_plugin.sae._saving import inference_sae
from vision_plugin.sae._sources import origin
from vision_plugin.sae._trainer import SteppedTrainer

logger = logging.getLogger("benchmarks.sparsity")

RESULTS = Path(__file__).parent / "results"
SHARED = Path(__file__).parents[2] / "shared"
SCHEMA = "vision_plugin.benchmarks.sparsity/1"
GAIN = 0.03
"""How strongly a penalty's weight follows the ratio of the latents that fire to those wanted."""
SETTLED = 0.95
"""Share of the run after which the weights are kept."""


@dataclass(frozen=True)
class Config:
    """Sizes of the benchmark."""

    model_name: str = str(SHARED / "models" / "emoji-clip")
    """A CLIP."""
    images: str = str(SHARED / "data" / "noto.parquet")
    """Images."""
    concepts: str = "name"
    """Column of the words to steer towards."""
    template: str = "a picture of {}"
    """Sentence around a word."""
    layers: tuple[int, ...] = ()
    """Blocks behind which to read; all by default."""
    architectures: tuple[str, ...] = ()
    """Names as in the table; all by default."""
    l0: int = 16
    """Latents active per token."""
    d_sae: int = 768
    """Latents."""
    training_tokens: int = 96_000
    """Vectors that each SAE is trained on."""
    batch: int = 384
    """Vectors per step."""
    lr: float = 1e-3
    """Learning rate."""
    steered_latents: int = 32
    """Latents of each dictionary to steer, drawn at random."""
    steering_images: int = 6
    """Images to steer on."""
    strength: float = 150.0
    """What a latent is set to."""
    threads: int = 2
    """Threads of torch."""
    seed: int = 0
    """Seed of everything random."""
    small: bool = False
    """Shrink everything to seconds; writes no file unless --out is given."""
    out: Path | None = None
    """Folder of the results; benchmarks/results by default."""


@dataclass(frozen=True)
class Row:
    """One dictionary at one layer."""

    layer: int
    dictionary: str
    n_latents: int
    l0: float
    explained_variance: float
    monosemanticity: float
    """Mean over the latents with a score."""
    n_scored: int
    mean_similarity: float
    """What a latent that fires at random tends to."""
    dead: int
    """Latents that fire on no held-out token."""
    steerable: float
    """Share of the steered latents whose score exceeds 0.10."""
    n_steered: int


def sae_configs(cfg: Config, d_in: int) -> dict[str, TrainingSAEConfig]:
    """The architectures by the names of the table, at the same width and sparsity."""
    shape: dict[str, Any] = {"d_in": d_in, "d_sae": cfg.d_sae}
    scaled = {**shape, "normalize_activations": "expected_average_only_in"}
    k = {"k": cfg.l0}
    batch_k = {"k": float(cfg.l0), "topk_threshold_lr": 0.05}
    widths = [cfg.d_sae // 8, cfg.d_sae // 4, cfg.d_sae // 2, cfg.d_sae]
    every: dict[str, TrainingSAEConfig] = {
        "standard": StandardTrainingSAEConfig(**scaled, l1_coefficient=1.0),
        "gated": GatedTrainingSAEConfig(**scaled, l1_coefficient=1.0),
        "jumprelu": JumpReLUTrainingSAEConfig(
            **scaled,
            l0_coefficient=1.0,
            jumprelu_sparsity_loss_mode="tanh",
            jumprelu_bandwidth=2.0,
            jumprelu_init_threshold=0.1,
            jumprelu_ste_to_input=True,
        ),
        "topk": TopKTrainingSAEConfig(**scaled, **k),
        "batchtopk": BatchTopKTrainingSAEConfig(**scaled, **batch_k),
        "matryoshka batchtopk": MatryoshkaBatchTopKTrainingSAEConfig(
            **scaled, **batch_k, matryoshka_widths=widths
        ),
        "matching pursuit": MatchingPursuitTrainingSAEConfig(
            **scaled, decoder_init_norm=1.0, max_iterations=cfg.l0, residual_threshold=0.0
        ),
    }
    unknown = sorted(set(cfg.architectures) - set(every))
    if unknown:
        raise ValueError(f"no architecture is named {unknown[0]!r}: choose from {list(every)}")
    return {name: every[name] for name in cfg.architectures or every}


class Part:
    """Some of the images of a collection."""

    def __init__(self, source: Any, indices: list[int]) -> None:
        self.source, self.indices = source, indices
        self.ids = [source.ids[index] for index in indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.source[self.indices[index]]


def train(
    cfg: Config, model: VisionBridge, images: Part, layers: list[int]
) -> dict[tuple[int, str], Any]:
    """SAEs by layer and architecture, from one pass."""
    architectures = sae_configs(cfg, int(model.cfg.d_model))
    plain = VisionSAERunnerConfig(
        sae=next(iter(architectures.values())),
        model_name=cfg.model_name,
        images=cfg.images,
        hook_name=hook(layers[0]),
        training_tokens=cfg.training_tokens,
        train_batch_size_tokens=cfg.batch,
        store_batch_size_images=64,
        n_batches_in_buffer=16,
        n_batches_for_norm_estimate=8,
        lr=cfg.lr,
        lr_decay_steps=cfg.training_tokens // cfg.batch // 5,
        dead_feature_window=100,
        b_dec_init_method="geometric_median",
        decoder_init_method="data",
        seed=cfg.seed,
        output_path=None,
    )
    runs = {
        f"{layer} {name}": replace(plain, sae=sae, hook_name=hook(layer))
        for layer in layers
        for name, sae in architectures.items()
    }
    runner = VisionMultiSAETrainingRunner(runs, output_path=None, model=model, images=images)
    trainers = {
        name: SteppedTrainer(
            cfg=run.to_sae_trainer_config(), sae=runner.saes[name], data_provider=runner.batches
        )
        for name, run in runner.cfgs.items()
    }
    sample = runner.batches.sample()
    estimate_scalers(trainers, runner.batches, n_batches=plain.n_batches_for_norm_estimate)
    for name, trainer in trainers.items():
        record_origin(trainer.sae, origin(runner.cfgs[name], model, images))
        initialise(trainer, sample[name], runner.cfgs[name])
    n_steps = plain.total_training_steps
    for step in track(range(n_steps), f"Training {len(trainers)} SAEs", transient=True):
        batch = next(runner.batches)
        for name, trainer in trainers.items():
            output = trainer.step(batch[name])
            trainer.n_training_steps += 1
            if step < SETTLED * n_steps:
                follow(trainer, float(output.feature_acts.bool().float().sum(-1).mean()), cfg.l0)
    saes = {name: inference_sae(t.sae, t.activation_scaler) for name, t in trainers.items()}
    keys = [(layer, name) for layer in layers for name in architectures]
    return dict(zip(keys, saes.values(), strict=True))


def follow(trainer: SteppedTrainer, l0: float, wanted: int) -> None:
    """Move the weight of a sparsity penalty towards the one that gives the wanted L0."""
    for name, scheduler in trainer.coefficient_schedulers.items():
        if name in ("l0", "l1"):
            ratio = min(max(l0, 0.1) / wanted, 10.0)
            scheduler.final_value = scheduler.current_value = scheduler.value * ratio**GAIN


def hook(layer: int) -> str:
    """Where a layer is read."""
    return f"blocks.{layer}.hook_resid_post"


@dataclass(frozen=True)
class HeldOut:
    """What dictionaries are scored on."""

    activations: dict[int, Tensor]
    """[images, tokens, d_model] by layer."""
    embeddings: Tensor
    pixels: Tensor
    """Of the images to steer on."""
    texts: Tensor


@torch.no_grad()
def look_at(cfg: Config, model: VisionBridge, images: Part, layers: list[int]) -> HeldOut:
    """Run the held-out images through the model once."""
    harvest = Harvester(model, [hook(layer) for layer in layers])
    activations: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    embeddings = []
    for start in range(0, len(images), 64):
        batch = [images[i] for i in range(start, min(start + 64, len(images)))]
        pixels = model.preprocess(batch)
        found = harvest(pixels)
        for layer in layers:
            activations[layer].append(found[hook(layer)])
        embeddings.append(model.image_features(pixels))
    step = max(1, len(images) // cfg.steering_images)
    steered = [images[i] for i in range(0, len(images), step)][: cfg.steering_images]
    words = dict.fromkeys(str(value) for value in images.source.column(cfg.concepts))
    return HeldOut(
        {layer: torch.cat(parts) for layer, parts in activations.items()},
        torch.cat(embeddings).float(),
        model.preprocess(steered),
        model.encode_text([cfg.template.format(word) for word in words]),
    )


def dictionaries(
    cfg: Config, saes: dict[tuple[int, str], Any], trained_on: dict[int, Tensor]
) -> Iterator[tuple[int, str, Any]]:
    """Every SAE, and behind each layer's the three that nobody trained."""
    layers = list(dict.fromkeys(layer for layer, _ in saes))
    for layer in layers:
        for (sae_layer, name), sae in saes.items():
            if sae_layer == layer:
                yield layer, name, sae
        rows = trained_on[layer].flatten(0, 1)
        d_in, centre = rows.shape[1], rows.mean(0)
        place = hook(layer)
        yield layer, "neurons", metrics.neuron_dictionary(d_in).at(place)
        yield layer, "PCA", metrics.pca_dictionary(rows, k=min(cfg.l0, d_in)).at(place)
        drawn = metrics.random_dictionary(d_in, cfg.d_sae, k=cfg.l0, seed=cfg.seed)
        centred = metrics.ControlDictionary("random", drawn.W_dec, centre, k=cfg.l0)
        yield layer, "random", centred.at(place)


@torch.no_grad()
def score(
    cfg: Config, model: VisionBridge, held: HeldOut, layer: int, name: str, dictionary: Any
) -> Row:
    """One row of the table."""
    x = held.activations[layer]
    n_latents = int(dictionary.cfg.d_sae)
    fidelity = metrics.FVU(d_in=x.shape[-1], definition="per_dimension")
    fired, active, pooled = torch.zeros(n_latents), 0.0, []
    for part in x.split(64):
        latents = dictionary.encode(part)
        fidelity.update(part, dictionary.decode(latents))
        fires = latents != 0
        fired += fires.flatten(0, 1).sum(0)
        active += float(fires.sum())
        pooled.append(latents.amax(1))
    mono = metrics.monosemanticity(torch.cat(pooled), held.embeddings)
    defined = mono.score[~mono.score.isnan()]
    generator = torch.Generator().manual_seed(cfg.seed)
    chosen = torch.randperm(n_latents, generator=generator)[: cfg.steered_latents].sort().values
    steered = metrics.steerability(
        model,
        dictionary,
        held.pixels,
        held.texts,
        strength=cfg.strength,
        latents=chosen,
        keep_delta=False,
    )
    return Row(
        layer=layer,
        dictionary=name,
        n_latents=n_latents,
        l0=active / (x.shape[0] * x.shape[1]),
        explained_variance=fidelity.compute().explained_variance,
        monosemanticity=float(defined.mean()) if len(defined) else float("nan"),
        n_scored=len(defined),
        mean_similarity=mono.mean_similarity,
        dead=int((fired == 0).sum()),
        steerable=float(steered.steerable.double().mean()),
        n_steered=len(chosen),
    )


def table(cfg: Config, rows: list[Row], n_images: int) -> str:
    """The rows as Markdown."""
    lines = [
        f"{cfg.d_sae} latents, {cfg.training_tokens:,} vectors of {cfg.batch} a step, L0 of "
        f"{cfg.l0} wanted; scored on {n_images} held-out images with the model's own image "
        f"embeddings (mean similarity {rows[0].mean_similarity:.3f}); steering to "
        f"{cfg.strength:g} on {cfg.steering_images} images, {cfg.steered_latents} latents each.",
        "",
        "| layer | dictionary | L0 | explained variance | MS | dead | steerable |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row.layer} | {row.dictionary} | {row.l0:.1f} | {row.explained_variance:.3f} | "
            f"{row.monosemanticity:.3f} | {row.dead} of {row.n_latents} | {row.steerable:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train, score, print and write."""
    cfg = tyro.cli(Config, description=__doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if cfg.small:
        small = {"training_tokens": 20_000, "steered_latents": 8, "steering_images": 2}
        cfg = replace(cfg, layers=cfg.layers or (4,), d_sae=min(cfg.d_sae, 256), **small)
    torch.set_num_threads(cfg.threads)
    start = time.perf_counter()
    model, source = vp.load_model(cfg.model_name), open_images(cfg.images)
    layers = list(cfg.layers or range(int(model.cfg.n_layers)))
    seen = Part(source, [i for i in range(len(source)) if i % 4])
    held_out = Part(source, list(range(0, len(source), 4)))
    saes = train(cfg, model, seen, layers)
    trained = time.perf_counter()
    held = look_at(cfg, model, held_out, layers)
    few = Part(source, seen.indices[:: max(1, len(seen) // 128)])
    components = look_at(replace(cfg, steering_images=1), model, few, layers).activations
    rows = [
        score(cfg, model, held, layer, name, dictionary)
        for layer, name, dictionary in track(
            list(dictionaries(cfg, saes, components)), "Scoring", transient=True
        )
    ]
    seconds = {"training": trained - start, "scoring": time.perf_counter() - trained}
    text = table(cfg, rows, len(held_out))
    Console().print(Markdown(text))
    logger.info("trained in %.0f s, scored in %.0f s", seconds["training"], seconds["scoring"])
    out = cfg.out or (None if cfg.small else RESULTS)
    if out is not None:
        write(cfg, rows, seconds, text, out)


def write(cfg: Config, rows: list[Row], seconds: dict[str, float], text: str, out: Path) -> None:
    """The table, and every number with what it was measured on."""
    out.mkdir(parents=True, exist_ok=True)
    settings = {**asdict(cfg), "model_name": Path(cfg.model_name).name, "out": None}
    settings["images"] = Path(cfg.images).name
    document = {
        "schema": SCHEMA,
        "machine": machine("sae-lens", "transformer-lens"),
        "config": settings,
        "seconds": seconds,
        "rows": [asdict(row) for row in rows],
    }
    (out / "sparsity.json").write_text(json.dumps(to_json(document), indent=1) + "\n")
    (out / "sparsity.md").write_text(text)


if __name__ == "__main__":
    main()
