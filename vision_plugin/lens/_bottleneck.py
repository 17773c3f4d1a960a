"""A concept bottleneck: classes from an SAE's latents through a sparse linear head.

*Discover-then-Name* (Rao et al. 2024, arXiv 2407.14499): the latents of an SAE are the concepts, a
linear layer without bias and with an L1 penalty decides, and each decision is a sum over concepts.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vision_plugin._inputs import check_template, sentences
from vision_plugin.formats import load_sae
from vision_plugin.images import open_images
from vision_plugin.lens._bottleneck_data import (
    Codes,
    LabelledCodes,
    parts_of,
    read_codes,
    read_concept_names,
)
from vision_plugin.lens._bottleneck_head import SparseHead, fit_head, probe_answers
from vision_plugin.lens._bottleneck_result import ConceptBottleneck, Scored

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BottleneckSettings:
    """How a concept bottleneck is fitted and judged.

    Examples:
        >>> vp.lens.BottleneckSettings(labels="column:texture").test_share
        0.3
    """

    labels: str | None = None
    """Classes of the images, as ``column:NAME``; by default the labels of the images."""
    groups: str | None = None
    """Groups of the images, as ``column:NAME``, whose worst accuracy is told; by default the
    classes."""
    l1: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0)
    """Factors of the mean absolute weight in the loss, from which validation chooses."""
    learning_rates: tuple[float, ...] = (0.01, 0.1)
    """Adam's learning rates, from which validation chooses."""
    epochs: int = 200
    """Passes over the training images."""
    fit_batch_size: int = 512
    """Images per step of the fit."""
    validation_share: float = 0.15
    """Share of the images on which is chosen."""
    test_share: float = 0.3
    """Share of the images that are reported on."""
    template: str = "{}"
    """Sentence around a class for zero-shot, for example ``a picture of {}``."""
    pooling: str = "max"
    """How tokens become one row per image: their ``max`` or their ``mean``."""
    batch_size: int = 64
    """Images per forward pass."""
    seed: int = 0
    """Seed of the split and of the fit."""

    def __post_init__(self) -> None:
        check_template(self.template, argument="template")
        if not self.l1 or min(self.l1) < 0:
            raise ValueError(f"l1={self.l1}: give numbers of 0 or more")
        if not self.learning_rates or min(self.learning_rates) <= 0:
            raise ValueError(f"learning_rates={self.learning_rates}: give numbers above 0")
        for name in ("epochs", "fit_batch_size", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        shares = self.validation_share, self.test_share
        if min(shares) <= 0 or sum(shares) > 0.8:
            raise ValueError(
                f"validation_share={shares[0]} and test_share={shares[1]} must be above 0 and "
                "leave a fifth of the images to train on"
            )
        if self.pooling not in ("max", "mean"):
            raise ValueError(f"pooling={self.pooling!r}: use max or mean")


def concept_bottleneck(
    model: Any,
    sae: Any,
    images: Any,
    *,
    names: Any = None,
    settings: BottleneckSettings | None = None,
    progress: bool = True,
) -> ConceptBottleneck:
    """Classify images by an SAE's latents, and compare with probes and with zero-shot.

    Penalty and learning rate are chosen on validation images; every figure is of test images, with
    a 95% interval. The images of each class are split in the same proportions.

    Args:
        model: A VisionBridge.
        sae: An SAE of the model, or a checkpoint that ``vp.load_sae`` reads.
        images: Whatever ``vp.open_images`` takes, with labels.
        names: Names of latents: those of ``vp.name_features``, a list, a mapping from latents to
            names, or a JSON file with one of these. A latent without a name is called by its
            number.
        settings: How the head is fitted.
        progress: Show how far the images are.

    Raises:
        ValueError: there are no labels, a class has too few images, or the SAE does not fit.
        ImportError: scikit-learn is missing, which the probes need.

    Examples:
        >>> settings = vp.lens.BottleneckSettings(labels="column:texture", epochs=5)
        >>> found = vp.concept_bottleneck(model, sae, "demo:80", settings=settings, progress=False)
        >>> found.data.classes
        ['checked', 'dotted', 'plain', 'striped']
    """
    cfg = settings or BottleneckSettings()
    sae = load_sae(str(sae)) if isinstance(sae, str) or hasattr(sae, "__fspath__") else sae
    named = read_concept_names(names, int(sae.cfg.d_sae))
    data = read_codes(
        model,
        sae,
        open_images(images),
        labels=cfg.labels,
        groups=cfg.groups,
        batch_size=cfg.batch_size,
        pooling=cfg.pooling,
        progress=progress,
    )
    parts = parts_of(data.labels, (cfg.validation_share, cfg.test_share), cfg.seed)
    codes = Codes(data.codes.sparse, 1 / max(data.codes.mean_norm(parts["train"]), 1e-12))
    head = _chosen_head(cfg, codes, data.labels, parts)
    rows = [Scored.of("bottleneck", head.logits(codes, parts["test"]).argmax(1), data, parts)]
    for method, features in (("probe_embedding", data.embeddings), ("probe_neurons", data.neurons)):
        rows.append(Scored.of(method, probe_answers(features, data.labels, parts), data, parts))
    left_out: dict[str, str] = {}
    answers = _zero_shot(model, data, parts["test"], cfg.template, left_out)
    if answers is not None:
        rows.append(Scored.of("zero_shot", answers, data, parts))
    return ConceptBottleneck(
        model=str(model.cfg.model_name),
        sae=str(sae.cfg.metadata.get("hook_name")),
        settings=cfg,
        data=data,
        parts=parts,
        codes=codes,
        head=head,
        names=named,
        rows=rows,
        left_out=left_out,
    )


def _chosen_head(
    cfg: BottleneckSettings, codes: Codes, labels: Tensor, parts: dict[str, Tensor]
) -> SparseHead:
    """Return the head that validation finds best; of equals the one with the larger penalty."""
    best: tuple[float, float, SparseHead] | None = None
    for l1 in cfg.l1:
        for rate in cfg.learning_rates:
            head = fit_head(
                codes,
                labels,
                parts["train"],
                l1=l1,
                learning_rate=rate,
                epochs=cfg.epochs,
                batch_size=cfg.fit_batch_size,
                seed=cfg.seed,
            )
            answers = head.logits(codes, parts["validation"]).argmax(1)
            right = float((answers == labels[parts["validation"]]).double().mean())
            logger.debug("l1 %g, learning rate %g: %.3f on validation", l1, rate, right)
            if best is None or (right, l1) > best[:2]:
                best = right, l1, head
    assert best is not None
    return best[2]


def _zero_shot(
    model: Any, data: LabelledCodes, test: Tensor, template: str, left_out: dict[str, str]
) -> Tensor | None:
    """Return zero-shot answers; None, and the reason, for a model without text."""
    if model.tokenizer is None or not model.adapter.has_joint_space:
        left_out["zero_shot"] = f"{model.cfg.model_name} has no text tower to compare classes with"
        return None
    named = sentences(template, data.classes, argument="template")
    texts = model.encode_text(named).float().cpu()
    answers: Tensor = model.zero_shot_logits(data.embeddings[test], texts).argmax(1)
    return answers
