"""The SAE under study and its controls, each with the metrics that it is scored by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from vision_plugin.evaluation._batch import offered
from vision_plugin.evaluation._config import USUAL_METRICS, EvaluationConfig
from vision_plugin.evaluation._facts import Facts
from vision_plugin.evaluation._randomized import randomized_model
from vision_plugin.images import BadImageError
from vision_plugin.metrics import (
    MetricSet,
    available,
    matryoshka_groups,
    needs,
    neuron_dictionary,
    pca_dictionary,
    random_dictionary,
    takes,
)
from vision_plugin.models import VisionBridge
from vision_plugin.models.dictionary import Dictionary, d_out
from vision_plugin.models.site import Site

CALIBRATION_IMAGES = 256
"""Images that principal components and the SAE's L0 are taken from, before the pass over all."""

WEIGHTS = {"decoder", "other"}
"""What a metric takes that compares dictionaries without any image."""

HINTS = {
    "labels": "images with labels, or --labels column:NAME",
    "logits": "images with labels, and a model with a text tower",
    "masks": "--masks",
    "n_concepts": "--masks",
    "taxonomy_paths": "--taxonomy",
    "sibling_groups": "images with labels, and --taxonomy",
    "domains": "--domain-images",
    "domain": "--domain-images",
    "decoder": "--other-saes",
    "other": "--other-saes",
    "text_embeddings": "--concepts, --steering-images above 0 and a model with a text tower",
    "patch_latents": "--tokens patch or all, and an SAE at a hook with patches",
}


@dataclass
class Subject:
    """A dictionary that is scored."""

    key: str
    """``sae``, or the name of a control."""
    site: Site
    dictionary: Dictionary
    known: dict[str, Any]
    """Constructor arguments for its metrics."""
    sets: dict[str | None, MetricSet] = field(default_factory=dict)
    """Metrics by embedder; None for those that need no embeddings."""
    pairs: MetricSet | None = None
    """Metrics that compare its weights with another dictionary's."""

    def build(
        self, names: list[str], widths: Mapping[str, int], options: Mapping[str, Any]
    ) -> None:
        """Construct the metrics: those that use embeddings once per embedder."""
        embedded = [name for name in names if "embeddings" in takes(name)[1]]
        plain = [name for name in names if name not in embedded]
        self.sets[None] = MetricSet(plain, self.known, options=options)
        for embedder, width in widths.items():
            known = {**self.known, "d_embed": width}
            self.sets[embedder] = MetricSet(embedded, known, options=options)


def make_subjects(
    cfg: EvaluationConfig, model: VisionBridge, sae: Dictionary, facts: Facts, paths: list[Any]
) -> list[Subject]:
    """The SAE and the controls that were asked for.

    Args:
        cfg: names the controls.
        model: the SAE's model.
        sae: the SAE.
        facts: of the images.
        paths: filled with the taxonomy path of each image as the images are read.
    """
    site = Site.of(model, sae, tokens=cfg.tokens)
    hook, tokens = site.hook_name, site.tokens
    inside = Site(model, hook, hook, tokens)
    d_in, d_sae = int(sae.cfg.d_in), int(sae.cfg.d_sae)
    subjects = [Subject("sae", site, sae, _known(cfg, site, sae, facts, paths))]
    tokens_seen, l0 = torch.empty(0), 1.0
    if {"pca", "random"} & set(cfg.controls):
        tokens_seen, l0 = _calibrate(cfg, site, sae, facts)
    for control in cfg.controls:
        where, place = inside, {"hook_name": hook, "tokens": tokens}
        if control == "pca":
            dictionary = pca_dictionary(tokens_seen)
        elif control == "random":
            k = min(d_sae, max(1, round(l0)))
            dictionary = random_dictionary(d_in, d_sae, k=k, seed=cfg.seed)
        else:
            dictionary = neuron_dictionary(d_in)
        if control == "random_model":
            where = Site(randomized_model(model, seed=cfg.seed), hook, hook, tokens)
        dictionary = dictionary.at(**place).to(model.device)
        known = _known(cfg, where, dictionary, facts, paths)
        subjects.append(Subject(control, where, dictionary, known))
    return subjects


