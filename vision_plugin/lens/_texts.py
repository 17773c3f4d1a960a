"""Texts and what they are embedded as, for the analyses that name directions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def embed_texts(model: Any, texts: Sequence[str], *, argument: str = "texts") -> Tensor:
    """Return unit text embeddings, ``[n, d_embed]``, on the model's device, in single precision.

    Raises:
        ValueError: there is no text, a text is empty, or the model has no text tower.
    """
    if isinstance(texts, str):
        raise ValueError(f"{argument}= is one text: give a list of texts, ['{texts[:40]}', ...]")
    if not len(texts):
        raise ValueError(f"{argument}= holds no text: give at least one")
    blank = [place for place, text in enumerate(texts) if not str(text).strip()]
    if blank:
        raise ValueError(f"{argument}= has an empty text at place {blank[0]}: leave it out")
    if model.tokenizer is None:
        raise ValueError(
            f"{model.cfg.model_name} has no text tower to embed {argument}= with: take a CLIP or "
            "SigLIP with its tokenizer"
        )
    embedded: Tensor = model.encode_text(list(texts))
    return embedded.to(torch.promote_types(embedded.dtype, torch.float32))


def check_head(model: Any, layer: int, head: int) -> None:
    """Raise ValueError unless a model has such a head."""
    n_layers, n_heads = int(model.cfg.n_layers), int(model.cfg.n_heads)
    if not (0 <= layer < n_layers and 0 <= head < n_heads):
        raise ValueError(
            f"{model.cfg.model_name} has no head {layer}.{head}: its layers are 0 to "
            f"{n_layers - 1} and the heads of each 0 to {n_heads - 1}"
        )


def centred(x: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Return rows less their mean."""
    return x - x.mean(0, keepdim=True)


def unit(x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
    """Return rows of norm one; rows of zeros stay zeros."""
    return torch.nn.functional.normalize(x, dim=-1, eps=1e-30)
