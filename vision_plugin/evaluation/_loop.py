"""The one loop that scores: every dictionary's metrics, over batches of images.

``vp.evaluate``, the validation while an SAE is trained, the sparsity study and the report's ranking
run it with different metrics.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from vision_plugin.evaluation._lazy_batch import LazyBatch
from vision_plugin.evaluation._offer import ImageBatch, Offer, Place, known_of
from vision_plugin.metrics import MetricSet, feed, needs, takes
from vision_plugin.models import Harvester
from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.site import Site, in_eval_mode

logger = logging.getLogger(__name__)


@dataclass
class Group:
    """Metrics that see the same embeddings and the same tokens.

    Examples:
        >>> metrics = vp.metrics.MetricSet(["uniqueness"], {"n_features": 256})
        >>> group = vp.evaluation.Group(metrics)
        >>> group.metrics.update({"latents": latents})
        >>> group.metrics.compute()["uniqueness"].n_features
        256
    """

    metrics: MetricSet
    embedder: str | None = None
    """Whose embeddings they are given; None for metrics that need none."""
    tokens: Int[Tensor, " chosen"] | None = None
    """Places, among the selected tokens, of those that they see; all of them by default."""


@dataclass
class Subject:
    """A dictionary that is scored, with its metrics.

    Examples:
        >>> site = vp.steering.Latents(sae).site(model, "all")
        >>> place = vp.evaluation.Place(site, sae, vp.evaluation.Facts(vp.open_images("demo:8")))
        >>> subject = vp.evaluation.Subject("sae", place)
        >>> subject.add(["fvu"], widths={})
        >>> subject.key, len(subject.groups)
        ('sae', 1)
    """

    key: str
    """``sae``, or the name of a control."""
    place: Place
    groups: list[Group] = field(default_factory=list)

    @property
    def site(self) -> Site:
        """Where it reads and writes."""
        return self.place.site

    @property
    def dictionary(self) -> Dictionary:
        """The dictionary."""
        return self.place.dictionary

    def known(self) -> dict[str, Any]:
        """Return constructor arguments for its metrics."""
        return known_of(self.place)

    def add(
        self,
        names: Sequence[str],
        *,
        widths: Mapping[str, int],
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Add metrics by name; those that use embeddings once for each embedder.

        Args:
            names: Registered metrics.
            widths: Width of the embeddings by embedder.
            options: Further constructor arguments by metric.

        Raises:
            ValueError: a metric is unknown or lacks something.
        """
        embedded = [name for name in names if "embeddings" in takes(name)[1]]
        plain = [name for name in names if name not in embedded]
        known = self.known()
        if plain:
            self.groups.append(Group(MetricSet(plain, known, options=options)))
        for embedder, width in widths.items() if embedded else ():
            of_embedder = {**known, "d_embed": width}
            self.groups.append(Group(MetricSet(embedded, of_embedder, options=options), embedder))

    @property
    def width(self) -> int:
        """Numbers that exist for a token at once: latents where a metric wants them dense."""
        dense = any(
            {"token_latents", "patch_latents"} & set(takes(type(metric))[1])
            and not getattr(metric, "sparse_latents", False)
            for group in self.groups
            for metric in group.metrics.metrics.values()
        )
        return int(self.dictionary.cfg.d_sae if dense else self.dictionary.cfg.d_in)


