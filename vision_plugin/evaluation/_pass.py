"""One pass of the images through the model, the dictionaries and the embedders."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vision_plugin.evaluation._batch import make_batch, pool
from vision_plugin.evaluation._config import EvaluationConfig
from vision_plugin.evaluation._facts import Facts
from vision_plugin.evaluation._keep import EncodedImages, Keeper
from vision_plugin.evaluation._lazy_batch import LazyBatch
from vision_plugin.evaluation._subjects import WEIGHTS, Subject, read_batches
from vision_plugin.formats import load_sae
from vision_plugin.metrics import (
    MetricSet,
    SteerabilityCurve,
    feed,
    get,
    monosemanticity,
    needs,
    steerability,
    steerability_curve,
    takes,
)
from vision_plugin.models import Harvester, VisionBridge
from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.site import Site

logger = logging.getLogger(__name__)

OWN = "model"
"""Name of the model under study among the embedders."""


@dataclass
class Run:
    """An evaluation under way.

    Attributes:
        cfg: what was asked for.
        facts: of the images.
        subjects: the SAE first.
        metrics: names of the metrics that see the images, and of those that see weights alone.
        embedders: models by name.
        paths: taxonomy paths of the images read so far, shared with the metrics.
    """

    cfg: EvaluationConfig
    facts: Facts
    subjects: list[Subject]
    metrics: list[str]
    embedders: dict[str, VisionBridge]
    paths: list[Any]

    @property
    def site(self) -> Site:
        """Where the SAE reads."""
        return self.subjects[0].site

    def score_images(self, *, progress: bool = False) -> EncodedImages:
        """Feed every metric with every image.

        Raises:
            ValueError: no image could be read, or a metric refused its input.
        """
        cfg, facts, model = self.cfg, self.facts, self.site.model
        of_images = [n for n in self.metrics if not WEIGHTS & set(needs(n)[1])]
        class_texts = self._class_texts(of_images)
        keep = Keeper()
        bad: dict[str, str] = {}
        feeder = _Feeder(self.subjects, facts, class_texts)
        for batch in read_batches(facts.images, self._at_once(), bad, progress=progress):
            indices, images = list(batch), list(batch.values())
            pixels = model.preprocess(images)
            embeddings = {name: self._embed(name, images, pixels) for name in self.embedders}
            if not self.subjects[0].sets:
                widths = {name: embedded.shape[1] for name, embedded in embeddings.items()}
                for subject in self.subjects:
                    subject.build(of_images, widths, cfg.options())
            if facts.taxonomy_paths is not None:
                self.paths += [facts.taxonomy_paths[index] for index in indices]
            extra = {"domain": "home"} if cfg.domain_images else {}
            for subject, source, offer in feeder(indices, pixels):
                with_domain = offer.plus(**extra) if extra else offer
                for embedder, metrics in subject.sets.items():
                    one = with_domain
                    if embedder is not None:
                        one = with_domain.plus(embeddings=embeddings[embedder])
                    metrics.update(one)
                if subject is self.subjects[0]:
                    pooled = offer["sparse_latents" if "sparse_latents" in offer else "latents"]
                    keep.add(indices, pooled, pool(source, cfg.pooling), embeddings)
        if not keep.indices:
            raise ValueError("none of the images could be read")
        return keep.finish(facts.images, bad, self.site.tokens, cfg)

    def score_domains(self, *, progress: bool = False) -> None:
        """Feed the images of other domains to the metrics that ask for a domain."""
        model = self.site.model
        bare = replace(self.cfg, labels=None, taxonomy=None, masks=None)
        for name, images in self.facts.domains.items():
            feeder = _Feeder(self.subjects, Facts(bare, images, []), None)
            for batch in read_batches(images, self._at_once(), {}, progress=progress):
                pixels = model.preprocess(list(batch.values()))
                for subject, _, offer in feeder(list(batch), pixels):
                    one = offer.plus(domain=name)
                    for metric in subject.sets[None].metrics.values():
                        if "domain" in takes(type(metric))[1]:
                            feed(metric, one)

    def compare_weights(self) -> None:
        """Feed pairs of decoders to the metrics that ask for them."""
        names = [name for name in self.metrics if WEIGHTS & set(needs(name)[1])]
        if not names:
            return
        others = [load_sae(path, device=self.cfg.device) for path in self.cfg.other_saes]
        for subject in self.subjects:
            subject.pairs = MetricSet(names, subject.known, options=self.cfg.options())
            for other in others:
                pair = {"decoder": subject.dictionary, "other": other}
                subject.pairs.update({name: _directions(one) for name, one in pair.items()})

    def compute(self) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """What the metrics make of all they were fed.

        Returns:
            Results by metric (and embedder, where there are several) and subject, and why others
            have none.
        """
        results: dict[str, dict[str, Any]] = {}
        failures = {}
        for subject in self.subjects:
            parts = [*subject.sets.items(), (None, subject.pairs)]
            for embedder, name, metric in (
                (embedder, name, metric)
                for embedder, part in parts
                if part is not None
                for name, metric in part.metrics.items()
            ):
                key = name if embedder is None or len(self.embedders) == 1 else f"{name}@{embedder}"
                try:
                    results.setdefault(key, {})[subject.key] = metric.compute()
                except (ValueError, RuntimeError, ImportError) as error:
                    # After a long pass, one metric that cannot answer must not cost the others.
                    logger.warning("%s of %s: %s", key, subject.key, error)
                    failures[f"{key}/{subject.key}"] = str(error)
        return {key: found for key, found in results.items() if found}, failures

    def add_intervals(self, results: dict[str, dict[str, Any]], encoded: EncodedImages) -> None:
        """Put jackknife intervals around monosemanticity, where latents were kept to do it."""
        confidence = self.cfg.confidence
        if confidence is None:
            return
        kept: dict[str, Tensor] = {"sae": encoded.latents, "neurons": encoded.neurons}
        for key, by_dictionary in results.items():
            name, _, embedder = key.partition("@")
            if name != "monosemanticity":
                continue
            embedded = encoded.embeddings[embedder] if embedder else encoded.first_embeddings
            for subject in kept.keys() & by_dictionary.keys():
                by_dictionary[subject] = monosemanticity(
                    kept[subject], embedded, confidence=confidence
                )

    def steer(self, indices: list[int]) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
        """Steerability of every subject on images spread over those that could be read.

        Every latent of the SAE is steered. Of a control that has more latents than there are
        neurons, random directions, as many as there are neurons tell as much.

        Returns:
            Results by metric and subject, and why others have none.
        """
        cfg, model = self.cfg, self.site.model
        texts = self._texts(self.facts.concepts)
        step = max(1, len(indices) // cfg.steering_images)
        chosen = indices[::step][: cfg.steering_images]
        pixels = model.preprocess([self.facts.images[i] for i in chosen])
        results: dict[str, dict[str, Any]] = {}
        failures = {}
        for subject in self.subjects:
            options: dict[str, Any] = {
                "strength": cfg.strength,
                "adaptive": cfg.adaptive,
                "keep_delta": False,
            }
            options |= {"tokens": subject.site.tokens, "concepts": self.facts.concepts}
            options["latents"] = _steered_latents(subject)
            options |= cfg.options().get("steerability", {})
            try:
                with torch.no_grad():
                    scored = steerability(
                        subject.site.model, subject.dictionary, pixels, texts, **options
                    )
                results.setdefault("steerability", {})[subject.key] = scored
            except ValueError as error:
                failures[f"steerability/{subject.key}"] = str(error)
        if cfg.strengths and results:
            results["steerability_curve"] = {"sae": self._curve(pixels, texts)}
        return results, failures

    def _curve(self, pixels: Tensor, texts: Tensor) -> SteerabilityCurve:
        sae, strengths = self.subjects[0], self.cfg.strengths
        with torch.no_grad():
            return steerability_curve(
                sae.site.model,
                sae.dictionary,
                pixels,
                texts,
                strengths=strengths,
                tokens=sae.site.tokens,
            )

    def _texts(self, texts: list[str]) -> Tensor:
        template = self.cfg.concept_template
        embedded: Tensor = self.site.model.encode_text([template.format(text) for text in texts])
        return embedded

    def _class_texts(self, names: list[str]) -> Tensor | None:
        wanted = {"logits", "spliced_logits", "ablated_logits"}
        if not any(wanted & set(takes(name)[1]) for name in names):
            return None
        return self._texts(self.facts.class_names)

    def _embed(self, name: str, images: list[Any], pixels: Tensor) -> Tensor:
        embedder = self.embedders[name]
        own = pixels if name == OWN else embedder.preprocess(images)
        with torch.no_grad():
            return embedder.image_features(own).float().cpu()

    def _at_once(self) -> int:
        dense = any(
            {"token_latents", "patch_latents"} & set(takes(name)[1])
            and not getattr(get(name), "sparse_latents", False)
            for name in self.metrics
        )
        widths = [
            int(subject.dictionary.cfg.d_sae if dense else subject.dictionary.cfg.d_in)
            for subject in self.subjects
        ]
        return self.site.images_at_once(max(widths), self.cfg.batch_size)


def _steered_latents(subject: Subject) -> list[int] | None:
    d_in, d_sae = int(subject.dictionary.cfg.d_in), int(subject.dictionary.cfg.d_sae)
    return None if subject.key == "sae" or d_sae <= d_in else list(range(d_in))


def _directions(dictionary: Dictionary) -> Tensor:
    W_dec = getattr(dictionary, "W_dec", None)
    if not isinstance(W_dec, Tensor):
        raise ValueError(f"{type(dictionary).__name__} has no W_dec to compare with another's")
    return W_dec.detach()


class _Feeder:
    """What a batch of images offers for each subject; each model runs once for all of them."""

    def __init__(self, subjects: list[Subject], facts: Any, class_texts: Tensor | None) -> None:
        self.subjects, self.facts, self.class_texts = subjects, facts, class_texts
        sites = {subject.site for subject in subjects}
        self.harvesters: Mapping[Site, Harvester] = {site: site.harvester() for site in sites}

    def __call__(
        self, indices: list[int], pixels: Tensor
    ) -> Iterator[tuple[Subject, Tensor, LazyBatch]]:
        read = {}
        for subject in self.subjects:
            site = subject.site
            if site not in read:
                read[site] = site.read(self.harvesters[site](pixels))
            offer = make_batch(
                site, subject.dictionary, self.facts, indices, pixels, read[site], self.class_texts
            )
            yield subject, read[site].source, offer
