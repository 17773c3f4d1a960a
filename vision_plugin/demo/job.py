"""The whole job on drawn images: model, activations, SAE, metrics, steering, report.

Everything runs through the code that serves real checkpoints and real images. Since the world's
factors are known, the job also places the metrics' scores between truth and noise.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from sae_lens import BatchTopKTrainingSAEConfig
from torch import Tensor

from vision_plugin._disk import write_json
from vision_plugin._ours import (
    REPORT,
    SAE_FOLDER,
    check_replaceable,
    check_replaceable_file,
)
from vision_plugin._paths import local_path
from vision_plugin.activations import ExtractionConfig, check_folder, extract
from vision_plugin.demo import Scene, concept_vocabulary, draw, factor_codes
from vision_plugin.demo.answers import Answers, Naming, ask, choose_latents, name_latents
from vision_plugin.evaluation import EvaluationConfig, evaluate_config
from vision_plugin.images import open_images
from vision_plugin.metrics import MonosemanticityResult, monosemanticity
from vision_plugin.models import load_model
from vision_plugin.sae import VisionSAERunnerConfig, VisionSAETrainingRunner

KIND = "vision_plugin.demo/"
SCHEMA = f"{KIND}1"
FACTORS_OF_TRUTH = ("shape", "colour", "texture", "background")
OBJECT = FACTORS_OF_TRUTH[:3]
TRAINING_BATCH = 512
_WRITTEN = re.compile(r"\.|(activations|sae|report|results)(\.|$)|evaluation\.json$")
"""Names of what a run writes into its folder, and of what a killed one leaves."""
Announce = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Size and place of the demo run."""

    output_path: str = "demo-results"
    """Folder of the results."""
    hook_name: str = "blocks.3.mlp.hook_post"
    """Hook that the SAE reads: the neurons of the last block's MLP."""
    tokens: str = "cls"
    """Tokens that the SAE reads: the class token, which becomes the image embedding."""
    training_images: int = 4000
    """Number of images to train on."""
    training_tokens: int = 150_000
    """Number of activations to train on, with repetition."""
    d_sae: int = 256
    """Number of latents of the SAE."""
    k: int = 8
    """Mean number of active latents per token."""
    images: int = 2000
    """Number of other images to score it on."""
    steered_latents: int = 5
    """Number of latents to steer and show."""
    seed: int = 0
    """Seed of everything random."""

    def __post_init__(self) -> None:
        least = {
            "training_images": 1,
            "images": 1,
            "d_sae": 1,
            "k": 1,
            "steered_latents": 0,
            "seed": 0,
        }
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {bound}")


@dataclass(frozen=True)
class TruthTest:
    """Monosemanticity of known factors, and of the same codes under a random rotation."""

    factors: float
    rotation: float
    mean_similarity: float


@dataclass(frozen=True)
class DemoResult:
    """Results of the run; ``results.json`` holds them and the evaluation's numbers."""

    own_code: dict[str, TruthTest]
    """Tests by factor, with the factor's own one-hot code as the embedding."""
    ladder: dict[str, float]
    """Mean score with image embeddings: factors, SAE, neurons, rotation, mean similarity."""
    evaluation: Any
    answers: dict[int, Answers]
    """What the model answers while a latent is held, by latent."""
    report: Path | None
    seconds: dict[str, float] = field(default_factory=dict)


