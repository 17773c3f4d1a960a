"""What a model sees in pictures before and while latents are held at values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from vision_plugin.steering._steer import steer


@dataclass(frozen=True)
class SteeringEffect:
    """Zero-shot probabilities of concepts, per picture."""

    concepts: list[str]
    before: Float[Tensor, "n c"]
    after: Float[Tensor, "n c"]

    def gains(self, n: int = 5) -> list[tuple[str, float]]:
        """The concepts that gain most over the pictures, with their mean gain in probability."""
        delta = (self.after - self.before).mean(dim=0)
        top = delta.topk(min(n, len(self.concepts)))
        return [
            (self.concepts[i], float(gain))
            for i, gain in zip(top.indices.tolist(), top.values, strict=True)
        ]

    def top(self, probabilities: Tensor) -> list[tuple[str, float]]:
        """The likeliest concept of each picture, with its probability."""
        best = probabilities.max(dim=-1)
        return [
            (self.concepts[i], float(p))
            for i, p in zip(best.indices.tolist(), best.values, strict=True)
        ]


@torch.no_grad()
def steering_effect(
    model: Any,
    sae: Any,
    pixels: Float[Tensor, "n channels height width"],
    text_embeddings: Float[Tensor, "c d_embed"],
    latents: Mapping[int, float],
    *,
    concepts: Sequence[str],
    tokens: str = "all",
) -> SteeringEffect:
    """Run pictures plain and steered, and compare what they are taken for.

    Args:
        model: A VisionBridge with a space shared with text.
        sae: A ``sae_lens.SAE`` at one of its hooks.
        pixels: As ``model.preprocess`` gives them.
        text_embeddings: Unit embeddings of the concepts.
        latents: Value per latent.
        concepts: Their names.
        tokens: Tokens to steer.

    Raises:
        ValueError: as in :func:`~vision_plugin.steering.steer`, or concepts and embeddings differ
            in number.
    """
    if len(concepts) != len(text_embeddings):
        raise ValueError(f"{len(concepts)} concepts, but {len(text_embeddings)} text embeddings")
    before = _probabilities(model, pixels, text_embeddings)
    with steer(model, sae, latents, tokens=tokens):
        after = _probabilities(model, pixels, text_embeddings)
    return SteeringEffect(list(concepts), before, after)


def _probabilities(model: Any, pixels: Tensor, text_embeddings: Tensor) -> Tensor:
    similarities = model.encode_image(pixels) @ text_embeddings.T
    return torch.softmax(model.logit_scale * similarities, dim=-1).float().cpu()
