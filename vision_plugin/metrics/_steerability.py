"""Steerability: does setting one latent move the model's answer, and towards which concept?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torchmetrics import Metric

from vision_plugin.metrics._steerability_engine import Steering
from vision_plugin.metrics._steerability_options import Options
from vision_plugin.metrics._steerability_result import (
    THRESHOLD,
    Definition,
    SteerabilityCurve,
    SteerabilityResult,
    join,
)
from vision_plugin.metrics._steerability_screening import Screening, screen
from vision_plugin.metrics._steerability_site import Prepared
from vision_plugin.metrics._streaming import StreamingMetric

STRENGTH = 150.0
"""What latents are set to for scoring (arXiv 2504.08729)."""

STRENGTHS = (-20.0, -5.0, 0.0, 5.0, 10.0, 20.0, 50.0, 150.0)
"""Strengths of the curves (arXiv 2504.08729)."""

_GROUP_ELEMENTS = 2**27
"""Changes held at once where they are not kept (512 MiB)."""


class Steerability(StreamingMetric):
    r"""Steerability of every latent of an SAE (arXiv 2504.08729).

    Latent ``k`` is set to the strength ``s`` at the selected tokens and the SAE's error is added
    back, which for a linear decoder is ``x + d_k (s - f_k)``. With ``p = softmax(scale * cosine)``
    over a vocabulary of concepts, and ``p~`` the same with the latent set,

        delta_c = mean over images of (p~_c - p_c),    score = sum_c delta_c^2

    The model below the hook runs once per image, the rest once per latent and image in batches.
    After the last block of a tower that looks at its class token only, nothing is run: the answer
    has a closed form (``_steerability_head.py``). The change of each concept's probability is
    summed per latent, so states merge by addition; they take ``4 * latents * concepts`` bytes.

    Args:
        model: a VisionBridge with a text space.
        sae: a ``sae_lens.SAE``, a transcoder, or a dictionary such as
            ``neuron_dictionary(768).at(hook_name)``, whose metadata names a hook of the model.
        text_embeddings: one embedding per concept, ``[c, d_embed]``, of any norm but 0.
        strength: what a latent is set to, in units of the SAE's latents.
        latents: which latents; all of them by default.
        tokens: ``"cls"``, ``"patch"``, ``"register"`` or ``"all"``.
        concepts: names of the concepts.
        definition: ``"sum"`` over concepts, as in the authors' code, or ``"mean"``.
        threshold: sum of squares above which a latent is steerable, under either definition.
        scale: what cosine similarities are multiplied by; None for the model's own.
        batch_size: sequences per forward pass.
        closed_form: set to False to run the head of the model instead of the closed form.

    Raises:
        ValueError: the SAE does not fit the model, a latent is out of range or given twice, text
            embeddings are zero, NaN or infinite, an option is unknown.
    """

    higher_is_better = True
    total: Tensor
    n_images: Tensor

    def __init__(
        self,
        model: Any,
        sae: Any,
        text_embeddings: Float[Tensor, "c d_embed"],
        *,
        strength: float = STRENGTH,
        latents: Iterable[int] | Tensor | None = None,
        tokens: str = "all",
        concepts: Sequence[str] | None = None,
        definition: Definition = "sum",
        threshold: float = THRESHOLD,
        scale: float | None = None,
        batch_size: int = 64,
        closed_form: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.options = Options.read(
            sae,
            text_embeddings,
            strength=strength,
            latents=latents,
            tokens=tokens,
            concepts=concepts,
            definition=definition,
            threshold=threshold,
        )
        self.steering = Steering(
            model,
            sae,
            text_embeddings,
            tokens=tokens,
            scale=scale,
            batch_size=batch_size,
            closed_form=closed_form,
        )
        shape = (len(self.options.latents), len(text_embeddings))
        self.add_state("total", torch.zeros(shape), dist_reduce_fx="sum")
        self.add_state("n_images", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, pixels: Float[Tensor, "n channels height width"]) -> None:
        """Steer every latent on more images.

        Args:
            pixels: prepared as the model wants them, see ``model.preprocess``.

        Raises:
            ValueError: no image, or NaN or infinity in the pixels or in the model's answer.
        """
        total = torch.zeros_like(self.total)
        for prepared in self.steering.prepare(pixels):
            shift = self.steering.shift(prepared, self.options.latents, self.options.strength)
            total += shift.total.to(total)
        self.total += total
        self.n_images += len(pixels)

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Add the sums of other images.

        Raises:
            ValueError: the other metric steers other latents, or to another strength.
        """
        if isinstance(incoming_state, Steerability):
            mine, theirs = self.options, incoming_state.options
            for name in ("strength", "tokens", "definition", "threshold"):
                if getattr(mine, name) != getattr(theirs, name):
                    raise ValueError(
                        f"cannot merge a Steerability with {name}={getattr(theirs, name)!r} into "
                        f"one with {name}={getattr(mine, name)!r}"
                    )
            if not torch.equal(mine.latents, theirs.latents):
                raise ValueError("cannot merge the steerability of other latents than these")
        super().merge_state(incoming_state)

    def compute(self) -> SteerabilityResult:
        """Return the steerability over all images seen, by all processes.

        Raises:
            ValueError: no images were seen.
        """
        n_images = int(self.n_images)
        if n_images == 0:
            raise ValueError("no images were seen: update with pixels before compute")
        return self.options.result(self.total / n_images, self.steering.texts, n_images)


