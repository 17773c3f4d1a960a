"""An evaluation under way: images through the loop, pairs of decoders, steering."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vision_plugin._allocator import freed_memory_kept
from vision_plugin._inputs import sentences
from vision_plugin._progress import Progress
from vision_plugin.evaluation._config import EvaluationConfig
from vision_plugin.evaluation._facts import Facts
from vision_plugin.evaluation._judges import Judges
from vision_plugin.evaluation._keep import EncodedImages, Keeper, pool
from vision_plugin.evaluation._loop import Loop, Subject, needs_class_texts
from vision_plugin.evaluation._offer import OF_WEIGHTS, ImageBatch
from vision_plugin.evaluation._part import Part, merge, ranges_of
from vision_plugin.formats import load_sae
from vision_plugin.images import read_batches
from vision_plugin.metrics import (
    MetricSet,
    monosemanticity,
    needs,
    steerability,
    steerability_curve,
)
from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.site import Site

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """An evaluation under way.

    Attributes:
        cfg: what was asked for.
        facts: of the images.
        subjects: the SAE first.
        metrics: names of the metrics that see the images, and of those that see weights alone.
        judges: who says which images are alike.
        results: by metric (and embedder, where there are several) and subject.
        failures: why a metric has no result, by ``metric/subject``.
    """

    cfg: EvaluationConfig
    facts: Facts
    subjects: list[Subject]
    metrics: list[str]
    judges: Judges
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    @property
    def site(self) -> Site:
        """Where the SAE reads and writes."""
        return self.subjects[0].site

    def score_images(self, *, progress: bool, engine: Any = None) -> EncodedImages:
        """Feed every metric with every image, and compute what they make of it.

        Args:
            progress: Show how far it is.
            engine: What feeds the images in ranges, on other machines; None feeds them here.

        Raises:
            ValueError: no image could be read.
        """
        facts, loop = self.facts, self.loop()
        keep = Keeper()
        bad: dict[str, str] = {}
        with Progress(len(facts.images), "scoring", shown=progress) as shown:
            for part in self._parts(loop, engine, shown):
                keep.extend(part.keep)
                bad |= part.bad
        if not keep.indices:
            raise ValueError("none of the images could be read")
        self._score_domains(loop)
        self._compute(loop)
        encoded = keep.finish(facts.images, bad, self.site.tokens, self.cfg.pooling)
        self._add_intervals(encoded)
        return encoded

    def loop(self) -> Loop:
        """Return a loop that has seen no image, with new metrics of every subject."""
        cfg, facts = self.cfg, self.facts
        of_images = [name for name in self.metrics if not self._sees_weights(name)]
        if cfg.centre_embeddings and not self.judges.centres:
            self.judges.centre(cfg.batch_size)
        facts.paths_read.clear()
        for subject in self.subjects:
            subject.groups.clear()
        self._add_metrics(of_images)
        class_texts = self._texts(facts.class_names) if needs_class_texts(of_images) else None
        return Loop(self.subjects, pooling=cfg.pooling, class_texts=class_texts, tolerant=True)

    def read(self, loop: Loop, places: range, at_once: int, shown: Progress | None = None) -> Part:
        """Feed a loop with the images at some places, and return what it keeps of them.

        Args:
            loop: As :meth:`loop` returned it.
            places: Places of the images.
            at_once: Images per forward pass.
            shown: Counts the images.
        """
        keep, bad = Keeper(), dict[str, str]()
        with freed_memory_kept():
            for images in read_batches(self.facts.images, at_once, bad, indices=places):
                batch = self._batch(images, embedded=True)
                self.facts.note_read(batch.indices)
                of_sae = loop.feed(batch)
                pooled = of_sae["sparse_latents" if of_sae.latents.is_sparse else "latents"]
                neurons = pool(of_sae.reading.source, self.cfg.pooling)
                keep.add(batch.indices, pooled, neurons, batch.embeddings)
                if shown is not None:
                    shown.advance(len(images))
        return Part(keep, bad)

    def _parts(self, loop: Loop, engine: Any, shown: Progress) -> Iterator[Part]:
        """Yield the parts of the pass over the images, in order."""
        places = range(len(self.facts.images))
        at_once = loop.images_at_once(self.cfg.batch_size)
        if engine is None:
            yield self.read(loop, places, at_once, shown)
            return
        ranges = ranges_of(len(places), at_once)
        waiting, done = dict[int, Part](), 0
        for number, part in engine.evaluation(self.cfg, ranges, at_once):
            waiting[number] = part
            shown.advance(len(part.keep.indices))
            while done in waiting:
                merge(loop, waiting[done])
                self.facts.note_read(waiting[done].keep.indices)
                yield waiting.pop(done)
                done += 1

    def compare_weights(self) -> None:
        """Feed pairs of decoders to the metrics that ask for them."""
        names = [name for name in self.metrics if self._sees_weights(name)]
        if not names:
            return
        others = [load_sae(path, device=self.cfg.device) for path in self.cfg.other_saes]
        for subject in self.subjects:
            pairs = MetricSet(names, subject.known(), options=self.cfg.options())
            for other in others:
                pair = {"decoder": subject.dictionary, "other": other}
                pairs.update({name: _directions(one) for name, one in pair.items()})
            for name, metric in pairs.metrics.items():
                self._keep_result(name, subject.key, metric)

    def steer(self, indices: list[int], *, progress: bool) -> None:
        """Score the steerability of every subject on images spread over those that were read.

        Every latent of the SAE is steered. Of a control that has more latents than there are
        neurons, random directions, as many as there are neurons tell as much.
        """
        cfg, model, facts = self.cfg, self.site.model, self.facts
        texts = self._texts(facts.concepts)
        step = max(1, len(indices) // cfg.steering_images)
        chosen = indices[::step][: cfg.steering_images]
        pixels = model.preprocess([facts.images[index] for index in chosen])
        for subject in self.subjects:
            latents = _steered_latents(subject)
            options: dict[str, Any] = {
                "strength": cfg.strength,
                "adaptive": cfg.adaptive,
                "keep_delta": False,
                "tokens": subject.site.tokens,
                "concepts": facts.concepts,
                "latents": latents,
                **cfg.options().get("steerability", {}),
            }
            total = len(chosen) * len(latents or range(int(subject.dictionary.cfg.d_sae)))
            shown = Progress(total, f"steering {subject.key}", shown=progress, of="passes")
            with self._caught("steerability", subject.key), shown:
                self.results.setdefault("steerability", {})[subject.key] = steerability(
                    subject.site.model,
                    subject.dictionary,
                    pixels,
                    texts,
                    watch=shown.advance,
                    **options,
                )
        if cfg.strengths and "steerability" in self.results:
            sae = self.subjects[0]
            total = len(chosen) * len(cfg.strengths) * int(sae.dictionary.cfg.d_sae)
            shown = Progress(total, "steering at strengths", shown=progress, of="passes")
            with self._caught("steerability_curve", "sae"), shown:
                curve = steerability_curve(
                    model,
                    sae.dictionary,
                    pixels,
                    texts,
                    strengths=cfg.strengths,
                    tokens=sae.site.tokens,
                    watch=shown.advance,
                )
                self.results["steerability_curve"] = {"sae": curve}

    # ------------------------------------------------------------------ parts

    @staticmethod
    def _sees_weights(name: str) -> bool:
        return bool(set(OF_WEIGHTS) & set(needs(name)[1]))

    def _batch(self, images: dict[int, Any], *, embedded: bool) -> ImageBatch:
        pixels = self.site.model.preprocess(list(images.values()))
        embeddings = self.judges.embed(images, pixels) if embedded else {}
        return ImageBatch(list(images), pixels, embeddings)

    def _add_metrics(self, names: list[str]) -> None:
        """Construct every subject's metrics."""
        widths = self.judges.widths()
        for subject in self.subjects:
            subject.add(names, widths=widths, options=self.cfg.options())

    def _score_domains(self, loop: Loop) -> None:
        """Feed the images of other domains to the metrics that ask for a domain."""
        for name, images in self.facts.domains.items():
            facts = Facts(images)
            for subject in self.subjects:
                subject.place = replace(subject.place, facts=facts)
            for found in read_batches(images, loop.images_at_once(self.cfg.batch_size), {}):
                batch = replace(self._batch(found, embedded=False), given={"domain": name})
                loop.feed(batch, only="domain")
            for subject in self.subjects:
                subject.place = replace(subject.place, facts=self.facts)

    def _compute(self, loop: Loop) -> None:
        for (subject, embedder, name), reason in loop.failures.items():
            self.failures[f"{self._key(name, embedder)}/{subject}"] = reason
        for one in self.subjects:
            for group in one.groups:
                for name, metric in group.metrics.metrics.items():
                    self._keep_result(self._key(name, group.embedder), one.key, metric)

    def _key(self, name: str, embedder: str | None) -> str:
        return name if embedder is None or len(self.judges.models) == 1 else f"{name}@{embedder}"

    def _keep_result(self, key: str, subject: str, metric: Any) -> None:
        with self._caught(key, subject):
            self.results.setdefault(key, {})[subject] = metric.compute()

    @contextmanager
    def _caught(self, key: str, subject: str) -> Iterator[None]:
        """Keep the reason of whatever goes wrong: one metric must not cost the others."""
        try:
            with torch.no_grad():
                yield
        except Exception as error:
            logger.warning("%s of %s is left out: %s", key, subject, error)
            self.failures[f"{key}/{subject}"] = str(error) or type(error).__name__

    def _add_intervals(self, encoded: EncodedImages) -> None:
        """Put jackknife intervals around monosemanticity, where latents were kept to do it."""
        confidence = self.cfg.confidence
        if confidence is None:
            return
        kept: dict[str, Tensor] = {"sae": encoded.latents, "neurons": encoded.neurons}
        for key, by_dictionary in self.results.items():
            name, _, embedder = key.partition("@")
            if name != "monosemanticity":
                continue
            embedded = encoded.embeddings[embedder] if embedder else encoded.first_embeddings
            for subject in kept.keys() & by_dictionary.keys():
                by_dictionary[subject] = monosemanticity(
                    kept[subject], embedded, confidence=confidence
                )

    def _texts(self, texts: list[str]) -> Tensor:
        named = sentences(self.cfg.concept_template, texts, argument="concept_template")
        embedded: Tensor = self.site.model.encode_text(named)
        return embedded


def _steered_latents(subject: Subject) -> list[int] | None:
    d_in, d_sae = int(subject.dictionary.cfg.d_in), int(subject.dictionary.cfg.d_sae)
    return None if subject.key == "sae" or d_sae <= d_in else list(range(d_in))


def _directions(dictionary: Dictionary) -> Tensor:
    W_dec = getattr(dictionary, "W_dec", None)
    if not isinstance(W_dec, Tensor):
        raise ValueError(f"{type(dictionary).__name__} has no W_dec to compare with another's")
    return W_dec.detach()
