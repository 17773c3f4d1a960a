"""Score an SAE in training on held-out images, through SAELens's evaluator interface."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from sae_lens.training.activation_scaler import ActivationScaler
from torch import Tensor

from vision_plugin import metrics
from vision_plugin._disk import whole_file
from vision_plugin._inputs import check_template, sentences
from vision_plugin.evaluation import Facts, ImageBatch, Loop, Place, Subject, embed
from vision_plugin.images import read_batches
from vision_plugin.metrics import to_json
from vision_plugin.models import TokenSelection, VisionBridge
from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.site import Site, in_eval_mode
from vision_plugin.sae._saving import inference_sae

logger = logging.getLogger(__name__)

EMBEDDER = "embedder"


class ValidationLog:
    """Scores step by step: in memory, and as JSON lines in a file."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.file: Path | None = None

    def add(self, record: dict[str, Any]) -> None:
        """Add the scores of a step as a line. JSON has no NaN, so it becomes null."""
        self.records.append(to_json(record))
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(self.records[-1]) + "\n")

    def restore(self, records: list[dict[str, Any]]) -> None:
        """Go back to the records of a checkpoint."""
        self.records = list(records)
        if self.file is not None:
            with whole_file(self.file) as stream:
                stream.write(self.text().encode())

    def text(self) -> str:
        """Return all lines."""
        return "".join(json.dumps(record) + "\n" for record in self.records)


@dataclass(frozen=True)
class HeldOut:
    """Data of the held-out images that every validation shares, whatever the hook."""

    pixels: Tensor
    """Prepared images, [n, channels, height, width], on the CPU."""
    indices: list[int]
    """Numbers of the images in the collection, without the unreadable ones."""
    embeddings: Tensor
    """Image embeddings, [n, d_embed], of unit norm."""
    texts: Tensor | None
    """Text embeddings of the classes, [classes, d_embed]; None if the model cannot classify by
    text."""
    logits: Tensor | None
    """Class logits of the model without the SAE, [n, classes], at its logit scale."""