def run_demo(cfg: DemoConfig, announce: Announce) -> DemoResult:
    """Run the whole job.

    It writes results.json, activations/, sae/ and report/ below ``output_path``, and replaces
    what an earlier run wrote there.

    Args:
        cfg: Size and place of the run.
        announce: Function called with one line per stage.

    Raises:
        FileExistsError: one of these is there and no run wrote it.
        StoreError: activations/ holds something that no extraction wrote.
    """
    seconds: dict[str, float] = {}
    out = local_path(cfg.output_path)
    # Each checks itself, before anything is written.
    extraction, training = _extraction(cfg, out), _training(cfg, out)
    scoring = _evaluation(cfg, out)
    for part, kind in ((out / "sae", SAE_FOLDER), (out / "report", REPORT)):
        check_replaceable(part, kind)
    check_replaceable_file(out / "results.json", KIND)
    check_folder(out / "activations")
    _check_ours(out)
    with _stage("Loading the packaged CLIP as a TransformerLens bridge", seconds, announce):
        model = load_model("demo")
    with _stage(f"Extracting activations of {cfg.training_images} images", seconds, announce):
        extract(extraction, model=model)
    with _stage(f"Training a BatchTopK SAE at {cfg.hook_name}", seconds, announce):
        sae = VisionSAETrainingRunner(training, model=model).run()
    with _stage(f"Scoring it on {cfg.images} new images, neurons beside it", seconds, announce):
        world = draw(cfg.images, seed=cfg.seed + 1)
        images = open_images(f"demo:{cfg.images}@{cfg.seed + 1}")
        vocabulary = concept_vocabulary()
        concepts = [concept.text for concept in vocabulary]
        evaluation = evaluate_config(
            scoring,
            sae=sae,
            model=model,
            images=images,
            concepts=concepts,
        )
        embeddings = evaluation.encoded.first_embeddings
        own_code = {
            factor: own_code_test(world.scenes, factor, cfg.seed) for factor in FACTORS_OF_TRUTH
        }
        ladder = score_ladder(world.scenes, embeddings, evaluation.monosemanticity, cfg.seed)
    with _stage("Steering features by their names", seconds, announce):
        texts = model.encode_text(concepts)
        naming = name_latents(evaluation.encoded.latents, embeddings, texts, vocabulary)
        answers = _steer(cfg, model, sae, evaluation, naming, images, world.scenes, texts)
    with _stage("Writing the HTML report", seconds, announce):
        names = [concepts[name] for name in naming.names]
        report = _report(model, sae, images, evaluation, names, out / "report")
    result = DemoResult(own_code, ladder, evaluation, answers, report, seconds)
    write_json(to_dict(cfg, result), out / "results.json")
    return result


def _check_ours(out: Path) -> None:
    """Raise FileExistsError where the folder of the run holds something that no run writes."""
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    strangers = [name for name in names if not _WRITTEN.match(name)]
    if strangers:
        raise FileExistsError(
            f"{', '.join(f'{out / name}' for name in strangers[:3])}: no demo wrote it, and one "
            "writes into a folder of its own; name another output_path="
        )


def own_code_test(scenes: tuple[Scene, ...], factor: str, seed: int) -> TruthTest:
    """Return the scores of a factor's one-hot code with itself as the embedding, plain and rotated.

    One latent per value of the factor scores 1: all images it fires on are alike in that factor.
    Rotated with the codes of every other factor, a latent fires on all values alike and tends to
    the mean similarity of the images.
    """
    codes, _ = one_hot(scenes, factor)
    everything = torch.cat([one_hot(scenes, name)[0] for name in FACTORS_OF_TRUTH], dim=1)
    result = monosemanticity(codes, codes)
    rotated = monosemanticity(everything @ rotation(everything.shape[1], seed), codes)
    return TruthTest(
        result.summary()["mean_score"], rotated.summary()["mean_score"], result.mean_similarity
    )


def score_ladder(
    scenes: tuple[Scene, ...],
    embeddings: Tensor,
    trained: dict[str, MonosemanticityResult],
    seed: int,
) -> dict[str, float]:
    """Return mean monosemanticity with image embeddings, from known truth down to noise.

    The true factors are one latent for each combination of shape, colour and texture; the rotated
    factors are the same latents, rotated.
    """
    truth = true_latents(scenes)
    rotated = truth @ rotation(truth.shape[1], seed)
    scores = {
        "true factors": monosemanticity(truth, embeddings),
        "trained SAE": trained["sae"],
        "raw neurons": trained["neurons"],
        "rotated factors": monosemanticity(rotated, embeddings),
    }
    means = {name: result.summary()["mean_score"] for name, result in scores.items()}
    return {**means, "mean similarity": trained["sae"].mean_similarity}


def true_latents(scenes: tuple[Scene, ...]) -> Tensor:
    """Return one latent for each shape, colour and texture together, 1 where an image shows it."""
    shapes, colours, textures = (one_hot(scenes, name)[0] for name in OBJECT)
    return torch.einsum("ns,nc,nt->nsct", shapes, colours, textures).flatten(1)


