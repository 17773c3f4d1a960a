"""Changes of what a language model reads of images: latents, neurons and directions, by patch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vision_plugin.models.dictionary import Dictionary, encode_and_decode
from vision_plugin.steering import LatentEditor

Operate = Callable[[Tensor], Tensor]
Pull = Callable[[str, Tensor], Tensor | None]
"""Returns in which direction a patch raises each value, ``[values, d_model]``, of a factor and the
patches that count."""
SHARE = 0.2
"""Share of its natural value above which a locator's latent says that the object is there."""


class PatchReading:
    """Patches of images as an SAE reads them, with changes of any of its latents.

    Args:
        stream: Residual stream, class token and patches ``[n, tokens, d_model]``.
        first: Number of the first patch among the tokens.
        sae: The SAE.
        editor: What knows the SAE's directions; one serves several readings.
    """

    def __init__(
        self, stream: Float[Tensor, "n tokens d"], first: int, sae: Dictionary, editor: LatentEditor
    ) -> None:
        self.stream, self.first, self.sae, self.editor = stream, first, sae, editor
        self.reading: Any = editor.read(self.patches)
        if editor.directions is None:
            raise ValueError(
                "the decoder of this SAE is not linear in its latents, which this task needs"
            )
        self.directions: Tensor = editor.directions

    @property
    def patches(self) -> Float[Tensor, "n patches d"]:
        """The patches alone."""
        return self.stream[:, self.first :]

    def values(self, latents: Int[Tensor, " m"]) -> Float[Tensor, "n patches m"]:
        """Return some latents of every patch."""
        values: Tensor = self.reading.values(latents)
        return values

    def with_patches(self, patches: Tensor, rows: Tensor) -> Float[Tensor, "rows tokens d"]:
        """Return the stream of some images with other patches."""
        return torch.cat([self.stream[rows, : self.first], patches], dim=1)

    def with_latents(
        self, latents: Int[Tensor, " m"], operate: Operate, rows: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows tokens d"]:
        """Return the stream of some images with new values of latents; the SAE's error stays."""
        old = self.values(latents)[rows]
        amount = operate(old) - old
        if self.reading.gain is not None:
            amount = amount * self.reading.gain[rows]
        change = amount @ self.directions[latents].to(amount.dtype)
        return self.with_patches(self.patches[rows] + change, rows)

    @torch.no_grad()
    def emptied(self) -> PatchReading:
        """Return the same images as the SAE decodes them with every latent at 0."""
        every = torch.arange(int(self.sae.cfg.d_sae), device=self.stream.device)
        amount = self.values(every)
        if self.reading.gain is not None:
            amount = amount * self.reading.gain
        rebuilt = encode_and_decode(self.sae, self.patches)[1].view_as(self.patches)
        nothing = copy.copy(self)
        patches = rebuilt - amount @ self.directions.to(amount.dtype)
        nothing.stream = self.with_patches(patches, torch.arange(len(self.stream)))
        rows = torch.zeros_like(amount).flatten(0, -2)
        nothing.reading = replace(self.reading, source=nothing.patches, rows=rows)
        return nothing

    @torch.no_grad()
    def without_error(self, stream: Float[Tensor, "rows tokens d"], rows: Tensor) -> Tensor:
        """Return a changed stream less what the SAE does not reconstruct of the images' own."""
        own = self.patches[rows]
        lost = own - encode_and_decode(self.sae, own)[1].view_as(own)
        return torch.cat([stream[:, : self.first], stream[:, self.first :] - lost], dim=1)


@dataclass(frozen=True, eq=False)
class Knowledge:
    """What is found on training images.

    Attributes:
        latents: Latents of each value, best first by average precision, by factor: ``[values,
            latents]``.
        natural: 99% quantile of each latent over the patches where it is active, ``[d_sae]``.
        neurons: Dimensions of each value, by factor: ``[values, most]``.
        means: Mean patch of each value, by factor: ``[values, d_model]``.
        overall: Mean patch, by factor: ``[d_model]``.
        pushing: Latents whose difference of means moves the answer most, by factor: ``[values,
            latents]``.
        latent_means: Mean latents of each value's patches, by factor: ``[values, d_sae]``.
        latent_overall: Mean latents, by factor: ``[d_sae]``.
        shows: Best latent of each of the locator's values, which say where the object is.
    """

    latents: dict[str, Int[Tensor, "values latents"]]
    natural: Float[Tensor, " d_sae"]
    neurons: dict[str, Int[Tensor, "values most"]]
    means: dict[str, Float[Tensor, "values d"]]
    overall: dict[str, Float[Tensor, " d"]]
    pushing: dict[str, Int[Tensor, "values latents"]]
    latent_means: dict[str, Float[Tensor, "values d_sae"]]
    latent_overall: dict[str, Float[Tensor, " d_sae"]]
    shows: Int[Tensor, " located"]

    def with_latents(self, given: Sequence[int]) -> Knowledge:
        """Return the same with given latents for every value, if there are any."""
        if not given:
            return self
        chosen = torch.tensor(given, device=self.shows.device)
        each = {factor: chosen.expand(len(own), -1) for factor, own in self.latents.items()}
        return replace(self, latents=each, pushing=each)


@torch.no_grad()
def learn(
    reading: PatchReading, labels: dict[str, Int[Tensor, " n"]], locator: str, on_rest: set[str],
    *, most: int, pull: Pull | None = None,
) -> Knowledge:  # fmt: skip
    """Return what training images say about each value of each factor.

    Args:
        reading: The training images.
        labels: Number of each image's value, by factor.
        locator: Factor whose best latents show where the object is.
        on_rest: Factors that are seen beside the object.
        most: Latents and neurons to keep of each value.
        pull: Gradients of the answers to a factor's question, if there are any.
    """
    device = reading.stream.device
    labels = {factor: label.to(device) for factor, label in labels.items()}
    every = torch.arange(int(reading.sae.cfg.d_sae), device=device)
    dense = reading.values(every)
    active = dense > 0
    natural = torch.stack(
        [
            torch.quantile(column[fires].float(), 0.99)
            if bool(fires.any())
            else torch.zeros((), device=device)
            for column, fires in zip(dense.flatten(0, 1).T, active.flatten(0, 1).T, strict=True)
        ]
    )
    pooled = dense.amax(1)
    latents, neurons = dict[str, Tensor](), dict[str, Tensor]()
    means, overall = dict[str, Tensor](), dict[str, Tensor]()
    pushing = dict[str, Tensor]()
    latent_means, latent_overall = dict[str, Tensor](), dict[str, Tensor]()
    for factor, label in labels.items():
        scores = torch.stack(
            [average_precision(pooled, label == value) for value in range(int(label.max()) + 1)]
        )
        scores[:, natural <= 0] = 0
        latents[factor] = scores.topk(most, dim=1).indices
    knowledge = Knowledge(
        latents, natural, neurons, means, overall, pushing, latent_means, latent_overall,
        latents[locator][:, 0],
    )  # fmt: skip
    here = object_patches(reading, knowledge)
    for factor, label in labels.items():
        mask = (~here if factor in on_rest else here).unsqueeze(-1)
        count = mask.sum(1).clamp(min=1)
        each = (reading.patches * mask).sum(1) / count
        means[factor], overall[factor] = _means(each, label)
        latent_means[factor], latent_overall[factor] = _means((dense * mask).sum(1) / count, label)
        away = latent_means[factor] - latent_overall[factor]
        found = None if pull is None else pull(factor, mask)
        if found is None:  # as far as a latent's difference moves the activation
            strength = away.abs() * reading.directions.norm(dim=1)
        else:
            strength = away * (found @ reading.directions.T)
        pushing[factor] = strength.topk(most, dim=1).indices
        spread = each.std(0).clamp(min=1e-6)
        neurons[factor] = ((means[factor] - overall[factor]) / spread).abs().topk(most, 1).indices
    return knowledge


def _means(each: Float[Tensor, "n d"], label: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    """Return the mean of each value, and of all."""
    values = range(int(label.max()) + 1)
    return torch.stack([each[label == value].mean(0) for value in values]), each.mean(0)


@torch.no_grad()
def object_patches(reading: PatchReading, knowledge: Knowledge) -> Bool[Tensor, "n patches"]:
    """Return where a best latent of the locator's values is above a share of its natural value."""
    strength = reading.values(knowledge.shows) / knowledge.natural[knowledge.shows]
    return (strength > SHARE).any(-1)


def average_precision(
    scores: Float[Tensor, "n m"], is_member: Bool[Tensor, " n"]
) -> Float[Tensor, " m"]:
    """Return the average precision of each column for one class."""
    order = scores.argsort(dim=0, descending=True, stable=True)
    hits = is_member[order].double()
    ranks = torch.arange(1, len(hits) + 1, dtype=torch.float64, device=hits.device)
    precision = hits.cumsum(0) / ranks[:, None]
    found = (precision * hits).sum(0) / hits.sum(0).clamp(min=1)
    return found.float()
