"""``vision-plugin eval``: a trained SAE beside its controls, by any of the registered metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vision_plugin._disk import write_json
from vision_plugin._engines import opened
from vision_plugin._inputs import named
from vision_plugin._ours import check_replaceable_file
from vision_plugin._paths import local_path
from vision_plugin.evaluation._choice import USUAL_METRICS, choose_metrics
from vision_plugin.evaluation._config import EvaluationConfig
from vision_plugin.evaluation._controls import make_subjects
from vision_plugin.evaluation._facts import Facts, read_concepts
from vision_plugin.evaluation._judges import OWN, Judges
from vision_plugin.evaluation._keep import EncodedImages
from vision_plugin.evaluation._part import Part, taken
from vision_plugin.evaluation._run import Run
from vision_plugin.metrics import (
    EqualFiringResult,
    MonosemanticityResult,
    SteerabilityResult,
    compare_at_equal_firing,
    summary_of,
    to_json,
)
from vision_plugin.models import VisionBridge
from vision_plugin.models.site import Site

KIND = "vision_plugin.evaluation/"
SCHEMA = f"{KIND}1"


@dataclass(frozen=True)
class Evaluation:
    """An SAE's scores, and those of its controls beside them.

    Examples:
        >>> found = vp.evaluate(sae, model, world.images[:4], metrics=["fvu"], controls=())
        >>> list(found.summaries()), found.dictionaries
        (['fvu/sae'], ['sae'])
    """

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
    seen_in_training: bool = False
    """Whether the SAE's metadata says that it was trained on these images."""

    @property
    def path(self) -> Path | None:
        """The JSON of the results: ``output_path``, or beside an SAE that has a folder."""
        return _place(self.config)

    @property
    def monosemanticity(self) -> dict[str, MonosemanticityResult]:
        """By dictionary, with the first embedder; empty where it was not asked for."""
        first = next(iter(self.embedders))
        found = self.results.get("monosemanticity")
        return found or self.results.get(f"monosemanticity@{first}", {})

    @property
    def equal_firing(self) -> dict[str, EqualFiringResult]:
        """Monosemanticity of the SAE beside random directions that fire as often, by embedder."""
        found = {}
        for key, by_dictionary in self.results.items():
            name, _, embedder = key.partition("@")
            if name == "monosemanticity" and {"sae", "random"} <= by_dictionary.keys():
                found[embedder or next(iter(self.embedders))] = compare_at_equal_firing(
                    by_dictionary["sae"], by_dictionary["random"]
                )
        return found

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
            plain = {key: _plain(result) for key, result in by_dictionary.items()}
            of_sae = plain.get("sae")
            score = of_sae.get("score") if isinstance(of_sae, dict) else None
            has_scores = isinstance(score, list) and not any(isinstance(s, list) for s in score)
            (per_latent if has_scores else details)[name] = plain
        return {
            "schema": SCHEMA,
            "config": asdict(self.config),
            "embeddings": "model" if self.own_embeddings else "external",
            "embedders": {
                name: "model" if is_own else "external" for name, is_own in self.embedders.items()
            },
            "equal_firing": to_json(self.equal_firing),
            "seen_in_training": self.seen_in_training,
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


def evaluate(
    sae: Any,
    model: Any = None,
    images: Any = None,
    *,
    progress: bool = True,
    engine: Any = None,
    **settings: Any,
) -> Evaluation:
    """Score an SAE beside its controls by any registered metrics.

    Args:
        sae: An SAE in hand, or its folder, or any checkpoint that ``vp.load_sae`` reads.
        model: A VisionBridge in hand, or a name for ``vp.load_model``; None takes the model that
            the SAE's metadata names.
        images: Whatever ``vp.open_images`` takes.
        progress: Show how far it is on a terminal, or log a line every half minute.
        engine: Where the images go through the model: ``"ray"``, an engine in hand such as
            ``vision_plugin.scale.RayEngine(address="auto")``, or None for this process. The
            numbers are the same. An engine opens the SAE, the model and the images by name.
        **settings: Fields of :class:`EvaluationConfig`: ``metrics``, ``controls`` and so on;
            ``concepts`` may be a list of texts. Results are written to ``output_path``, or beside
            an SAE that came from a folder.

    Raises:
        ValueError: the SAE, model, images, concepts or metrics are not there or do not fit
            together.

    Examples:
        >>> found = vp.evaluate(sae, model, "demo:8", metrics=["fvu"], controls=("neurons",))
        >>> list(found.results["fvu"])
        ['sae', 'neurons']
        >>> round(found.results["fvu"]["neurons"].explained_variance, 3)
        1.0
    """
    concepts = settings.pop("concepts", None)
    given = {name: _settled(value) for name, value in settings.items()}
    if isinstance(concepts, str):
        given["concepts"], concepts = concepts, None
    given["model_name"] = named(model) if isinstance(model, str) else given.get("model_name")
    cfg = EvaluationConfig(sae=named(sae), images=named(images), **given)
    in_hand = None if isinstance(model, str) else model
    if engine is not None and not (isinstance(sae, str | Path) and isinstance(images, str | Path)):
        raise ValueError(
            "an engine opens the SAE and the images on every machine: give sae= and images= by name"
        )
    return evaluate_config(
        cfg,
        sae=sae,
        model=in_hand,
        images=images,
        concepts=concepts,
        progress=progress,
        engine=engine,
    )


def evaluate_config(
    cfg: EvaluationConfig,
    *,
    sae: Any = None,
    model: VisionBridge | None = None,
    images: Any = None,
    concepts: Sequence[str] | None = None,
    progress: bool = True,
    engine: Any = None,
) -> Evaluation:
    """Score what a configuration names, and write the results as JSON.

    Args:
        cfg: What to score, and how.
        sae: An SAE in hand, in place of ``cfg.sae``.
        model: A model in hand, in place of ``cfg.model_name``.
        images: Images in hand, in place of ``cfg.images``.
        concepts: Concepts in hand, in place of ``cfg.concepts``.
        progress: As in :func:`evaluate`.
        engine: As in :func:`evaluate`.

    Raises:
        ValueError: as :func:`evaluate` raises it.
        FileExistsError: where the results go is something that no evaluation wrote.

    Examples:
        >>> cfg = vp.evaluation.EvaluationConfig(
        ...     sae="runs/sae", images="demo:8", metrics=("fvu",), controls=(), output_path="fvu"
        ... )
        >>> vp.evaluation.evaluate_config(cfg, sae=sae, model=model).encoded.latents.shape
        torch.Size([8, 256])
    """
    place = _place(cfg)
    if place is not None:
        check_replaceable_file(place, KIND)
    run, chosen, left_out = open_run(cfg, sae=sae, model=model, images=images, concepts=concepts)
    with opened(engine) as elsewhere:
        encoded = run.score_images(progress=progress, engine=elsewhere)
    run.compare_weights()
    if "steerability" in chosen:
        run.steer(encoded.indices, progress=progress)
    results = {name: found for name, found in run.results.items() if found}
    if not results and chosen:
        raise ValueError(f"no metric could be computed: {next(iter(run.failures.values()))}")
    encoded.fidelity.update(_fidelity(results))
    result = Evaluation(
        config=cfg,
        encoded=encoded,
        results={name: results[name] for name in _order(cfg, results)},
        concepts=run.facts.concepts,
        embedders={name: name == OWN for name in run.judges.models},
        left_out=left_out | run.failures,
        seen_in_training=run.subjects[0].dictionary.cfg.metadata.get("dataset_path") == cfg.images,
    )
    if place is not None:
        check_replaceable_file(place, KIND)
        write_json(result.to_dict(), place)
    return result


def open_run(
    cfg: EvaluationConfig,
    *,
    sae: Any = None,
    model: VisionBridge | None = None,
    images: Any = None,
    concepts: Sequence[str] | None = None,
) -> tuple[Run, list[str], dict[str, str]]:
    """Open what a configuration names.

    Returns:
        The run, which has seen no image; the metrics that were chosen; why others are left out.

    Raises:
        ValueError: as :func:`evaluate` raises it.
    """
    sae = cfg.open_sae(cfg.sae if sae is None else sae)
    model = cfg.open_model(sae, model, where=cfg.sae)
    site = Site.of(model, sae, tokens=cfg.tokens)
    images = cfg.open_images(images)
    if concepts is None:
        concepts = read_concepts(cfg.concepts, images)
    facts = Facts(
        images,
        labels=cfg.labels,
        concepts=concepts if cfg.steering_images else [],
        taxonomy=cfg.taxonomy,
        group_widths=cfg.group_widths,
        masks=cfg.masks,
        domain_images=cfg.domain_images,
        domain_split=cfg.domain_split,
    )
    itself = {cfg.model_name, sae.cfg.metadata.get("model_name")}
    judges = Judges(cfg.embedder, model, itself, facts)
    subjects = make_subjects(
        sae, site, facts, controls=cfg.controls, batch_size=cfg.batch_size, seed=cfg.seed
    )
    chosen, left_out = choose_metrics(
        cfg.metrics,
        subjects[0],
        options=cfg.options(),
        compares_weights=bool(cfg.other_saes),
    )
    # Steering has a way of its own, which runs the model below the hook once for all latents.
    of_loop = [name for name in chosen if name != "steerability"]
    return Run(cfg, facts, subjects, of_loop, judges), chosen, left_out


def _place(cfg: EvaluationConfig) -> Path | None:
    if cfg.output_path is not None:
        return local_path(cfg.output_path)
    folder = local_path(cfg.sae)
    return folder / "evaluation.json" if folder.is_dir() else None


def _settled(value: Any) -> Any:
    """A list as the tuple that a frozen configuration holds."""
    return tuple(value) if isinstance(value, list) else value


def _fidelity(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The numbers that every reader looks for first, where they were computed."""
    found: dict[str, float] = {}
    if "sae" in results.get("fvu", {}):
        fvu = results["fvu"]["sae"]
        found |= {"explained_variance": fvu.explained_variance, "cosine": fvu.cosine}
    if "sae" in results.get("sparsity", {}):
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


_opened: dict[str, Run] = {}
"""The run that a worker has opened, by its configuration."""


def score_part(cfg: EvaluationConfig, places: range, at_once: int) -> Part:
    """Feed new metrics with a range of the images, in any process of any machine.

    Args:
        cfg: What to score, and how; the process keeps what it opens for the next range.
        places: Places of the images.
        at_once: Images per forward pass.

    Raises:
        ValueError: as :func:`evaluate` raises it.

    Examples:
        >>> cfg = vp.evaluation.EvaluationConfig(
        ...     sae="runs/sae", images="demo:8", metrics=("fvu",), controls=()
        ... )
        >>> part = vp.evaluation.score_part(cfg, range(0, 4), 4)
        >>> type(part).__name__
        'Part'
    """
    key = repr(cfg)
    if key not in _opened:
        _opened.clear()
        _opened[key], _, _ = open_run(cfg)
    run = _opened[key]
    loop = run.loop()
    part = run.read(loop, places, at_once)
    return Part(part.keep, part.bad, taken(loop), loop.failures)
