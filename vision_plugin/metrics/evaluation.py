"""``vision-plugin eval``: a trained SAE beside the raw neurons, on pictures and concepts."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vision_plugin.activations import open_images
from vision_plugin.metrics._controls import neuron_dictionary
from vision_plugin.metrics._monosemanticity import MonosemanticityResult, monosemanticity
from vision_plugin.metrics._result import to_json
from vision_plugin.metrics._steerability import steerability
from vision_plugin.metrics._steerability_result import SteerabilityResult
from vision_plugin.models import VisionBridge, load_model
from vision_plugin.models._fit import check_fit
from vision_plugin.sae._encoding import EncodedImages, encode_images
from vision_plugin.sae.foreign import load_sae

logger = logging.getLogger(__name__)

SCHEMA = "vision_plugin.evaluation/1"


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """What to score an SAE on."""

    sae: str
    """Folder of the SAE, or any checkpoint that ``vp.load_sae`` reads."""
    images: str
    """Folder, ``imagefolder:...``, Parquet file, data set name, tar shards, or ``demo:N``."""
    model_name: str | None = None
    """The model; by default the one the SAE's metadata names."""
    embedder: str | None = None
    """Model whose embeddings say which images are alike; by default the model itself, which the
    result then marks, since an outside encoder is the stricter judge."""
    concepts: str | None = None
    """For steerability: ``labels`` or ``column:NAME`` of the images, or a text file, a concept a
    line."""
    concept_template: str = "{}"
    """Sentence around a concept, for example ``a picture of {}``."""
    output_path: str | None = None
    """JSON file of the results; ``evaluation.json`` beside the SAE by default."""
    tokens: str | None = None
    """Which tokens to encode and steer; by default those the SAE was trained on."""
    pooling: str = "max"
    """Image-level latents are the ``max`` or the ``mean`` over tokens."""
    monosemanticity_images: str = "all"
    """``all`` or ``top16``: the two definitions in use."""
    steering_images: int = 32
    """Images to steer on; 0 leaves steerability out."""
    strength: float = 150.0
    """Value that a latent, or neuron, is set to."""
    batch_size: int = 64
    """Images per forward pass."""
    image_column: str | None = None
    """Column of pictures, where a data set has several."""
    split: str | None = None
    """Split of a data set."""
    device: str = "cpu"
    """Where to compute."""

    def __post_init__(self) -> None:
        choices = {"pooling": ("max", "mean"), "monosemanticity_images": ("all", "top16")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: use {' or '.join(allowed)}")


@dataclass(frozen=True)
class Evaluation:
    """An SAE's scores, and the neurons' beside them."""

    config: EvaluationConfig
    encoded: EncodedImages
    monosemanticity: dict[str, MonosemanticityResult]
    """By dictionary: ``sae`` and ``neurons``."""
    steerability: dict[str, SteerabilityResult] | None
    """Likewise; None where no concepts were given."""
    concepts: list[str]
    own_embeddings: bool
    """Whether the similarities are the model's own."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the configuration, summaries, and every number per latent."""
        per_latent: dict[str, Any] = {
            "monosemanticity": {k: v.to_dict() for k, v in self.monosemanticity.items()}
        }
        if self.steerability is not None:
            per_latent["steerability"] = {
                name: {k: v for k, v in result.to_dict().items() if k not in ("delta", "concepts")}
                for name, result in self.steerability.items()
            }
        return {
            "schema": SCHEMA,
            "config": asdict(self.config),
            "embeddings": "model" if self.own_embeddings else "external",
            "n_images": len(self.encoded.ids),
            "bad_images": self.encoded.bad_images,
            "fidelity": to_json(self.encoded.fidelity),
            "summary": to_json(self.summaries()),
            "concepts": self.concepts,
            "per_latent": per_latent,
        }

    def summaries(self) -> dict[str, dict[str, Any]]:
        """Summaries of each metric by dictionary."""
        table = {f"monosemanticity/{name}": r.summary() for name, r in self.monosemanticity.items()}
        if self.steerability is not None:
            table |= {f"steerability/{n}": r.summary() for n, r in self.steerability.items()}
        return table


def evaluate(cfg: EvaluationConfig, *, progress: bool = False) -> Evaluation:
    """Score an SAE and the neurons it reads, and write the results as JSON.

    Raises:
        ValueError: the SAE, model, images or concepts are not there or do not fit together.
    """
    sae = load_sae(cfg.sae, device=cfg.device)
    model = load_model(cfg.model_name or model_of(sae, cfg.sae), device=cfg.device)
    check_fit(model, sae)
    pictures = open_images(cfg.images, column=cfg.image_column, split=cfg.split)
    concepts = read_concepts(cfg.concepts, pictures) if cfg.steering_images else []
    return evaluate_with(
        cfg, model=model, sae=sae, pictures=pictures, concepts=concepts, progress=progress
    )


def evaluate_with(
    cfg: EvaluationConfig,
    *,
    model: VisionBridge,
    sae: Any,
    pictures: Any,
    concepts: list[str],
    progress: bool = False,
) -> Evaluation:
    """:func:`evaluate` for a model, an SAE, pictures and concepts in hand."""
    embedder = model if cfg.embedder is None else load_model(cfg.embedder, device=cfg.device)
    encoded = encode_images(
        model,
        sae,
        pictures,
        tokens=cfg.tokens,
        pooling=cfg.pooling,  # type: ignore[arg-type]  # checked in __post_init__
        embedders={"embedder": embedder},
        batch_size=cfg.batch_size,
        progress=progress,
    )
    result = Evaluation(
        config=cfg,
        encoded=encoded,
        monosemanticity=score_monosemanticity(encoded, cfg.monosemanticity_images),
        steerability=_score_steerability(cfg, model, sae, pictures, encoded, concepts),
        concepts=concepts,
        own_embeddings=cfg.embedder is None,
    )
    write_json(result.to_dict(), Path(cfg.output_path or Path(cfg.sae) / "evaluation.json"))
    return result


def score_monosemanticity(
    encoded: EncodedImages, images: str = "all"
) -> dict[str, MonosemanticityResult]:
    """Monosemanticity of the SAE's latents and of the neurons, on the same images."""
    embeddings = encoded.embeddings["embedder"]
    dictionaries: dict[str, Tensor] = {"sae": encoded.latents, "neurons": encoded.neurons}
    return {
        name: monosemanticity(latents, embeddings, images=images)  # type: ignore[arg-type]
        for name, latents in dictionaries.items()
    }


def _score_steerability(
    cfg: EvaluationConfig,
    model: VisionBridge,
    sae: Any,
    pictures: Any,
    encoded: EncodedImages,
    concepts: list[str],
) -> dict[str, SteerabilityResult] | None:
    if not concepts:
        logger.info("no concepts were given: steerability is left out")
        return None
    texts = model.encode_text([cfg.concept_template.format(concept) for concept in concepts])
    step = max(1, len(encoded.indices) // cfg.steering_images)
    chosen = encoded.indices[::step][: cfg.steering_images]
    pixels = model.preprocess([pictures[i] for i in chosen])
    hook_name = sae.cfg.metadata["hook_name"]
    neurons = neuron_dictionary(int(sae.cfg.d_in)).at(hook_name)
    with torch.no_grad():
        return {
            name: steerability(
                model,
                dictionary,
                pixels,
                texts,
                strength=cfg.strength,
                tokens=encoded.tokens,
                concepts=concepts,
                keep_delta=False,
            )
            for name, dictionary in {"sae": sae, "neurons": neurons}.items()
        }


def model_of(sae: Any, path: str) -> str:
    """The model that an SAE's metadata names.

    Raises:
        ValueError: it names none.
    """
    name = sae.cfg.metadata.get("model_name")
    if not name:
        raise ValueError(f"{path} does not say which model it was trained on: give --model-name")
    return str(name)


def read_concepts(concepts: str | None, pictures: Any) -> list[str]:
    """Distinct concepts, from a column of the images or a text file; none where None.

    Raises:
        ValueError: there is no such column, or the file is empty.
        FileNotFoundError: there is no such file.
    """
    if concepts is None:
        return []
    kind, _, column = concepts.partition(":")
    if concepts == "labels":
        if pictures.labels is None:
            raise ValueError("--concepts labels: these images have no labels")
        return list(dict.fromkeys(pictures.labels))
    if kind == "column":
        return list(dict.fromkeys(str(value) for value in pictures.column(column)))
    path = Path(concepts)
    if not path.is_file():
        raise FileNotFoundError(
            f"--concepts {concepts}: there is no such file; a column of the images is written "
            "column:NAME, their labels are written labels"
        )
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    found = list(dict.fromkeys(line for line in lines if line))
    if not found:
        raise ValueError(f"{concepts} has no concepts: write one a line")
    return found


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write strict JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
