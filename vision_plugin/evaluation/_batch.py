"""What one batch of images offers to the metrics, computed only where a metric asks for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vision_plugin.evaluation._facts import Facts
from vision_plugin.evaluation._lazy_batch import LazyBatch
from vision_plugin.models import VisionBridge
from vision_plugin.models.dictionary import Dictionary
from vision_plugin.models.site import Reading, Site


def offered(site: Site, facts: Facts) -> set[str]:
    """Names of what a batch will hold, embeddings included."""
    names = {"latents", "token_latents", "activations", "reconstruction", "embeddings"}
    names |= {"pixels", "image_ids"}
    if site.patch_rows is not None:
        names.add("patch_latents")
    if facts.has_labels:
        names.add("labels")
        if site.model.tokenizer is not None and site.model.adapter.has_joint_space:
            names |= {"logits", "spliced_logits", "ablated_logits"}
    if facts.cfg.masks is not None:
        names.add("masks")
    if facts.cfg.domain_images:
        names.add("domain")
    return names


def make_batch(
    site: Site,
    dictionary: Dictionary,
    facts: Facts,
    indices: list[int],
    pixels: Tensor,
    reading: Reading,
    class_texts: Tensor | None,
) -> LazyBatch:
    """Everything that one batch of images offers for one dictionary but the embeddings."""
    latents = reading.encode(dictionary)
    makers: dict[str, Callable[[], Any]] = {
        **latents.entries(facts.cfg.pooling),
        "activations": lambda: reading.target,
        "pixels": lambda: pixels,
        "image_ids": lambda: [facts.images.ids[index] for index in indices],
    }
    rows = site.patch_rows
    if rows is not None:
        makers |= latents.patch_entries(rows)
    if facts.has_labels:
        makers["labels"] = lambda: facts.labels[indices]
    if class_texts is not None:
        model = site.model
        makers["logits"] = lambda: _logits(model, pixels, class_texts)
        zeros = torch.zeros_like(reading.target)
        makers["spliced_logits"] = lambda: _replaced_logits(
            site, reading, batch["reconstruction"], pixels, class_texts
        )
        makers["ablated_logits"] = lambda: _replaced_logits(
            site, reading, zeros, pixels, class_texts
        )
    masks = facts.masks
    if masks is not None:
        makers["masks"] = lambda: masks.batch(site.model, indices)
    batch = LazyBatch(makers)
    return batch


def pool(activations: Tensor, pooling: str) -> Tensor:
    """Image-level activations ``[n, d]`` from ``[n, tokens, d]``."""
    return activations.amax(dim=1) if pooling == "max" else activations.mean(dim=1)


@torch.no_grad()
def _logits(model: VisionBridge, pixels: Tensor, class_texts: Tensor) -> Tensor:
    return model.zero_shot_logits(model.encode_image(pixels), class_texts)


@torch.no_grad()
def _replaced_logits(
    site: Site, reading: Reading, values: Tensor, pixels: Tensor, class_texts: Tensor
) -> Tensor:
    with site.replaced(reading.rows, values):
        return _logits(site.model, pixels, class_texts)