def steerability(
    model: Any,
    sae: Any,
    pixels: Float[Tensor, "n channels height width"],
    text_embeddings: Float[Tensor, "c d_embed"],
    *,
    strength: float = STRENGTH,
    latents: Iterable[int] | Tensor | None = None,
    tokens: str = "all",
    concepts: Sequence[str] | None = None,
    definition: Definition = "sum",
    threshold: float = THRESHOLD,
    scale: float | None = None,
    batch_size: int = 64,
    closed_form: bool = True,
    keep_delta: bool = True,
    adaptive: bool | Screening = False,
) -> SteerabilityResult:
    """Score every latent for steerability in one call; see :class:`Steerability`.

    Args:
        model: a VisionBridge with a text space.
        sae: a ``sae_lens.SAE``, a transcoder or a dictionary at one of the model's hooks.
        pixels: ``[n, channels, height, width]``, see ``model.preprocess``.
        text_embeddings: ``[c, d_embed]``.
        strength: what a latent is set to.
        latents: which latents; all of them by default.
        tokens: ``"cls"``, ``"patch"``, ``"register"`` or ``"all"``.
        concepts: names of the concepts.
        definition: ``"sum"`` or ``"mean"`` over concepts.
        threshold: sum of squares above which a latent is steerable.
        scale: what cosine similarities are multiplied by; None for the model's own.
        batch_size: sequences per forward pass.
        closed_form: set to False to run the head of the model instead of the closed form.
        keep_delta: keep the changes ``[k, c]``; without them memory stays bounded.
        adaptive: steer every latent on a few images first and go on only with those that could
            still pass the threshold. The others keep the estimate they were given up on; the
            result's ``n_seen`` tells which. A :class:`Screening` sets how it is done.

    Raises:
        ValueError: as in :class:`Steerability`.
    """
    options = Options.read(
        sae,
        text_embeddings,
        strength=strength,
        latents=latents,
        tokens=tokens,
        concepts=concepts,
        definition=definition,
        threshold=threshold,
    )
    steering = Steering(
        model,
        sae,
        text_embeddings,
        tokens=tokens,
        scale=scale,
        batch_size=batch_size,
        closed_form=closed_form,
    )
    if adaptive is False:
        return _score(steering, list(steering.prepare(pixels)), options, keep_delta)
    screening = Screening() if adaptive is True else adaptive
    screened = screen(
        steering,
        pixels,
        options.latents,
        options.strength,
        threshold=options.threshold,
        screening=screening,
    )
    result = options.result(
        screened.delta,
        steering.texts,
        len(pixels),
        n_seen=screened.n_seen,
        estimate=screened.score,
    )
    return result if keep_delta else replace(result, delta=None)


def steerability_curve(
    model: Any,
    sae: Any,
    pixels: Float[Tensor, "n channels height width"],
    text_embeddings: Float[Tensor, "c d_embed"],
    *,
    strengths: Sequence[float] = STRENGTHS,
    latents: Iterable[int] | Tensor | None = None,
    tokens: str = "all",
    concepts: Sequence[str] | None = None,
    definition: Definition = "sum",
    threshold: float = THRESHOLD,
    scale: float | None = None,
    batch_size: int = 64,
    closed_form: bool = True,
    keep_delta: bool = False,
) -> SteerabilityCurve:
    """Steerability at several strengths; the model below the hook still runs once per image.

    Args:
        model: as in :func:`steerability`, like every argument but the next.
        sae: as there.
        pixels: as there.
        text_embeddings: as there.
        strengths: what latents are set to, one after the other.
        latents: as there.
        tokens: as there.
        concepts: as there.
        definition: as there.
        threshold: as there.
        scale: as there.
        batch_size: as there.
        closed_form: as there.
        keep_delta: as there; at many strengths the changes take much memory.

    Raises:
        ValueError: no strengths, or as in :func:`steerability`.
    """
    if not strengths:
        raise ValueError("strengths is empty: name at least one")
    steering = Steering(
        model,
        sae,
        text_embeddings,
        tokens=tokens,
        scale=scale,
        batch_size=batch_size,
        closed_form=closed_form,
    )
    chosen = list(latents) if latents is not None else None
    every = [
        Options.read(
            sae,
            text_embeddings,
            strength=strength,
            latents=chosen,
            tokens=tokens,
            concepts=concepts,
            definition=definition,
            threshold=threshold,
        )
        for strength in strengths
    ]
    batches = list(steering.prepare(pixels))
    results = tuple(_score(steering, batches, options, keep_delta) for options in every)
    return SteerabilityCurve(tuple(options.strength for options in every), results)


def _score(
    steering: Steering, batches: list[Prepared], options: Options, keep_delta: bool
) -> SteerabilityResult:
    """Steer on prepared images, in groups of latents whose changes are dropped if not kept."""
    n_images = sum(len(prepared) for prepared in batches)
    n_concepts = len(steering.texts)
    size = len(options.latents) if keep_delta else max(1, _GROUP_ELEMENTS // n_concepts)
    results = []
    for latents in torch.split(options.latents, size):
        total = steering.texts.new_zeros(len(latents), n_concepts)
        for prepared in batches:
            total += steering.shift(prepared, latents, options.strength).total
        group = replace(options, latents=latents)
        result = group.result(total.div_(n_images), steering.texts, n_images)
        results.append(result if keep_delta else replace(result, delta=None))
    return join(results)