def one_hot(scenes: tuple[Scene, ...], factor: str) -> tuple[Tensor, tuple[str, ...]]:
    """Return a factor's one-hot code ``[n, values]`` as a float64 tensor, and the values' names."""
    codes, names = factor_codes(scenes, factor)
    return torch.as_tensor(codes, dtype=torch.float64), tuple(names)


def rotation(size: int, seed: int) -> Tensor:
    """Return a random orthogonal matrix, Haar-distributed, float64."""
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    rotated: Tensor = q * torch.sign(torch.diagonal(r))
    return rotated


def _extraction(cfg: DemoConfig, out: Path) -> ExtractionConfig:
    return ExtractionConfig(
        model_name="demo",
        images=f"demo:{cfg.training_images}@{cfg.seed}",
        hook_names=(cfg.hook_name,),
        tokens=cfg.tokens,
        output_path=str(out / "activations"),
        overwrite=True,  # an earlier run may have had other settings
        batch_size=64,
    )


def _training(cfg: DemoConfig, out: Path) -> VisionSAERunnerConfig:
    batch_size = min(TRAINING_BATCH, cfg.training_images)
    steps = cfg.training_tokens // batch_size
    return VisionSAERunnerConfig(
        model_name="demo",
        images=str(out / "activations"),
        hook_name=cfg.hook_name,
        tokens=cfg.tokens,
        sae=BatchTopKTrainingSAEConfig(d_in=0, d_sae=cfg.d_sae, k=cfg.k),
        defaults="saelens",  # a narrow SAE on sparse neurons, whose settings were found by hand
        training_tokens=cfg.training_tokens,
        train_batch_size_tokens=batch_size,
        n_batches_in_buffer=4,
        lr=1e-3,
        lr_decay_steps=steps // 4,
        dead_feature_window=max(1, steps // 5),
        b_dec_init_method="mean",
        seed=cfg.seed,
        output_path=str(out / "sae"),
        overwrite=True,
    )


def _evaluation(cfg: DemoConfig, out: Path) -> EvaluationConfig:
    return EvaluationConfig(
        sae=str(out / "sae"),
        images=f"demo:{cfg.images}@{cfg.seed + 1}",
        controls=("neurons",),
        steering_images=24,
    )


def _steer(
    cfg: DemoConfig,
    model: Any,
    sae: Any,
    evaluation: Any,
    naming: Naming,
    images: Any,
    scenes: tuple[Scene, ...],
    texts: Tensor,
) -> dict[int, Answers]:
    """Return the answers while latents are held whose names agree with what steering makes."""
    n_active = evaluation.monosemanticity["sae"].n_active
    steered = evaluation.steerability["sae"]
    chosen = choose_latents(
        naming, steered.top_concept, steered.score, n_active, cfg.steered_latents
    )
    return {
        latent: ask(
            model,
            sae,
            latent,
            naming=naming,
            strength=evaluation.config.strength,
            images=images,
            scenes=scenes,
            texts=texts,
        )
        for latent in chosen
    }


def _report(
    model: Any, sae: Any, images: Any, evaluation: Any, names: list[str], out: Path
) -> Path:
    from vision_plugin.report import report

    return report(
        sae,
        model,
        images,
        out,
        evaluation=evaluation.to_dict(),
        compare="neurons",
        names=[name.removeprefix("a picture of ") for name in names],
        title="Features of the demo CLIP",
    )


def to_dict(cfg: DemoConfig, result: DemoResult) -> dict[str, Any]:
    """Return the run as a dictionary ready for JSON."""
    return {
        "schema": SCHEMA,
        "config": asdict(cfg),
        "own_code": {factor: asdict(test) for factor, test in result.own_code.items()},
        "ladder": result.ladder,
        "steered": {str(latent): asdict(found) for latent, found in result.answers.items()},
        "evaluation": result.evaluation.to_dict(),
        "seconds": result.seconds,
    }


@contextmanager
def _stage(line: str, seconds: dict[str, float], announce: Announce) -> Iterator[None]:
    announce(line)
    start = time.perf_counter()
    yield
    seconds[line] = round(time.perf_counter() - start, 2)
