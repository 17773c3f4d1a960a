"""``vision-plugin eval``: a trained SAE beside its controls, by any of the registered metrics."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vision_plugin.evaluation._config import USUAL_METRICS, Control, EvaluationConfig
from vision_plugin.evaluation._facts import Facts, read_concepts
from vision_plugin.evaluation._keep import EncodedImages
from vision_plugin.evaluation._pass import OWN, Run
from vision_plugin.evaluation._subjects import choose_metrics, make_subjects
from vision_plugin.formats import load_sae
from vision_plugin.images import open_images
from vision_plugin.metrics import MonosemanticityResult, SteerabilityResult, summary_of, to_json
from vision_plugin.models import VisionBridge, load_model
from vision_plugin.models.site import check_fit

logger = logging.getLogger(__name__)

SCHEMA = "vision_plugin.evaluation/1"

__all__ = [
    "USUAL_METRICS",
    "Control",
    "Evaluation",
    "EvaluationConfig",
    "evaluate",
    "evaluate_with",
    "model_of",
    "read_concepts",
    "write_json",
]


@dataclass(frozen=True)
class Evaluation:
    """An SAE's scores, and those of its controls beside them."""

    config: EvaluationConfig
    encoded: EncodedImages
    """Image-level latents, neurons and embeddings."""
    results: dict[str, dict[str, Any]]
    """By metric and then by dictionary: ``sae``, and the controls by name. With several embedders
    a metric that uses embeddings is there once for each, as ``metric@embedder``."""
    concepts: list[str]
    embedders: dict[str, bool]
    """By name, whether it is the model under study itself."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Why a metric, or ``metric/dictionary``, has no result."""

    @property
    def monosemanticity(self) -> dict[str, MonosemanticityResult]:
        """By dictionary, with the first embedder; empty where it was not asked for."""
        first = next(iter(self.embedders))
        found = self.results.get("monosemanticity")
        return found or self.results.get(f"monosemanticity@{first}", {})

    @property
    def steerability(self) -> dict[str, SteerabilityResult] | None:
        """By dictionary; None where there were no concepts or it was not asked for."""
        return self.results.get("steerability")

    @property
    def dictionaries(self) -> list[str]:
        """What was scored: ``sae`` first."""
        return list(dict.fromkeys(["sae", *(key for by in self.results.values() for key in by)]))

    @property
    def own_embeddings(self) -> bool:
        """Whether the similarities are the model's own throughout."""
        return all(self.embedders.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: the configuration, summaries, and every number per latent."""
        per_latent: dict[str, Any] = {}
        details: dict[str, Any] = {}
        for name, by_dictionary in self.results.items():
            score = getattr(by_dictionary.get("sae"), "score", None)
            has_scores = isinstance(score, Tensor) and score.ndim == 1
            place = per_latent if has_scores else details
            place[name] = {key: _plain(result) for key, result in by_dictionary.items()}
        return {
            "schema": SCHEMA,
            "config": asdict(self.config),
            "embeddings": "model" if self.own_embeddings else "external",
            "embedders": {
                name: "model" if is_own else "external" for name, is_own in self.embedders.items()
            },
            "n_images": len(self.encoded.ids),
            "bad_images": self.encoded.bad_images,
            "fidelity": to_json(self.encoded.fidelity),
            "summary": to_json(self.summaries()),
            "left_out": self.left_out,
            "concepts": self.concepts,
            "per_latent": per_latent,
            "details": details,
        }

    def summaries(self) -> dict[str, dict[str, Any]]:
        """Summaries as ``metric/dictionary``."""
        return {
            f"{name}/{key}": summary_of(result)
            for name, by_dictionary in self.results.items()
            for key, result in by_dictionary.items()
        }


def evaluate(cfg: EvaluationConfig, *, progress: bool = False) -> Evaluation:
    """Score an SAE and its controls, and write the results as JSON.

    Raises:
        ValueError: the SAE, model, images, concepts or metrics are not there or do not fit
            together.
    """
    sae = load_sae(cfg.sae, device=cfg.device)
    model = load_model(cfg.model_name or model_of(sae, cfg.sae), device=cfg.device)
    check_fit(model, sae)
    images = open_images(cfg.images, column=cfg.image_column, split=cfg.split)
    concepts = read_concepts(cfg.concepts, images) if cfg.steering_images else []
    return evaluate_with(
        cfg, model=model, sae=sae, images=images, concepts=concepts, progress=progress
    )


def evaluate_with(
    cfg: EvaluationConfig,
    *,
    model: VisionBridge,
    sae: Any,
    images: Any,
    concepts: list[str],
    progress: bool = False,
) -> Evaluation:
    """:func:`evaluate` for a model, an SAE, images and concepts in hand."""
    facts = Facts(cfg, images, concepts)
    embedders = _embedders(cfg, model, sae)
    paths: list[Any] = []
    subjects = make_subjects(cfg, model, sae, facts, paths)
    chosen, left_out = choose_metrics(cfg, subjects[0], facts)
    # Steering has a way of its own, which runs the model below the hook once for all latents.
    of_pass = [name for name in chosen if name != "steerability"]
    run = Run(cfg, facts, subjects, of_pass, embedders, paths)
    encoded = run.score_images(progress=progress)
    run.score_domains(progress=progress)
    run.compare_weights()
    results, failures = run.compute()
    run.add_intervals(results, encoded)
    if "steerability" in chosen:
        steered, unsteered = run.steer(encoded.indices)
        failures |= unsteered
        results |= steered
    if not results and chosen:
        raise ValueError(f"no metric could be computed: {next(iter(failures.values()))}")
    encoded.fidelity.update(_fidelity(results))
    result = Evaluation(
        config=cfg,
        encoded=encoded,
        results={name: results[name] for name in _order(cfg, results)},
        concepts=concepts,
        embedders={name: name == OWN for name in embedders},
        left_out=left_out | failures,
    )
    write_json(result.to_dict(), Path(cfg.output_path or Path(cfg.sae) / "evaluation.json"))
    return result


def model_of(sae: Any, path: str) -> str:
    """The model that an SAE's metadata names.

    Raises:
        ValueError: it names none.
    """
    name = sae.cfg.metadata.get("model_name")
    if not name:
        raise ValueError(f"{path} does not say which model it was trained on: give --model-name")
    return str(name)


def write_json(content: dict[str, Any], path: Path) -> None:
    """Write strict JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        unfinished.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _embedders(cfg: EvaluationConfig, model: VisionBridge, sae: Any) -> dict[str, VisionBridge]:
    """Models by name; the model under study is called ``model`` however it was named."""
    itself = {OWN, cfg.model_name, sae.cfg.metadata.get("model_name")}
    names = dict.fromkeys(OWN if name in itself else name for name in cfg.embedder or (OWN,))
    return {name: model if name == OWN else load_model(name, device=cfg.device) for name in names}


def _fidelity(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The numbers that every reader looks for first, where they were computed."""
    found: dict[str, float] = {}
    if "fvu" in results:
        fvu = results["fvu"]["sae"]
        found |= {"explained_variance": fvu.explained_variance, "cosine": fvu.cosine}
    if "sparsity" in results:
        found["l0"] = results["sparsity"]["sae"].l0
    return found


def _order(cfg: EvaluationConfig, results: dict[str, Any]) -> list[str]:
    """Metrics in the order in which they were asked for."""
    wanted = list(cfg.metrics or USUAL_METRICS)
    place = {name: index for index, name in enumerate(wanted)}
    return sorted(results, key=lambda name: place.get(name.partition("@")[0], len(place)))


def _plain(result: Any) -> Any:
    """A result as JSON, without what is as large as the vocabulary times the latents."""
    plain = to_json(result)
    if isinstance(result, SteerabilityResult):
        plain = {name: value for name, value in plain.items() if name not in ("delta", "concepts")}
    return plain