@dataclass
class Validator:
    """Scores an SAE in training on held-out images.

    SAELens's ``SAETrainer(evaluator=...)`` takes it. It scores the SAE as it would be saved at that
    moment, on activations as the model gives them. The names of the scores begin with
    ``validation/``:

    - ``l0``, ``l0_cls``, ``l0_patch``, ``l0_register``: active latents per token, over all tokens
      and by kind; ``n_dead``, ``n_rare``, ``n_dense``: numbers of such latents;
    - ``explained_variance``, ``cosine``, ``mse`` of the reconstruction;
    - ``monosemanticity``: mean score over the latents; ``monosemanticity_n_undefined``: number of
      latents without a score;
    - ``loss_recovered``, ``loss_window``, ``accuracy``, ``accuracy_spliced``: zero-shot
      classification with and without the SAE, if the images have labels and the model reads text;
    - ``<metric>/<entry of its summary>`` for every metric in ``names``; metrics of whole images get
      latents max-pooled over tokens.

    Examples:
        >>> validator = vp.sae.Validator(model, vp.open_images("demo:8"), [hook])
        >>> sorted(validator.score(sae))[:3]
        ['accuracy', 'accuracy_spliced', 'cosine']
    """

    model: VisionBridge
    images: Any
    """Image source, or a sequence of PIL images with ``ids``."""
    hook_names: Sequence[str]
    """Hook of the SAE, or the two hooks of a transcoder."""
    tokens: str = "all"
    """Kind of token that the SAE trains on; ``random:n`` scores all tokens."""
    n_images: int = 256
    """Number of images to use, from the front."""
    batch_size: int = 32
    """Images per forward pass."""
    names: Sequence[str] = ()
    """Names of further metrics, from ``vision_plugin.metrics.available()``."""
    embedder: VisionBridge | None = None
    """Model whose image embeddings measure how similar two images are; by default ``model``."""
    template: str = "a photo of a {}"
    """Sentence that a class name is put into; ``{}`` is the name."""
    latents: Tensor | None = field(default=None, init=False)
    """Latents of the last validation, max-pooled over tokens, sparse COO [n, d_sae]."""

    def __post_init__(self) -> None:
        self.tokens = "all" if self.tokens.startswith("random:") else self.tokens
        TokenSelection.parse(self.tokens)
        check_template(self.template, argument="validation_template")
        self.facts = Facts(self.images)
        self._shared: list[HeldOut] = []
        self._ablated: Tensor | None = None
        for name in self.names:
            metrics.get(name)  # raise for an unknown name before training begins

    def __call__(
        self, sae: Any, data_provider: Any, activation_scaler: ActivationScaler
    ) -> dict[str, float]:
        """Return scores by name.

        Args:
            sae: SAE in training.
            data_provider: Ignored; SAELens passes the training batches.
            activation_scaler: Scaler that training applies to activations.

        Raises:
            ValueError: no held-out image can be read, or a metric lacks an input.
        """
        del data_provider
        stock = inference_sae(sae, activation_scaler)
        return {f"validation/{key}": value for key, value in self.score(stock).items()}

    @torch.no_grad()
    def score(self, sae: Dictionary) -> dict[str, float]:
        """Return the scores of an inference SAE by name, without ``validation/``."""
        held = self.held_out
        site = Site(self.model, self.hook_names[0], self.hook_names[-1], self.tokens)
        subject = Subject("sae", Place(site, sae, self.facts))
        widths = {EMBEDDER: held.embeddings.shape[1]}
        usual = ["sparsity", "fvu", "monosemanticity"]
        if held.texts is not None:
            usual.append("loss_recovered")
        subject.add(usual, widths=widths, options={"fvu": {"definition": "per_dimension"}})
        n_usual = len(subject.groups)
        if self.names:
            subject.add(self.names, widths=widths)
        loop = Loop([subject], class_texts=held.texts)
        pooled, ablated = [], []
        for place, pixels in self._batches(held.pixels):
            offer = loop.feed(
                ImageBatch(
                    held.indices[place],
                    pixels,
                    {EMBEDDER: held.embeddings[place]},
                    given=self._given(place),
                )
            )
            pooled.append(offer.latents.pooled("max").float().to_sparse().cpu())
            if held.texts is not None:
                ablated.append(offer["ablated_logits"].cpu())
        if ablated:
            self._ablated = torch.cat(ablated)
        self.latents = torch.cat(pooled).coalesce()
        found: dict[str, Any] = {}
        for group in subject.groups[:n_usual]:
            found |= group.metrics.compute()
        scores = _sparsity_scores(found["sparsity"]) | _fidelity_scores(found["fvu"])
        scores |= _monosemanticity_scores(found["monosemanticity"])
        if "loss_recovered" in found:
            scores |= _loss_scores(found["loss_recovered"])
        for group in subject.groups[n_usual:]:
            scores |= {name: float(value) for name, value in group.metrics.scalars().items()}
        return scores

    def _given(self, place: slice) -> dict[str, Any]:
        """Return logits that an earlier validation or the preparation computed."""
        given: dict[str, Any] = {}
        if self.held_out.logits is not None:
            given["logits"] = self.held_out.logits[place].to(self.model.device)
        if self._ablated is not None:
            given["ablated_logits"] = self._ablated[place].to(self.model.device)
        return given

    # ------------------------------------------------------------------ the images

    @property
    def held_out(self) -> HeldOut:
        """Data of the held-out images, prepared at the first use.

        Raises:
            ValueError: no image can be read.
        """
        if not self._shared:
            self._shared.append(self._prepare())
        return self._shared[0]

    def at(self, hook_names: Sequence[str]) -> Validator:
        """Return a scorer for another hook that shares pixels, embeddings and logits."""
        other = replace(self, hook_names=hook_names)
        other._shared = self._shared
        return other

    @torch.no_grad()
    def _prepare(self) -> HeldOut:
        indices, pixels, embeddings = [], [], []
        bad: dict[str, str] = {}
        chosen = range(min(self.n_images, len(self.images)))
        for images in read_batches(self.images, self.batch_size, bad, indices=chosen):
            indices += list(images)
            prepared = self.model.preprocess(list(images.values()))
            pixels.append(prepared.cpu())
            embedder = self.embedder or self.model
            embeddings.append(embed(embedder, self.model, list(images.values()), prepared))
        for reason in bad.values():
            logger.warning("validation leaves out %s", reason)
        if not indices:
            raise ValueError("none of the validation images can be read: mend validation_images=")
        every, texts, logits = torch.cat(pixels), self._class_texts(), None
        if texts is not None:
            with in_eval_mode(self.model):
                parts = [
                    self.model.zero_shot_logits(self.model.encode_image(part), texts)
                    for _, part in self._batches(every)
                ]
            logits = torch.cat(parts).cpu()
        return HeldOut(every, indices, torch.cat(embeddings), texts, logits)

    def _class_texts(self) -> Tensor | None:
        """Return text embeddings of the classes; None for one class or a model without text."""
        model, facts = self.model, self.facts
        if not facts.has_labels or model.tokenizer is None or not model.adapter.has_joint_space:
            return None
        if len(facts.class_names) < 2:
            return None
        return model.encode_text(
            sentences(self.template, facts.class_names, argument="validation_template")
        )

    def _batches(self, pixels: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(pixels), self.batch_size):
            place = slice(start, start + self.batch_size)
            yield place, pixels[place].to(self.model.device)


def _sparsity_scores(result: metrics.SparsityResult) -> dict[str, float]:
    by_kind = {f"l0_{kind}": value for kind, value in result.l0_by_kind.items()}
    counts = {name: float(getattr(result, name)) for name in ("n_dead", "n_rare", "n_dense")}
    return {"l0": result.l0, **by_kind, **counts}


def _fidelity_scores(result: metrics.FVUResult) -> dict[str, float]:
    return {name: getattr(result, name) for name in ("explained_variance", "cosine", "mse")}


def _monosemanticity_scores(result: metrics.MonosemanticityResult) -> dict[str, float]:
    defined = result.score[~result.score.isnan()]
    return {
        "monosemanticity": float(defined.mean()) if len(defined) else math.nan,
        "monosemanticity_n_undefined": float(len(result.score) - len(defined)),
    }


def _loss_scores(result: metrics.LossRecoveredResult) -> dict[str, float]:
    return {
        "loss_recovered": result.recovered,
        "loss_window": result.window,
        "accuracy": result.accuracy_clean,
        "accuracy_spliced": result.accuracy_spliced,
    }