class Loop:
    """Feeds the metrics of every subject; each model runs once for all dictionaries in it.

    Args:
        subjects: Dictionaries with their metrics.
        pooling: How tokens become images: ``"max"`` or ``"mean"``.
        class_texts: Text embeddings of the classes, ``[classes, d_embed]``, where a metric asks for
            zero-shot logits.
        tolerant: Leave out a metric that raises, with its reason in ``failures``, in place of
            raising.

    Examples:
        >>> site = vp.steering.Latents(sae).site(model, "all")
        >>> place = vp.evaluation.Place(site, sae, vp.evaluation.Facts(vp.open_images("demo:8")))
        >>> subject = vp.evaluation.Subject("sae", place)
        >>> subject.add(["sparsity"], widths={})
        >>> _ = vp.evaluation.Loop([subject]).feed(vp.evaluation.ImageBatch(list(range(8)), pixels))
        >>> 0 < subject.groups[0].metrics.compute()["sparsity"].l0 <= 8
        True
    """

    def __init__(
        self,
        subjects: Sequence[Subject],
        *,
        pooling: str = "max",
        class_texts: Tensor | None = None,
        tolerant: bool = False,
    ) -> None:
        self.subjects, self.pooling, self.class_texts = subjects, pooling, class_texts
        self.tolerant = tolerant
        self.failures: dict[tuple[str, str | None, str], str] = {}
        """Why a metric was left out, by subject, embedder and metric."""
        self._harvesters: list[tuple[Any, Harvester]] = []
        for subject in subjects:
            if all(model is not subject.site.model for model, _ in self._harvesters):
                model = subject.site.model
                hooks = [h for s in subjects if s.site.model is model for h in s.site.hook_names]
                self._harvesters.append((model, Harvester(model, list(dict.fromkeys(hooks)))))

    def images_at_once(self, batch_size: int) -> int:
        """Return how many images fit in memory together."""
        return min(s.site.images_at_once(s.width, batch_size) for s in self.subjects)

    @torch.no_grad()
    def feed(self, batch: ImageBatch, *, only: str | None = None) -> Offer:
        """Feed every metric with a batch, and return what the first subject was offered.

        Args:
            batch: Images that were preprocessed.
            only: Feed the metrics alone that ask for this entry.

        Raises:
            ValueError: a metric refuses its input, unless the loop is tolerant.
        """
        found = [(model, harvester(batch.pixels)) for model, harvester in self._harvesters]
        readings: dict[Site, Any] = {}
        first: Offer | None = None
        for subject in self.subjects:
            site = subject.site
            if site not in readings:
                of_model = next(f for model, f in found if model is site.model)
                readings[site] = site.read(of_model)
            offer = Offer(subject.place, batch, readings[site], self.pooling, self.class_texts)
            for group in subject.groups:
                self._update(subject, group, offer, only)
            first = offer if first is None else first
        assert first is not None
        return first

    def _update(self, subject: Subject, group: Group, offer: Offer, only: str | None) -> None:
        metrics = group.metrics.metrics
        asked = [n for n, m in metrics.items() if only is None or only in takes(type(m))[1]]
        if not asked:
            return
        view = offer.entries if group.tokens is None else offer.only(group.tokens)
        if group.embedder is not None:
            view = view.plus(embeddings=offer.batch.embeddings[group.embedder])
        for name in asked:
            try:
                about = (needs if only is None else takes)(type(metrics[name]))[1]
                seen = _labelled(view, offer) if "labels" in about else view
                if seen is not None:
                    feed(metrics[name], seen)
            except Exception as error:
                if not self.tolerant:
                    raise
                # A metric of any package may fail; after a long pass it must not cost the others.
                logger.warning("%s of %s is left out: %s", name, subject.key, error)
                reason = str(error) or type(error).__name__
                self.failures[subject.key, group.embedder, name] = reason
                del metrics[name]


def _labelled(view: LazyBatch, offer: Offer) -> LazyBatch | None:
    """Return what is about the images that have a label; None where no image has one."""
    labels = offer["labels"]
    rows = torch.nonzero(labels >= 0).flatten()
    if len(rows) == len(labels):
        return view
    return view.of_images(rows, len(labels)) if len(rows) else None


def needs_class_texts(names: Sequence[str]) -> bool:
    """Return whether a metric asks for zero-shot logits.

    Args:
        names: Registered names of metrics.

    Examples:
        >>> (
        ...     vp.evaluation.needs_class_texts(["loss_recovered"]),
        ...     vp.evaluation.needs_class_texts(["fvu"]),
        ... )
        (True, False)
    """
    wanted = {"logits", "spliced_logits", "ablated_logits"}
    return any(wanted & set(takes(name)[1]) for name in names)


def embed(embedder: Any, model: Any, images: list[Any], pixels: Tensor) -> Tensor:
    """Return unit embeddings of images, on the CPU in float32.

    Args:
        embedder: The model whose embeddings are wanted.
        model: The model that ``pixels`` were prepared for.
        images: PIL images.
        pixels: Their pixels.

    Examples:
        >>> vp.evaluation.embed(model, model, list(world.images), pixels).shape
        torch.Size([8, 64])
    """
    own = pixels if embedder is model else embedder.preprocess(images)
    with torch.no_grad(), in_eval_mode(embedder):
        features: Tensor = embedder.image_features(own)
    return features.float().cpu()
