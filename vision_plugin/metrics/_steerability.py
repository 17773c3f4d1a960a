"""Steerability: does setting one latent move the model's answer, and towards which concept?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from vision_plugin.metrics._steerability_options import (
    Scoring,
    SteerabilityOptions,
    takes_options,
    takes_options_except,
)
from vision_plugin.metrics._steerability_result import (
    SteerabilityCurve,
    SteerabilityResult,
    join,
)
from vision_plugin.metrics._steerability_screening import Screening, screen
from vision_plugin.metrics._streaming import StreamingMetric
from vision_plugin.models.dictionary import Dictionary
from vision_plugin.steering import Prepared, Steering

__all__ = ["Steerability", "SteerabilityOptions", "steerability", "steerability_curve"]

STRENGTHS = (-20.0, -5.0, 0.0, 5.0, 10.0, 20.0, 50.0, 150.0)
"""Strengths of the curves (arXiv 2504.08729)."""

_GROUP_ELEMENTS = 2**27
"""Most changes held at once where they are not kept (512 MiB)."""


class Steerability(StreamingMetric):
    r"""Steerability of every latent of an SAE (arXiv 2504.08729).

    Latent ``k`` is set to the strength ``s`` at the selected tokens and the SAE's error is added
    back, which for a linear decoder is ``x + d_k (s - f_k)``. With ``p = softmax(scale * cosine)``
    over a vocabulary of concepts, and ``p~`` the same with the latent set,

        delta_c = mean over images of (p~_c - p_c),    score = sum_c delta_c^2

    The model below the hook runs once per image, the rest once per latent and image in batches.
    After the last block of a tower that reads its class token only, a closed form replaces the run.
    The change of each concept's probability is summed per latent, so states merge by addition; they
    take ``4 * latents * concepts`` bytes.

    Args:
        model: A VisionBridge with a text space.
        sae: An SAE of SAELens, a transcoder, or a dictionary such as
            ``neuron_dictionary(768).at(hook_name)``, whose metadata names a hook of the model.
        text_embeddings: One embedding per concept, ``[c, d_embed]``, none of norm 0.
        **options: The fields of :class:`SteerabilityOptions`, and arguments of
            ``torchmetrics.Metric``.

    Raises:
        ValueError: the SAE does not fit the model, a latent is out of range or given twice, a text
            embedding is zero, NaN or infinite, or an option is unknown.

    Examples:
        >>> texts = model.encode_text(["a red circle", "a blue square"])
        >>> metric = vp.metrics.Steerability(model, sae, texts, latents=[12, 13], strength=50.0)
        >>> metric.update(pixels)
        >>> metric.compute().score.shape
        torch.Size([2])
    """

    higher_is_better = True
    total: Tensor
    n_images: Tensor

    @takes_options
    def __init__(
        self,
        model: Any,
        sae: Dictionary,
        text_embeddings: Float[Tensor, "c d_embed"],
        **options: Any,
    ) -> None:
        own = {field.name for field in fields(SteerabilityOptions)}
        super().__init__(**{name: value for name, value in options.items() if name not in own})
        chosen = SteerabilityOptions(**{n: value for n, value in options.items() if n in own})
        self.steering, self.scoring = chosen.open(model, sae, text_embeddings)
        shape = (len(self.scoring.latents), len(text_embeddings))
        self.add_state("total", torch.zeros(shape), dist_reduce_fx="sum")
        self.add_state("n_images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, pixels: Float[Tensor, "n channels height width"]) -> None:
        """Steer every latent on more images.

        Args:
            pixels: images prepared by ``model.preprocess``.

        Raises:
            ValueError: no image, or NaN or infinity in the pixels or in the model's answer.
        """
        total = torch.zeros_like(self.total)
        for prepared in self.steering.prepare(pixels):
            shift = self.steering.shift(prepared, self.scoring.latents, self.scoring.strength)
            total += shift.total.to(total)
        self.total += total
        self.n_images += len(pixels)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the sums of other images.

        Raises:
            ValueError: the other metric steers other latents, with other options, or towards other
                texts.
        """
        if isinstance(incoming_state, Steerability):
            mine, theirs = self.scoring, incoming_state.scoring
            for name in ("strength", "tokens", "definition", "threshold", "concepts"):
                if getattr(mine, name) != getattr(theirs, name):
                    raise ValueError(
                        f"cannot merge a Steerability with {name}={getattr(theirs, name)!r} into "
                        f"one with {name}={getattr(mine, name)!r}"
                    )
            if not torch.equal(mine.latents, theirs.latents):
                raise ValueError("cannot merge Steerability metrics of different latents")
            self._check_same_question(incoming_state)
        super().merge_state(incoming_state)

    def _check_same_question(self, other: Steerability) -> None:
        """Raise ValueError unless both compare images with the same texts at the same scale."""
        mine, theirs = self.steering, other.steering
        if mine.scale != theirs.scale:
            raise ValueError(
                f"cannot merge a Steerability with scale={theirs.scale} into one with "
                f"scale={mine.scale}"
            )
        texts = theirs.texts.to(mine.texts.device)
        if texts.shape != mine.texts.shape or not torch.allclose(texts, mine.texts, atol=1e-5):
            raise ValueError("cannot merge Steerability metrics of different text_embeddings")

    def compute(self) -> SteerabilityResult:
        """Return the steerability over all images seen, by all processes.

        Raises:
            ValueError: no images were seen.
        """
        n_images = int(self.n_images)
        if n_images == 0:
            raise ValueError("no images were seen: call update with pixels before compute")
        return self.scoring.result(self.total / n_images, self.steering.texts, n_images)


