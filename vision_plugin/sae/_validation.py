"""Held-out images, looked at while training, through SAELens's evaluator interface."""

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
from vision_plugin.evaluation import LazyBatch
from vision_plugin.images import BadImageError
from vision_plugin.metrics import to_json
from vision_plugin.models import Harvester, TokenSelection, VisionBridge, encode_tokens
from vision_plugin.models.site import token_mask
from vision_plugin.sae._saving import inference_sae

logger = logging.getLogger(__name__)

_KINDS = ("cls", "register", "patch")


class ValidationLog:
    """What was found, step by step: in memory, and as JSON lines in a file."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.file: Path | None = None

    def add(self, record: dict[str, Any]) -> None:
        """Add a line. NaN, which JSON has no word for, becomes null."""
        self.records.append(to_json(record))
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(self.records[-1]) + "\n")

    def restore(self, records: list[dict[str, Any]]) -> None:
        """Go back to what a checkpoint holds."""
        self.records = list(records)
        if self.file is not None:
            self.file.write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """All lines."""
        return "".join(json.dumps(record) + "\n" for record in self.records)


@dataclass(frozen=True)
class HeldOut:
    """What stays the same from one look to the next, wherever the SAE reads."""

    pixels: Tensor
    """[n, channels, height, width], on the CPU."""
    indices: list[int]
    """Places of the images in the collection; bad ones are left out."""
    embeddings: Tensor
    """[n, d_embed], of unit norm."""
    labels: Tensor | None
    """[n], class numbers."""
    texts: Tensor | None
    """[classes, d_embed], where the model can classify by text."""
    logits: Tensor | None
    """[n, classes] of the untouched model, at its own scale."""


@dataclass(frozen=True)
class _AtHook:
    """What stays the same at one hook."""

    kinds: list[str] | None
    """Kind of each token that the SAE takes; None at a hook with one vector per image."""
    ablated: Tensor | None
    """Logits with zeros in place of what the SAE reconstructs, [n, classes]."""


@dataclass
class Validator:
    """Scores an SAE in training on held-out images.

    It is what SAELens's ``SAETrainer(evaluator=...)`` takes. The scores are of the SAE as it would
    be saved at that moment, on activations as the model gives them:

    - ``validation/l0``, ``l0_cls``, ``l0_patch``, ``l0_register``; ``n_dead``, ``n_rare``,
      ``n_dense``: latents over the held-out tokens;
    - ``explained_variance``, ``cosine``, ``mse`` of the reconstruction;
    - ``monosemanticity``: the mean score over all held-out images, and ``n_undefined`` beside it;
    - ``loss_recovered``, with its window and accuracies, where the images have labels and the
      model a text tower: zero-shot cross-entropy at the model's own logit scale;
    - every metric that ``names`` adds, as ``validation/<metric>/<entry of its summary>``; those of
      whole images get latents max-pooled over tokens.
    """

    model: VisionBridge
    images: Any
    """An image source, or any sequence of PIL images with ``ids``."""
    hook_names: Sequence[str]
    """The SAE's hook, or a transcoder's two."""
    tokens: str = "all"
    """Kind of token that the SAE is for; ``random:n`` looks at all of them."""
    n_images: int = 256
    """The first so many images."""
    batch_size: int = 32
    """Images per forward pass."""
    names: Sequence[str] = ()
    """Further metrics, by their names in ``vision_plugin.metrics.available()``."""
    embedder: VisionBridge | None = None
    """Model whose embeddings say which images are alike; by default ``model``."""
    template: str = "a photo of a {}"
    """Sentence around a label."""
    latents: Tensor | None = field(default=None, init=False)
    """Of the last look, max-pooled over tokens, sparse COO [n, d_sae]."""

    def __post_init__(self) -> None:
        kind = "all" if self.tokens.startswith("random:") else self.tokens
        self.selection = TokenSelection.parse(kind)
        self.tokens = kind
        self._shared: list[HeldOut] = []
        self._at_hook: _AtHook | None = None
        for name in self.names:
            metrics.get(name)  # an unknown name is found before training begins

    def __call__(
        self, sae: Any, data_provider: Any, activation_scaler: ActivationScaler
    ) -> dict[str, float]:
        """Scores by name.

        Args:
            sae: In training.
            data_provider: Not used: it serves training data.
            activation_scaler: What training scales activations with.

        Raises:
            ValueError: no held-out image can be read, or a metric needs what is not at hand.
        """
        del data_provider
        stock = inference_sae(sae, activation_scaler)
        return {f"validation/{key}": value for key, value in self.score(stock).items()}

    @torch.no_grad()
    def score(self, sae: Any) -> dict[str, float]:
        """Scores of an inference SAE whose metadata names its hook."""
        held = self.held_out
        if self._at_hook is None:
            self._at_hook = self._prepare_hook()
        kinds, ablated = self._at_hook.kinds, self._at_hook.ablated
        d_sae, d_in = int(sae.cfg.d_sae), int(getattr(sae.cfg, "d_out", sae.cfg.d_in))
        sparsity = metrics.Sparsity(n_features=d_sae, token_kinds=kinds)
        fidelity = metrics.FVU(d_in=d_in, definition="per_dimension")
        known = {
            "n_features": d_sae,
            "d_in": d_in,
            "d_embed": held.embeddings.shape[1],
            "grid_size": self.model.token_layout().grid,
            "token_kinds": kinds,
            "model": self.model,
            "sae": sae,
            "tokens": self.tokens,
        }
        more = metrics.MetricSet(self.names, known)
        pooled, spliced = [], []
        for place, pixels in self._batches(held.pixels):
            x, target = self._activations(pixels)
            latents = encode_tokens(sae, x)
            sparsity.update(latents.flat())
            fidelity.update(target, latents.reconstruction)
            pooled.append(latents.pooled("max").float().to_sparse().cpu())
            batch: dict[str, Any] = {
                "pixels": pixels,
                "activations": target,
                "embeddings": held.embeddings[place],
            }
            makers = latents.entries("max")
            patches = [row for row, kind in enumerate(kinds or ()) if kind == "patch"]
            if patches:
                makers |= latents.patch_entries(torch.tensor(patches))
            if held.labels is not None:
                batch["labels"] = held.labels[place]
            if held.logits is not None and ablated is not None:
                spliced.append(self._spliced_logits(sae, pixels))
                batch |= {"logits": held.logits[place], "ablated_logits": ablated[place]}
                batch["spliced_logits"] = spliced[-1]
            if self.names:
                more.update(LazyBatch(makers).plus(**batch))
        self.latents = torch.cat(pooled).coalesce()
        scores = _sparsity_scores(sparsity.compute()) | _fidelity_scores(fidelity.compute())
        scores |= self._monosemanticity(self.latents, held.embeddings)
        if spliced and ablated is not None:
            scores |= _loss_scores(held, torch.cat(spliced), ablated)
        if self.names:
            scores |= {name: float(value) for name, value in more.scalars().items()}
        return scores

    # ------------------------------------------------------------------ the images

    @property
    def held_out(self) -> HeldOut:
        """Pixels, embeddings, labels and clean logits, made at the first look.

        Raises:
            ValueError: no image can be read.
        """
        if not self._shared:
            self._shared.append(self._prepare())
        return self._shared[0]

    def at(self, hook_names: Sequence[str]) -> Validator:
        """The same for another hook; pixels, embeddings and logits are kept once for both."""
        other = replace(self, hook_names=hook_names)
        other._shared = self._shared
        return other

    @torch.no_grad()
    def _prepare(self) -> HeldOut:
        indices, pixels, embeddings = [], [], []
        embedder = self.embedder or self.model
        wanted = min(self.n_images, len(self.images))
        for start in range(0, wanted, self.batch_size):
            images = []
            for index in range(start, min(start + self.batch_size, wanted)):
                try:
                    images.append(self.images[index])
                    indices.append(index)
                except BadImageError as error:
                    logger.warning("left out of the validation: %s", error)
            if images:
                pixels.append(self.model.preprocess(images).cpu())
                embeddings.append(embedder.image_features(embedder.preprocess(images)).cpu())
        if not indices:
            raise ValueError("none of the validation images can be read")
        every = torch.cat(pixels)
        labels, texts = self._classes(indices)
        logits = None
        if texts is not None:
            logits = torch.cat([self._logits(p, texts) for _, p in self._batches(every)])
        return HeldOut(every, indices, torch.cat(embeddings).float(), labels, texts, logits)

    def _prepare_hook(self) -> _AtHook:
        held = self.held_out
        harvested = Harvester(self.model, list(self.hook_names))(
            held.pixels[:1].to(self.model.device)
        )
        has_tokens = harvested[self.hook_names[0]].ndim > 2
        kinds = self._token_kinds() if has_tokens else None
        if held.texts is None:
            return _AtHook(kinds, None)
        hooks = [(self.hook_names[-1], self._zeros)]
        batches = self._batches(held.pixels)
        ablated = torch.cat([self._logits(pixels, held.texts, hooks) for _, pixels in batches])
        return _AtHook(kinds, ablated)

    def _classes(self, indices: list[int]) -> tuple[Tensor | None, Tensor | None]:
        """Class numbers of the images and text embeddings of the classes, where there are any."""
        labels = getattr(self.images, "labels", None)
        if labels is None:
            return None, None
        names = list(dict.fromkeys(labels))
        numbers = torch.tensor([names.index(labels[index]) for index in indices])
        if len(names) < 2 or self.model.tokenizer is None or not self.model.adapter.has_joint_space:
            return numbers, None
        return numbers, self.model.encode_text([self.template.format(name) for name in names])

    def _batches(self, pixels: Tensor) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(pixels), self.batch_size):
            place = slice(start, start + self.batch_size)
            yield place, pixels[place].to(self.model.device)

    # ------------------------------------------------------------------ the model

    def _activations(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """What the SAE reads and what it is to give, [n, tokens, d], the selected tokens alone."""
        harvested = Harvester(self.model, list(self.hook_names))(pixels.to(self.model.device))
        parts = [self._select(harvested[name]) for name in self.hook_names]
        return parts[0], parts[-1]

    def _select(self, activation: Tensor) -> Tensor:
        if activation.ndim == 4:
            activation = activation.flatten(-2)
        if activation.ndim == 2:
            return activation[:, None].float()
        rows = self.model.token_layout().indices(self.selection.kind)
        return activation[:, rows.to(activation.device)].float()

    def _token_kinds(self) -> list[str]:
        layout = self.model.token_layout()
        counts = (layout.n_cls, layout.n_registers, layout.n_patches)
        kinds = [kind for kind, n in zip(_KINDS, counts, strict=True) for _ in range(n)]
        return [kinds[row] for row in layout.indices(self.selection.kind).tolist()]

    def _logits(self, pixels: Tensor, texts: Tensor, hooks: Sequence[Any] = ()) -> Tensor:
        with self.model.hooks(fwd_hooks=list(hooks)):
            embedding = self.model.encode_image(pixels)
        scale, bias = self.model.logit_scale, self.model.logit_bias
        return (scale * embedding @ texts.T + bias).float().cpu()

    def _spliced_logits(self, sae: Any, pixels: Tensor) -> Tensor:
        texts = self.held_out.texts
        assert texts is not None
        with self.model.saes([sae], use_error_term=False, tokens=self.tokens):
            return self._logits(pixels, texts)

    def _zeros(self, activation: Tensor, hook: Any) -> Tensor:
        del hook
        mask = token_mask(self.selection, self.model.token_layout(), activation)
        zeros = torch.zeros_like(activation)
        return zeros if mask is None else torch.where(mask, zeros, activation)

    def _monosemanticity(self, latents: Tensor, embeddings: Tensor) -> dict[str, float]:
        result = metrics.monosemanticity(latents, embeddings)
        defined = result.score[~result.score.isnan()]
        return {
            "monosemanticity": float(defined.mean()) if len(defined) else math.nan,
            "monosemanticity_n_undefined": float(latents.shape[1] - len(defined)),
        }


def _sparsity_scores(result: metrics.SparsityResult) -> dict[str, float]:
    by_kind = {f"l0_{kind}": value for kind, value in result.l0_by_kind.items()}
    counts = {name: float(getattr(result, name)) for name in ("n_dead", "n_rare", "n_dense")}
    return {"l0": result.l0, **by_kind, **counts}


def _fidelity_scores(result: metrics.FVUResult) -> dict[str, float]:
    return {name: getattr(result, name) for name in ("explained_variance", "cosine", "mse")}


def _loss_scores(held: HeldOut, spliced: Tensor, ablated: Tensor) -> dict[str, float]:
    assert held.logits is not None
    assert held.labels is not None
    metric = metrics.LossRecovered()
    metric.update(held.logits, spliced, ablated, held.labels)
    result = metric.compute()
    return {
        "loss_recovered": result.recovered,
        "loss_window": result.window,
        "accuracy": result.accuracy_clean,
        "accuracy_spliced": result.accuracy_spliced,
    }
