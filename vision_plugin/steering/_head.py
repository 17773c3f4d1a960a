r"""Steering after the last block, in closed form.

Behind the last block a CLIP-like tower reads its class token alone: LayerNorm, then a linear
projection. For a token ``x`` with ``a d`` added, with a bar for "minus its mean" and
``sigma^2 = (|x̄|^2 + 2 a x̄·d̄ + a^2 |d̄|^2) / width + eps``,

    embedding = (u + a v) / sigma + w,    u = P (g x̄),  v = P (g d̄),  w = P b + projection bias

(an edit of the last MLP's neurons is one of the stream: ``d`` is then the MLP's output matrix times
the direction),

with the LayerNorm's weight ``g`` and bias ``b``. Its norm expands in the inner products of u, v, w,
and its similarity to every concept is a weighted sum of those of u, v and w. No image has to be
embedded again: an image, a latent and a concept cost three multiply-adds and one exponential.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ClassTokenHead:
    """LayerNorm and linear projection of the class token, in float64.

    Attributes:
        weight: LayerNorm's weight times the projection, ``[d_model, d_embed]``.
        bias: the embedding of a token that is the same everywhere, ``[d_embed]``.
        eps: epsilon of the LayerNorm.
        row: index of the class token.
    """

    weight: Tensor
    bias: Tensor
    eps: float
    row: int

    @classmethod
    def of(cls, model: Any, residual: Tensor, embedding: Tensor) -> ClassTokenHead | None:
        """Return the head of a model; None where the model computes anything else.

        Args:
            model: A VisionBridge.
            residual: the stream after the last block, ``[n, tokens, d_model]``.
            embedding: the model's embeddings of it, ``[n, d_embed]``, not normalised.
        """
        norm, projection = _native(model, "ln_final"), _native(model, "unembed")
        if not isinstance(norm, nn.LayerNorm) or not isinstance(projection, nn.Linear):
            return None
        if norm.weight is None or model.token_layout().n_cls == 0:
            return None
        matrix = projection.weight.detach().double().T
        bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias.detach()
        offset = bias.double() @ matrix
        if projection.bias is not None:
            offset = offset + projection.bias.detach().double()
        weight = norm.weight.detach().double()[:, None] * matrix
        row = int(model.token_layout().indices("cls")[0])
        head = cls(weight, offset, float(norm.eps), row)
        return head if head._explains(model, residual, embedding) else None

    def _explains(self, model: Any, residual: Tensor, embedding: Tensor) -> bool:
        """Return whether this head gives the model's embedding, whatever the other tokens are."""
        if not self.agrees(residual[:, self.row], embedding):
            return False
        others = residual.flip(-1) * 3.0 + 1.0
        others[:, self.row] = residual[:, self.row]
        seen = model.encode_image(others, normalize=False, start_at_layer=int(model.cfg.n_layers))
        return _close(seen.double(), embedding)

    def agrees(self, token: Tensor, embedding: Tensor) -> bool:
        """Return whether class tokens ``[n, d_model]`` lead to embeddings ``[n, d_embed]``."""
        return _close(self.embed(token), embedding)

    def embed(self, token: Tensor) -> Tensor:
        """Return embeddings ``[n, d_embed]`` of class tokens ``[n, d_model]``, not normalised."""
        centred = _centred(token)
        sigma = (centred.square().mean(-1, keepdim=True) + self.eps).sqrt()
        return centred @ self.weight / sigma + self.bias

    def steered_logits(
        self, token: Tensor, directions: Tensor, coefficients: Tensor, texts: Tensor, scale: float
    ) -> Iterator[Tensor]:
        """Yield logits ``[k, concepts]`` of one image after the other.

        Each yielded tensor is overwritten by the next one.

        Args:
            token: class tokens, ``[n, d_model]``.
            directions: directions to add, ``[k, d_model]``.
            coefficients: factor of each direction in each image, ``[n, k]``.
            texts: unit text embeddings, ``[concepts, d_embed]``.
            scale: factor of the cosine similarities.
        """
        x, d, a = _centred(token), _centred(directions), coefficients.double()
        width = x.shape[-1]
        u, v, w = x @ self.weight, d @ self.weight, self.bias
        variance = x.square().sum(-1)[:, None] + 2 * a * (x @ d.T) + a.square() * d.square().sum(-1)
        sigma = (variance.clamp(min=0) / width + self.eps).sqrt()
        both = u.square().sum(-1)[:, None] + 2 * a * (u @ v.T) + a.square() * v.square().sum(-1)
        with_bias = (u @ w)[:, None] + a * (v @ w)
        norm = (
            (both / sigma.square() + 2 * with_bias / sigma + w.square().sum()).clamp(min=0).sqrt()
        )
        of_image = scale / (sigma * norm.clamp(min=1e-12))
        factors = torch.stack([of_image, scale / norm.clamp(min=1e-12)], dim=-1).to(texts.dtype)
        of_direction = (of_image * a).to(texts.dtype)
        image_part, latent_part = u.to(texts.dtype) @ texts.T, v.to(texts.dtype) @ texts.T
        bias_part = w.to(texts.dtype) @ texts.T
        logits = torch.empty_like(latent_part)
        for image in range(len(x)):
            torch.mul(latent_part, of_direction[image, :, None], out=logits)
            logits.addmm_(factors[image], torch.stack([image_part[image], bias_part]))
            yield logits


def _native(model: Any, name: str) -> Any:
    return getattr(getattr(model, name, None), "original_component", None)


def _centred(x: Tensor) -> Tensor:
    double = x.double()
    return double - double.mean(-1, keepdim=True)


def _close(ours: Tensor, theirs: Tensor) -> bool:
    if ours.shape != theirs.shape:
        return False
    size = float(theirs.abs().max()) + 1e-12
    return float((ours - theirs.double()).abs().max()) <= _TOLERANCE * size