@takes_options
def steerability(
    model: Any,
    sae: Dictionary,
    pixels: Float[Tensor, "n channels height width"],
    text_embeddings: Float[Tensor, "c d_embed"],
    *,
    keep_delta: bool = True,
    adaptive: bool | Screening = False,
    **options: Any,
) -> SteerabilityResult:
    """Score latents for steerability in one call; see :class:`Steerability`.

    Args:
        model: A VisionBridge with a text space.
        sae: An SAE, a transcoder or a dictionary at one of the model's hooks.
        pixels: Images ``[n, channels, height, width]``, prepared by ``model.preprocess``.
        text_embeddings: One embedding per concept, ``[c, d_embed]``.
        keep_delta: Whether to keep the changes ``[k, c]``; without them memory stays bounded.
        adaptive: Whether to steer every latent on a few images first and continue only with those
            that could still pass the threshold. The others keep the estimate of the images seen,
            counted in the result's ``n_seen``. A :class:`Screening` sets stages and margin.
        **options: The fields of :class:`SteerabilityOptions`.

    Raises:
        ValueError: as :class:`Steerability` raises it.

    Examples:
        >>> texts = model.encode_text(["a red circle", "a blue square"])
        >>> found = vp.metrics.steerability(
        ...     model, sae, pixels, texts, latents=[12, 13], strength=50.0
        ... )
        >>> found.score.shape, found.delta.shape
        (torch.Size([2]), torch.Size([2, 2]))
    """
    steering, scoring = SteerabilityOptions(**options).open(model, sae, text_embeddings)
    if adaptive is False:
        return _score(steering, list(steering.prepare(pixels)), scoring, keep_delta)
    screened = screen(
        steering,
        pixels,
        scoring.latents,
        scoring.strength,
        threshold=scoring.threshold,
        screening=Screening() if adaptive is True else adaptive,
    )
    result = scoring.result(
        screened.delta,
        steering.texts,
        len(pixels),
        n_seen=screened.n_seen,
        estimate=screened.score,
    )
    return result if keep_delta else replace(result, delta=None)


@takes_options_except("strength")
def steerability_curve(
    model: Any,
    sae: Dictionary,
    pixels: Float[Tensor, "n channels height width"],
    text_embeddings: Float[Tensor, "c d_embed"],
    *,
    strengths: Sequence[float] = STRENGTHS,
    keep_delta: bool = False,
    **options: Any,
) -> SteerabilityCurve:
    """Score steerability at several strengths; the model below the hook runs once per image.

    Args:
        model: A VisionBridge with a text space.
        sae: An SAE, a transcoder or a dictionary at one of the model's hooks.
        pixels: Images ``[n, channels, height, width]``, prepared by ``model.preprocess``.
        text_embeddings: One embedding per concept, ``[c, d_embed]``.
        strengths: Values that each latent is set to, one after the other, in place of ``strength``.
        keep_delta: Whether to keep the changes; at many strengths they take much memory.
        **options: The fields of :class:`SteerabilityOptions`, except ``strength``.

    Raises:
        ValueError: ``strength`` is given, there are no strengths, or :class:`Steerability` would
            raise.

    Examples:
        >>> texts = model.encode_text(["a red circle", "a blue square"])
        >>> curve = vp.metrics.steerability_curve(
        ...     model, sae, pixels, texts, latents=[12], strengths=(10.0, 50.0)
        ... )
        >>> curve.score.shape
        torch.Size([2, 1])
    """
    if "strength" in options:
        raise ValueError(
            f"strength={options['strength']} has no meaning for a curve: name every value in "
            "strengths="
        )
    if not strengths:
        raise ValueError("strengths= is empty: name at least one")
    every = [SteerabilityOptions(**{**options, "strength": strength}) for strength in strengths]
    steering, scoring = every[0].open(model, sae, text_embeddings)
    batches = list(steering.prepare(pixels))
    results = tuple(
        _score(steering, batches, replace(scoring, strength=float(strength)), keep_delta)
        for strength in strengths
    )
    return SteerabilityCurve(tuple(float(strength) for strength in strengths), results)


def _score(
    steering: Steering, batches: list[Prepared], scoring: Scoring, keep_delta: bool
) -> SteerabilityResult:
    """Steer on prepared images, in groups of latents whose changes are dropped if not kept."""
    n_images = sum(len(prepared) for prepared in batches)
    n_concepts = len(steering.texts)
    size = len(scoring.latents) if keep_delta else max(1, _GROUP_ELEMENTS // n_concepts)
    results = []
    for latents in torch.split(scoring.latents, size):
        total = steering.texts.new_zeros(len(latents), n_concepts)
        for prepared in batches:
            total += steering.shift(prepared, latents, scoring.strength).total
        group = replace(scoring, latents=latents)
        result = group.result(total.div_(n_images), steering.texts, n_images)
        results.append(result if keep_delta else replace(result, delta=None))
    return join(results)