def choose_metrics(
    cfg: EvaluationConfig, subject: Subject, facts: Facts
) -> tuple[list[str], dict[str, str]]:
    """The metrics that are run, and the others with the reason why not.

    Raises:
        ValueError: a metric that was named does not exist, or lacks something.
        ImportError: a metric that was named cannot be imported.
    """
    everything = cfg.metrics == ("all",)
    left_out = {}
    wanted = list(cfg.metrics or USUAL_METRICS)
    if everything:
        listed = available()
        wanted = [name for name, info in listed.items() if info.usable]
        left_out = {name: str(info.error) for name, info in listed.items() if not info.usable}
    at_hand = offered(subject.site, facts) | (WEIGHTS if cfg.other_saes else set())
    chosen = []
    for name in wanted:
        of_constructor, of_batch = needs(name)
        missing = [n for n in of_constructor if n not in subject.known and n != "d_embed"]
        missing += [n for n in of_batch if n not in at_hand]
        given = cfg.options().get(name, {})
        missing = [n for n in missing if n not in given]
        if not missing:
            chosen.append(name)
            continue
        hints = dict.fromkeys(HINTS.get(n, "nothing that this command has") for n in missing)
        left_out[name] = f"needs {', '.join(missing)}: {'; '.join(hints)}"
        if cfg.metrics and not everything:
            raise ValueError(f"--metrics {name} {left_out[name]}")
    return chosen, left_out


def read_batches(
    images: Any, batch_size: int, bad: dict[str, str], *, progress: bool = False
) -> Iterator[dict[int, Any]]:
    """Images by place; those that cannot be read go to ``bad``, by id, with the reason."""
    starts = range(0, len(images), batch_size)
    for start in track(starts, "Scoring images", disable=not progress, transient=True):
        batch = {}
        for index in range(start, min(start + batch_size, len(images))):
            try:
                batch[index] = images[index]
            except BadImageError as error:
                bad[images.ids[index]] = str(error)
        if batch:
            yield batch


def _known(
    cfg: EvaluationConfig, site: Site, dictionary: Dictionary, facts: Facts, paths: list[Any]
) -> dict[str, Any]:
    config = dictionary.cfg
    known: dict[str, Any] = {
        "n_features": int(config.d_sae),
        "d_in": d_out(dictionary),
        "model": site.model,
        "sae": dictionary,
        "tokens": site.tokens,
        "token_kinds": site.token_kinds,
    }
    if site.patch_rows is not None:
        known["grid_size"] = site.model.token_layout().grid
    if facts.concepts and cfg.steering_images and site.model.adapter.has_joint_space:
        known |= {"text_embeddings": None, "concepts": facts.concepts, "strength": cfg.strength}
    if facts.has_labels:
        known["class_names"] = facts.class_names
    if cfg.taxonomy is not None:
        known["taxonomy_paths"] = paths
        widths = cfg.group_widths or config.metadata.get("matryoshka_widths")
        if widths and list(widths)[-1] == int(config.d_sae):
            known["groups"] = matryoshka_groups(list(widths))
        if facts.has_labels:
            known["sibling_groups"] = facts.sibling_groups
    if cfg.domain_images:
        known["domains"] = list(cfg.domain_images)
    if facts.masks is not None:
        known["n_concepts"] = len(facts.masks.names)
    return known


@torch.no_grad()
def _calibrate(
    cfg: EvaluationConfig, site: Site, sae: Dictionary, facts: Facts
) -> tuple[Tensor, float]:
    """Activations ``[tokens, d_in]`` of some images, and how many latents fire on a token."""
    images = facts.images
    few = min(CALIBRATION_IMAGES, len(images))
    step = 1 if getattr(images, "sequential", False) else len(images) // few
    harvester, kept, active, n_tokens = site.harvester(), [], 0, 0
    at_once = site.images_at_once(int(sae.cfg.d_in), cfg.batch_size)
    for batch in read_batches(_Every(images, step, few), at_once, {}):
        reading = site.read(harvester(site.model.preprocess(list(batch.values()))))
        active += reading.encode(sae).n_active
        n_tokens += reading.source.shape[:-1].numel()
        kept.append(reading.source.flatten(0, -2).float().cpu())
    if n_tokens == 0:
        raise ValueError("none of the images could be read")
    return torch.cat(kept), active / n_tokens


@dataclass(frozen=True)
class _Every:
    """Each ``step``-th image of a source, ``count`` of them."""

    images: Any
    step: int
    count: int

    @property
    def ids(self) -> list[str]:
        return list(self.images.ids[:: self.step][: self.count])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> Any:
        return self.images[place * self.step]
