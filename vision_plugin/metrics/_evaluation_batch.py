"""What one batch of images offers to the metrics, computed only where a metric asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vision_plugin.metrics._evaluation_facts import Facts
from vision_plugin.metrics._lazy_batch import LazyBatch
from vision_plugin.metrics._token_latents import encode_tokens
from vision_plugin.models import Harvester, TokenSelection, VisionBridge

LATENT_ELEMENTS = 2**27
"""Largest latent tensor of a batch (512 MiB in float32)."""


@dataclass(frozen=True)
class Reading:
    """What one batch of images gave at a site.

    Attributes:
        source: activations that a dictionary encodes, ``[n, tokens, d]``.
        target: those that it is to give, the same but for a transcoder.
        rows: places of the selected tokens of each image, ``[n, tokens]``.
    """

    source: Tensor
    target: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Site:
    """A model, the hook that is read, and the tokens that are selected there."""

    model: VisionBridge
    hook_name: str
    hook_out: str
    """Where the decoder writes: the same hook, but for a transcoder."""
    tokens: str

    @property
    def selection(self) -> TokenSelection:
        """The selected tokens."""
        return TokenSelection.parse(self.tokens)

    @property
    def token_kinds(self) -> tuple[str, ...] | None:
        """Kind of each selected token of an image; None for random tokens."""
        if self.selection.n_random is not None:
            return None
        layout = self.model.token_layout()
        kinds = ["cls"] * layout.n_cls + ["register"] * layout.n_registers
        kinds += ["patch"] * layout.n_patches
        return tuple(kinds[row] for row in layout.indices(self.selection.kind).tolist())

    @property
    def patch_rows(self) -> Tensor | None:
        """Places of the patches among the selected tokens; None where they are not all there."""
        kinds = self.token_kinds or ()
        rows = torch.tensor([row for row, kind in enumerate(kinds) if kind == "patch"])
        return rows if len(rows) == self.model.token_layout().n_patches else None

    def images_at_once(self, d_dense: int, batch_size: int) -> int:
        """Images whose token-level latents fit in memory together, ``d_dense`` wide at most."""
        n_tokens = self.selection.n_random or len(self.token_kinds or ())
        return min(batch_size, max(1, LATENT_ELEMENTS // max(1, n_tokens * d_dense)))

    def reader(self) -> Callable[[Tensor], Reading]:
        """A function from pixels to the activations of the selected tokens."""
        names = list(dict.fromkeys([self.hook_name, self.hook_out]))
        harvester, layout = Harvester(self.model, names), self.model.token_layout()
        selection = self.selection

        def read(pixels: Tensor) -> Reading:
            found = harvester(pixels)
            rows = selection.rows(layout, len(pixels))
            source, target = (
                _select(found[name], rows, keep_all=selection == TokenSelection("all"))
                for name in (self.hook_name, self.hook_out)
            )
            return Reading(source, target, rows)

        return read

    @contextmanager
    def replaced(self, rows: Tensor, values: Tensor) -> Iterator[None]:
        """The model with other activations ``[n, tokens, d]`` where the decoder writes."""

        def replace(activation: Tensor, hook: Any) -> Tensor:
            del hook
            new = values.to(activation.dtype)
            if activation.ndim == 2:
                return new[:, 0]
            flat = activation.flatten(2)
            places = rows.to(flat.device)[..., None].expand(-1, -1, flat.shape[-1])
            return flat.scatter(1, places, new).view_as(activation)

        with self.model.hooks(fwd_hooks=[(self.hook_out, replace)]):
            yield


def _select(activation: Tensor, rows: Tensor, *, keep_all: bool) -> Tensor:
    """Activations of the selected tokens, ``[n, tokens, d]``; one token where there is no axis."""
    if activation.ndim == 4:
        activation = activation.flatten(-2)
    if activation.ndim == 2:
        return activation.unsqueeze(1)
    if keep_all:
        return activation
    rows = rows.to(activation.device)
    return activation.gather(1, rows[..., None].expand(-1, -1, activation.shape[-1]))


def offered(site: Site, facts: Facts) -> set[str]:
    """Names of what a batch will hold, embeddings included."""
    names = {"latents", "token_latents", "activations", "reconstruction", "embeddings"}
    names |= {"pixels", "image_ids"}
    if site.patch_rows is not None:
        names.add("patch_latents")
    if facts.has_labels:
        names.add("labels")
        if site.model.texts is not None and site.model.adapter.has_joint_space:
            names |= {"logits", "spliced_logits", "ablated_logits"}
    if facts.cfg.masks is not None:
        names.add("masks")
    if facts.cfg.domain_images:
        names.add("domain")
    return names


def make_batch(
    site: Site,
    dictionary: Any,
    facts: Facts,
    indices: list[int],
    pixels: Tensor,
    reading: Reading,
    class_texts: Tensor | None,
) -> LazyBatch:
    """Everything that one batch of images offers for one dictionary but the embeddings."""
    latents = encode_tokens(dictionary, reading.source)
    makers: dict[str, Callable[[], Any]] = {
        **latents.entries(facts.cfg.pooling),
        "activations": lambda: reading.target,
        "pixels": lambda: pixels,
        "image_ids": lambda: [facts.pictures.ids[index] for index in indices],
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
    return model.logit_scale * model.encode_image(pixels) @ class_texts.T + model.logit_bias


@torch.no_grad()
def _replaced_logits(
    site: Site, reading: Reading, values: Tensor, pixels: Tensor, class_texts: Tensor
) -> Tensor:
    with site.replaced(reading.rows, values):
        return _logits(site.model, pixels, class_texts)
